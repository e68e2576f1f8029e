"""What one combination made of one image, as metrics see it: concepts matched to the truth, and generated images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from icekit.bench.directory import BenchDirectory, load_strip, save_strip
from icekit.bench.matching import matches_of
from icekit.protocols import NO_TOKENS, Backbone, BenchImage, FoundConcept, InputError, Match, Region
from icekit.randomness import derived_seed
from icekit.run.border import draw
from icekit.run.extraction import Extraction
from icekit.settings import Settings
from icekit.waiting import Ticker

PLAIN = "plain"
"""Where images of prompts without a learned token are kept: they are the same for all combinations."""


@dataclass
class MeasuredOutcome:
    """``protocols.Outcome`` on a run directory; images are generated when a metric asks for them, and kept.

    run: None where nothing was found.
    count: images for each prompt.
    parts: see ``protocols.Outcome``.
    words: attribute's name -> its vocabulary.
    """

    image: BenchImage
    found: Sequence[FoundConcept]
    settings: Settings
    backbone: Backbone
    directory: BenchDirectory
    combination: str
    run: Extraction | None
    count: int
    parts: Sequence[str]
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _images: dict[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def attributes(self) -> Sequence[str]:
        """See ``protocols.Outcome``."""
        return [part for part in self.parts if part not in ("category", "instance")]

    @property
    def vocabularies(self) -> Mapping[str, Sequence[str]]:
        """See ``protocols.Outcome``."""
        return {name: self.words.get(name, ()) for name in self.attributes}

    @property
    def matches(self) -> Sequence[Match]:
        """See ``protocols.Match``."""
        return matches_of(self.image, self.found)

    def generate(self, prompt: str) -> list[Image.Image]:
        """See ``protocols.Outcome``."""
        if prompt not in self._images:
            file = self.strip(prompt)
            name = file.relative_to(self.directory.path).as_posix()
            height, width = self.image.pixels.shape[1:]
            pictures = load_strip(self.directory.files, name, self.count, (width, height))
            if pictures is None:
                pictures = self._made(prompt)
                save_strip(self.directory.claim(file), pictures)
            self._images[prompt] = pictures
        return self._images[prompt]

    def strip(self, prompt: str) -> Path:
        """The file of a prompt's images."""
        place = self.combination if "<" in prompt else PLAIN
        how = (self.count, self.settings.sample_steps, self.settings.guidance_scale)
        return self.directory.strip(place, self.image.name, prompt, how)

    def _made(self, prompt: str) -> list[Image.Image]:
        run = self.run if "<" in prompt else None  # plain words: the model as it was before any learning
        if run is None and "<" in prompt:
            raise InputError(f"prompt {prompt!r}: nothing was found, so there are no tokens")
        ticker, done = Ticker(f"{self.image.name}: generating images"), itertools.count(1)
        return draw(
            ("backbone", self.settings.name_of("backbone")),
            self.backbone,
            [prompt] * self.count,
            lambda place, picture: ticker.tick(next(done), self.count),
            seeds=[derived_seed(self.settings.seed, "bench", self.image.name, i) for i in range(self.count)],
            tokens=run.tokens if run else NO_TOKENS,
            steps=self.settings.sample_steps,
            guidance_scale=self.settings.guidance_scale,
            tuning=run.tuning() if run else None,
        )


def found_concepts(run: Extraction, regions: Sequence[Region]) -> list[FoundConcept]:
    """The concepts of a complete run, with the regions that it was given."""
    by_index = {concept.index: concept for concept in run.concepts}
    return [
        FoundConcept(region, by_index[region.index].tokens, by_index[region.index].words)
        for region in regions
        if region.index in by_index
    ]
