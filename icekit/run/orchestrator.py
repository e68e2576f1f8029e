"""The orchestrator: an image goes in, a complete run directory comes out.

Stage one finds regions (a word and a mask each), stage two learns tokens for them; then they are named and shown. What
is done is on disk at once, and a run that goes on after any interruption ends with the same tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from icekit import plugins
from icekit.pixels import erase, isolate, to_tensor
from icekit.plugins import Observers, Plugins
from icekit.protocols import (
    Attribute,
    Backbone,
    Candidate,
    Describer,
    InputError,
    Learned,
    Proposal,
    Proposer,
    Region,
    Retriever,
    RunError,
    Segmentation,
    Segmentor,
    Step,
    View,
    object_tokens,
    parts_of,
    token_names,
)
from icekit.randomness import derived_seed, seeded_generator
from icekit.report import page as report
from icekit.report.loss_chart import read_log
from icekit.run import directory, images, naming
from icekit.run.directory import Extraction, Located, RunDirectory, Started
from icekit.run.division import divisions
from icekit.settings import Role, Settings, flatten, merge, validate

CANDIDATES_TRIED = 5
"""Words tried on one view before stage one gives up."""
UNFIT, KEPT = -100.0, 1e-6
"""In the assignment of words to regions: the score of a word that the retriever has not found there, and what the word
that a region has already counts more than another of the same score."""
UNNAMED = "object"
"""The word for a mask of the user's own that the retriever cannot name."""
SamplePrompt = tuple[int, str, int, str]
"""An image to generate: its concept's index, ``"object"`` or an attribute, its running number, its prompt."""
ATTENTION_TIMESTEP, ATTENTION_DRAWS = 0.15, 4
"""Where attention maps are looked at, as a share of the noise schedule, and the draws of the noise that are averaged.
The share is the published segmentor's: with more noise a token looks at what is not there yet."""
ATTENTION_GRID = 16
"""Side of the attention grid that is shown, or the model's nearest to it."""
ATTENTION_SIDE = 128
"""Side of the saved attention maps, pixels."""


def extract(
    image: str | Path | Image.Image,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observers: Sequence[object] = (),
    installed: Plugins | None = None,
    backbone: Backbone | None = None,
    located: Located | None = None,
) -> Extraction:
    """Find the concepts of an image, learn their tokens, and keep everything in a run directory.

    Args:
        image: a file in any common format, or a PIL image. Its centre square is used.
        out: the run directory; ``runs/<stem of the image>`` if None.
        settings: ``icekit.Settings``; the defaults if None.
        resume: go on with the run in ``out`` if there is one, with its settings; a complete one is returned as it is.
        overwrite: replace the run in ``out``.
        observers: objects with observer hooks (``icekit.hookspecs``), for this run.
        installed: the plugins to use; those of this Python environment if None.
        backbone: the settings' backbone, loaded before; loaded here if None.
        located: stage one's result, when it is known; the retriever and the segmentor are then not asked.

    Raises:
        InputError: the image, the settings or ``out`` are wrong.
        RunError: the run failed. What it had done is kept in ``out`` for ``resume``.
    """
    found = installed or plugins.installed()
    source = images.load_image(image)
    run = RunDirectory(out if out is not None else Path("runs") / source.stem)
    with found.observed_by(observers) as tell, reproducible():
        try:
            this_run = _Run(found, tell, run, source, settings or Settings(), backbone, located)
            return this_run.to_the_end(resume=resume, overwrite=overwrite)
        except BaseException as error:
            tell.tell("run_failed", error=error)
            raise


class _Run:
    """One run on its way: the settings, the models and the directory, stage by stage."""

    def __init__(
        self,
        found: Plugins,
        observers: Observers,
        run: RunDirectory,
        source: images.SourceImage,
        settings: Settings,
        backbone: Backbone | None,
        located: Located | None,
    ) -> None:
        self.plugins = found
        self.observers = observers
        self.run = run
        self.source = source
        self.settings = settings
        self.loaded = backbone
        self.located = located
        self.timings: dict[str, float] = {}

    def to_the_end(self, *, resume: bool, overwrite: bool) -> Extraction:
        self.run.check_usable(resume=resume, overwrite=overwrite)
        goes_on = False
        if resume and (started := self._started()):
            self._take_up(started)
            if self.run.is_complete:
                return Extraction.open(self.run.path)
            goes_on = True
        self.plugins.resolve(self.settings)  # wrong settings must come out before a model takes minutes to load
        self.settings = self.plugins.with_preset(self.settings)
        device = resolve_device(self.settings.device)

        self.timings = self.run.load_timings() if goes_on else {}
        with self._stage("load"):
            self.backbone = self.loaded or load_backbone(self.plugins, self.settings, device)
        self.settings = self.plugins.resolve(self.settings, self.backbone.suggestions)
        self.attributes = [self.plugins.attribute(name) for name in self.settings.attributes]
        if not goes_on:
            picture = self.source.resized(self.backbone.image_size)
            self.run.begin(self.settings, self.source.source, self.source.sha256, picture)
        self.run.clear_leftovers()
        self.image = to_tensor(self.run.load_image())
        self.observers.tell("run_started", run_dir=self.run.path, settings=self.settings)

        with self._stage("localise", self.settings.max_concepts):
            regions = self._localise()
        with self._stage("learn"):
            learned = self._learn(regions)
        self.backbone.set_tokens(learned.tokens)
        samples = sample_prompts(regions, [self._tokens(region) for region in regions], self.settings.samples)
        alone = word_prompts(regions, self.attributes, samples) if self.settings.words_alone else []
        with self._stage("generate", len(samples) + len(alone)):
            words = self._name(regions)
            self._show_attention(regions)
            self._generate(samples, alone, learned)
        self._finish(regions, words)
        extraction = Extraction.open(self.run.path)
        self.observers.tell("run_finished", extraction=extraction)
        return extraction

    # --- Going on ----------------------------------------------------------------------------------------------------

    def _started(self) -> Started | None:
        if not self.run.is_complete:
            return self.run.started()
        extraction = Extraction.open(self.run.path)
        image = extraction.manifest["image"]
        return Started(image["sha256"], image["source"], extraction.settings().model_dump(mode="json"))

    def _take_up(self, started: Started) -> None:
        """Take the settings of the run that is to go on; refuse if other ones, or another image, were given.

        Raises:
            InputError: names what changed.
        """
        changes = []
        if started.sha256 != self.source.sha256:
            changes.append(f"the image was {started.source}, now {self.source.source} (other content)")
        given = self.settings.given()
        before = flatten(self.plugins.resolve(validate(Settings, started.settings)).model_dump(mode="json"))
        names = flatten({"components": given.get("components", {})})
        if all(before[key] == name for key, name in names.items()):
            # As checked and filled in, so that "steps = '400'" is no change from 400.
            now = flatten(
                self.plugins.resolve(validate(Settings, merge(started.settings, given))).model_dump(mode="json")
            )
        else:
            now = names
        for key in flatten(given):
            if key in now and now[key] != before.get(key):
                changes.append(f"{key} was {before.get(key)}, now {now[key]}")
        if changes:
            raise InputError(
                f"the run in {self.run.path} cannot go on: {'; '.join(changes)} (--overwrite starts it afresh)"
            )
        self.settings = validate(Settings, started.settings)

    @contextlib.contextmanager
    def _stage(self, name: str, total: int | None = None) -> Iterator[None]:
        self.observers.tell("stage_started", name=name, total=total)
        begun = time.monotonic()
        try:
            yield
        finally:
            key = f"{name}_s"
            self.timings[key] = round(self.timings.get(key, 0) + time.monotonic() - begun, 3)
            if self.run.started():
                self.run.save_timings(self.timings)

    # --- Stage one ---------------------------------------------------------------------------------------------------

    def _localise(self) -> tuple[Region, ...]:
        located = self.run.load_located()
        if self.located is not None and not located.finished:
            located = self.located
            self.run.save_located(located)
        for region in located.regions:
            self.observers.tell("region_found", region=region)
        if not located.finished:
            retriever, segmentor = self._build("retriever"), self._build("segmentor")
            for step in localise(self.image, retriever, segmentor, self.settings, located, self.attributes):
                before = {region.index: region.word for region in located.regions}
                located = step
                for region in located.regions:
                    if before.get(region.index) != region.word:  # new, or named anew at the end
                        self.observers.tell("region_found", region=region)
                self.run.save_located(located)
        if not located.regions:
            words = ", ".join(located.refused)
            tried = f"none of the words tried has a place in it ({words})" if words else "no word was found for it"
            raise RunError(f"no concept found in {self.source.source}: {tried}; try another --retriever or min_area")
        return located.regions

    def _build(self, role: Role) -> Any:
        return build_component(self.plugins, self.settings, role, self.backbone)

    # --- Stage two ---------------------------------------------------------------------------------------------------

    def _learn(self, regions: Sequence[Region]) -> Learned:
        tokens = self.run.load_tokens()
        if tokens is not None:
            return Learned(tokens, self.run.load_lora(), self.run.load_weights())
        with self.run.open_log() as steps:

            def on_step(step: Step) -> None:
                steps.write(step)
                self.observers.tell("step_done", step=step)

            learned: Learned = self._build("learner").learn(
                self.image,
                regions,
                self.attributes,
                seed=self.settings.seed,
                checkpoint=self.run.checkpoint,
                on_step=on_step,
            )
        self._check_learned(learned, regions)
        self.run.save_learned(learned)
        return learned

    def _check_learned(self, learned: Learned, regions: Sequence[Region]) -> None:
        learner = self.settings.name_of("learner")
        for region in regions:
            for token in self._tokens(region).values():
                row = learned.tokens.get(token)
                if row is None or tuple(row.shape) != (self.backbone.embedding_dim,) or not bool(row.isfinite().all()):
                    raise RunError(f"learner {learner!r} returned no usable embedding for {token}")
        for name, weight in (learned.lora | learned.weights).items():
            if not bool(weight.isfinite().all()):
                raise RunError(f"learner {learner!r} returned no usable weight for {name}")

    def _tokens(self, region: Region) -> dict[str, str]:
        """A concept's tokens by part: those that the learner learns."""
        component = self.plugins.component("learner", self.settings.name_of("learner"))
        parts = parts_of(component, [attribute.name for attribute in self.attributes])
        return {part: token for part, token in token_names(region, self.attributes).items() if part in parts}

    # --- Showing -----------------------------------------------------------------------------------------------------

    def _name(self, regions: Sequence[Region]) -> dict[int, dict[str, list[str]]]:
        words: dict[int, dict[str, list[str]]] = {}
        for region in regions:
            tokens = self._tokens(region)
            words[region.index] = {
                attribute.name: naming.name_attribute(self.backbone, attribute, tokens[attribute.name], region.word)
                for attribute in self.attributes
                if attribute.name in tokens
            }
        return words

    def _show_attention(self, regions: Sequence[Region]) -> None:
        for region in regions:
            generator = seeded_generator(self.settings.seed, "attention", region.index)
            maps = attention_maps(self.backbone, self.image, self._tokens(region), generator)
            for part, attention in maps.items():
                grey = (attention / attention.max().clamp_min(1e-12) * 255).round().byte().numpy()
                picture = Image.fromarray(grey).resize((ATTENTION_SIDE, ATTENTION_SIDE), Image.Resampling.BICUBIC)
                self.run.save_attention(region.index, part, picture)

    def _generate(self, samples: Sequence[SamplePrompt], alone: Sequence[SamplePrompt], learned: Learned) -> None:
        """Samples, and those of the words alone: from the same noise, and the model as it was before any learning.

        A batch is made as a whole or not at all, so that a run that goes on makes the same pictures.
        """
        done, at_once = 0, int(self.settings.backbone.get("images_at_once", 1))
        for words_alone, prompts in ((False, samples), (True, alone)):
            for start in range(0, len(prompts), at_once):
                batch = prompts[start : start + at_once]
                if not all(self.run.has_sample(*one[:3], words_alone=words_alone) for one in batch):
                    pictures = self.backbone.generate(
                        [prompt for *_, prompt in batch],
                        seeds=[derived_seed(self.settings.seed, "sample", *one[:3]) for one in batch],
                        steps=self.settings.sample_steps,
                        guidance_scale=self.settings.guidance_scale,
                        lora=None if words_alone else learned.lora or None,
                        weights=None if words_alone else learned.weights or None,
                    )
                    for one, picture in zip(batch, pictures, strict=True):
                        self.run.save_sample(*one[:3], picture, words_alone=words_alone)
                for _ in batch:
                    done += 1
                    self.observers.tell("image_generated", done=done, total=len(samples) + len(alone))

    def _finish(self, regions: Sequence[Region], words: dict[int, dict[str, list[str]]]) -> None:
        side = self.backbone.image_size
        manifest: dict[str, Any] = {
            "schema_version": directory.SCHEMA_VERSION,
            "icekit_version": plugins.own_version(),
            "image": {
                "source": self.source.source,
                "sha256": self.source.sha256,
                "width": side,
                "height": side,
            },
            "preset": self.settings.preset,
            "components": self.settings.components.model_dump(),
            "attributes": list(self.settings.attributes),
            "seed": self.settings.seed,
            "concepts": [
                {
                    "index": region.index,
                    "label": region.label,
                    "score": round(float(region.score), 4),
                    "mask": directory.mask_name(region),
                    "area": round(float(region.mask.float().mean()), 4),
                    "tokens": self._tokens(region),
                    "words": words[region.index],
                    "described": {name: _likeliest(hints) for name, hints in region.hints.items()},
                    "words_alone": words_alone(region, self.attributes),
                }
                for region in regions
            ],
            "learning_steps": max((line.step for line in read_log(self.run.path / "log.jsonl")), default=0),
            "timings": self.timings,
        }
        self.run.save_report(report.render_report(self.run.path, manifest))
        self.run.finish(manifest)


def load_backbone(found: Plugins, settings: Settings, device: torch.device) -> Backbone:
    """The settings' backbone, loaded."""
    name = settings.name_of("backbone")
    values = found.component_settings("backbone", name, settings.values_of("backbone"))
    backbone: Backbone = found.component("backbone", name)(values, device)
    return backbone


# Any, for a retriever and a segmentor both: what a component must offer was checked at registration.
def build_component(found: Plugins, settings: Settings, role: Role, backbone: Backbone) -> Any:
    """The settings' retriever, segmentor or learner on this backbone."""
    name = settings.name_of(role)
    return found.component(role, name)(found.component_settings(role, name, settings.values_of(role)), backbone)


def localise(
    image: Tensor,
    retriever: Retriever,
    segmentor: Segmentor | Proposer,
    settings: Settings,
    located: Located,
    attributes: Sequence[Attribute] = (),
) -> Iterator[Located]:
    """Stage one, from where it stands: yields after every word found, and once more when finished.

    x_0 = x; c_i = T(x_i); m_i = S(x_i, c_i); x_{i+1} = x_i * (1 - m_i)   (ICE, Cendra and Han, CVPR 2025, stage one)

    A round tries a word. It ends when ``max_concepts`` are found or ``max_rounds`` are over, when ``min_visible`` of
    the image or less is left, when the retriever has no word, or when nothing is erased for any of its first words. The
    masks of a ``Proposer`` are all the regions; where one has no word, the retriever names it, looking at that mask
    alone.

    Every region's random numbers follow from the seed and its place in the loop, so that going on from any ``located``
    ends as if there had been no interruption.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        retriever: T.
        segmentor: S, or a ``Proposer``.
        settings: the stop rules, the filling of erased parts and the seed.
        located: what was found so far.
        attributes: those that a ``Describer`` is asked about, at the end, with ``settings.describe``.
    """
    if isinstance(segmentor, Proposer):
        for proposal in segmentor.propose(image)[: settings.max_concepts][len(located.regions) :]:
            _check_mask(proposal.mask, image, settings)
            best = _word_of(proposal, image, retriever)
            region = Region(len(located.regions), best.word, best.score, proposal.mask)
            located = dataclasses.replace(located, regions=(*located.regions, region))
            yield located
    else:
        while _goes_on(located, image, settings):
            visible = _visible(located, image)
            located = _after_a_word(located, image, retriever, segmentor, settings)
            if torch.equal(_visible(located, image), visible):
                break
            yield located
        if settings.rename and located.regions:
            located = dataclasses.replace(located, regions=_named_together(located.regions, image, retriever))
    described = _described(located.regions, image, retriever, settings, attributes)
    yield dataclasses.replace(located, regions=described, finished=True)


def _goes_on(located: Located, image: Tensor, settings: Settings) -> bool:
    return (
        len(located.regions) < settings.max_concepts
        and (settings.max_rounds is None or located.rounds < settings.max_rounds)
        and float(_visible(located, image).float().mean()) > settings.min_visible
    )


def _visible(located: Located, image: Tensor) -> Tensor:
    """What is not erased yet: bool ``[H, W]``."""
    visible = torch.ones(image.shape[1:], dtype=torch.bool)
    for region in located.regions:
        visible &= ~region.mask
    return visible if located.erased is None else visible & ~located.erased


def _used(located: Located, settings: Settings) -> list[str]:
    """The words that are not to come again."""
    if settings.reuse == "later":
        return [] if located.last is None else [located.last]
    return [*(region.word for region in located.regions), *located.refused]


def _after_a_word(
    located: Located, image: Tensor, retriever: Retriever, segmentor: Segmentor, settings: Settings
) -> Located:
    """Try the retriever's words for what is visible, up to the first for which something is erased."""
    visible = _visible(located, image)
    view, used = View(image, erase(image, visible, settings.erase), visible), _used(located, settings)
    for candidate in _unused(retriever.retrieve(view, used), used)[:CANDIDATES_TRIED]:
        if located.rounds == settings.max_rounds:
            break
        generator = seeded_generator(settings.seed, "segment", len(located.regions), candidate.word)
        found = segmentor.segment(view, candidate.word, generator)
        mask = found.mask if isinstance(found, Segmentation) else found
        _check_mask(mask, image, settings)
        before = len(located.regions)
        for part in _parts(mask & visible, settings):
            located = _with_region(located, part, candidate, image, retriever, settings)
        located = dataclasses.replace(located, rounds=located.rounds + 1, last=candidate.word)
        if len(located.regions) == before:
            located = dataclasses.replace(located, refused=(*located.refused, candidate.word))
        if isinstance(found, Segmentation):
            _check_mask(found.erased, image, settings)
            so_far = torch.zeros_like(visible) if located.erased is None else located.erased
            located = dataclasses.replace(located, erased=so_far | found.erased)
        if not torch.equal(_visible(located, image), visible):
            break
    return located


def _parts(mask: Tensor, settings: Settings) -> list[Tensor]:
    """The mask, or each of its 8-connected parts, from the top down."""
    if not settings.apart:
        return [mask]
    labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    return [torch.from_numpy(labels == number) for number in range(1, count + 1)]


def _with_region(
    located: Located, mask: Tensor, candidate: Candidate, image: Tensor, retriever: Retriever, settings: Settings
) -> Located:
    """With the region of this mask, if it is large enough and there is room for it."""
    used = _used(located, settings)
    if settings.divide:
        mask = _one_thing(mask, image, retriever, used)
    area = float(mask.float().mean())
    if len(located.regions) == settings.max_concepts or area == 0 or area < settings.min_area:
        return located
    fitting = _seen_alone(mask, image, retriever, used) if settings.rename else []
    named = fitting[0] if fitting else candidate
    region = Region(len(located.regions), named.word, named.score, mask)
    return dataclasses.replace(located, regions=(*located.regions, region))


def _named_together(regions: Sequence[Region], image: Tensor, retriever: Retriever) -> tuple[Region, ...]:
    """The regions with the words that fit all of them best: the assignment of the largest total score, each word once.

    One by one, the first region may take the word that the next one fits better. A region that the retriever has no
    word for keeps its own.
    """
    found = [{one.word: one.score for one in _seen_alone(region.mask, image, retriever)} for region in regions]
    words = list(dict.fromkeys([region.word for region in regions] + [word for row in found for word in row]))

    def fit(row: int, word: str) -> float:
        kept = word == regions[row].word
        return found[row].get(word, UNFIT) + (KEPT if kept else 0.0)

    table = np.array([[fit(row, word) for word in words] for row in range(len(regions))])
    named = list(regions)
    for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
        word = words[column]
        if word in found[row]:
            named[row] = dataclasses.replace(regions[row], word=word, score=found[row][word])
    return tuple(named)


def _described(
    regions: Sequence[Region],
    image: Tensor,
    retriever: Retriever,
    settings: Settings,
    attributes: Sequence[Attribute],
) -> tuple[Region, ...]:
    """The regions with hints, if the retriever can give some and is to: it looks at each alone."""
    if not settings.describe or not isinstance(retriever, Describer):
        return tuple(regions)
    described = []
    for region in regions:
        view = View(image, isolate(image, region.mask), region.mask)
        hints = {one.name: retriever.describe(view, region.word, one.vocabulary) for one in attributes}
        described.append(dataclasses.replace(region, hints=hints))
    return tuple(described)


def _seen_alone(mask: Tensor, image: Tensor, retriever: Retriever, used: Sequence[str] = ()) -> list[Candidate]:
    """Words not used yet for what a mask shows, all else hidden; best first."""
    return _unused(retriever.retrieve(View(image, isolate(image, mask), mask), used), used)


def _one_thing(mask: Tensor, image: Tensor, retriever: Retriever, used: Sequence[str]) -> Tensor:
    """The mask, or the part of it that a word fits best, if it is two things.

    It is when it can be cut in two parts whose words are different and fit them better, in the mean, than any word fits
    the whole. The other part is left to be found.
    """

    def best(part: Tensor) -> Candidate | None:
        return next(iter(_seen_alone(part, image, retriever, used)), None)

    whole = best(mask)
    kept, most = mask, whole.score if whole else -math.inf
    for parts in divisions(mask):
        one, other = best(parts[0]), best(parts[1])
        if one and other and one.word != other.word and (one.score + other.score) / 2 > most:
            kept, most = parts[int(other.score > one.score)], (one.score + other.score) / 2
    return kept


def _word_of(proposal: Proposal, image: Tensor, retriever: Retriever) -> Candidate:
    if proposal.word is not None:
        return Candidate(proposal.word, 1.0)
    named = _seen_alone(proposal.mask, image, retriever)
    return named[0] if named else Candidate(UNNAMED, 0.0)


def _unused(candidates: Sequence[Candidate], used: Sequence[str]) -> list[Candidate]:
    taken = {word.casefold() for word in used}
    return [candidate for candidate in candidates if candidate.word.casefold() not in taken]


def _check_mask(mask: Tensor, image: Tensor, settings: Settings) -> None:
    if mask.dtype != torch.bool or mask.shape != image.shape[1:]:
        raise RunError(
            f"segmentor {settings.name_of('segmentor')!r} returned a mask of {mask.dtype} {list(mask.shape)},"
            f" expected torch.bool {list(image.shape[1:])}"
        )


def concept_prompt(tokens: Mapping[str, str]) -> str:
    """What a concept's samples are prompted with; tokens: part -> token."""
    return f"a photo of a {object_tokens(tokens)}"


def attribute_parts(tokens: Mapping[str, str]) -> list[str]:
    """The attributes that a concept has tokens for; tokens: part -> token."""
    return [part for part in tokens if part not in ("category", "instance")]


def words_alone(region: Region, attributes: Sequence[Attribute]) -> dict[str, str]:
    """What plain words say of a concept, without any learning: ``"object"`` or attribute -> phrase.

    A retriever that describes says which word of each attribute fits: ``{"object": "white stone bottle", "colour":
    "white bottle", "material": "stone bottle"}``. Where none did there is the concept's own word alone.
    """
    best = {name: _likeliest(words)[:1] for name, words in region.hints.items()}
    phrases = {one.name: " ".join([*best.get(one.name, []), region.word]) for one in attributes}
    said = [word for one in attributes for word in best.get(one.name, [])]
    return {"object": " ".join([*said, region.word])} | phrases


def _likeliest(words: Mapping[str, float], count: int = 3) -> list[str]:
    """The likeliest of a region's hints for one attribute, best first."""
    return sorted(words, key=lambda word: -words[word])[:count]


def word_prompts(
    regions: Sequence[Region], attributes: Sequence[Attribute], samples: Sequence[SamplePrompt]
) -> list[SamplePrompt]:
    """The samples' counterparts: the same concepts, parts and numbers, prompted with plain words alone."""
    phrases = {region.index: words_alone(region, attributes) for region in regions}
    prompts = []
    for index, part, number, _ in samples:
        phrase = phrases[index][part]
        prompts.append((index, part, number, f"a photo of {'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"))
    return prompts


def sample_prompts(regions: Sequence[Region], tokens: Sequence[Mapping[str, str]], count: int) -> list[SamplePrompt]:
    """The samples to generate; tokens: each region's, by part.

    An attribute's token is shown on its concept's category, in the order in which both were learned, or on its word
    where no category was learned.
    """
    prompts = []
    for region, own in zip(regions, tokens, strict=True):
        thing = own.get("category", region.word)
        parts = {"object": concept_prompt(own)}
        parts |= {part: f"a photo of a {thing} {own[part]}" for part in attribute_parts(own)}
        prompts += [(region.index, part, number, text) for part, text in parts.items() for number in range(count)]
    return prompts


@torch.no_grad()
def attention_maps(
    backbone: Backbone, image: Tensor, tokens: Mapping[str, str], generator: torch.Generator
) -> dict[str, Tensor]:
    """Where each of a concept's tokens looks: its cross-attention on the noised image, mean over draws of the noise.

    The grid is the one that ICE's attention loss uses, 16 x 16, or the model's nearest to it.

    Args:
        backbone: with the tokens set.
        image: float32 ``[3, H, W]`` in [0, 1].
        tokens: part -> token.
        generator: makes the noise.

    Returns:
        Part -> float32 ``[r, r]`` on the CPU, weights in [0, 1].
    """
    resolution = min(backbone.attention_resolutions, key=lambda side: abs(side - ATTENTION_GRID))
    attributes = attribute_parts(tokens)
    prompts = {concept_prompt(tokens): [part for part in tokens if part not in attributes]}
    if attributes:
        category = [tokens["category"]] if "category" in tokens else []
        prompts[" ".join(["a photo of a", *category, *(tokens[part] for part in attributes)])] = attributes
    latents = backbone.encode_images(image[None].to(backbone.device))
    timesteps = torch.tensor([int(ATTENTION_TIMESTEP * backbone.num_timesteps)], device=backbone.device)
    noises = [torch.randn(latents.shape, generator=generator).to(latents) for _ in range(ATTENTION_DRAWS)]
    maps: dict[str, Tensor] = {part: torch.zeros(resolution, resolution) for part in tokens}
    for prompt, parts in prompts.items():
        conditioning = backbone.encode_prompts([prompt])
        positions = backbone.token_positions(prompt, [tokens[part] for part in parts])
        for noise in noises:
            with backbone.capture_attention(cross=[resolution]) as captured:
                backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
                cross = captured.cross(resolution)[0].float().cpu()
            for part, places in zip(parts, positions, strict=True):
                maps[part] += cross[places].mean(dim=0) / ATTENTION_DRAWS
    return maps


def resolve_device(name: str) -> torch.device:
    """``"auto"`` becomes the best device there is.

    Raises:
        InputError: the device asked for is not there.
    """
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    available = [device for device, is_there in there.items() if is_there()]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise InputError(f"device {name!r} is not available here: choose auto or {' or '.join(available)}")
    return torch.device(name)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic kernels for the length of the block: the same seed on the same machine gives the same bits.

    An operation that has none on this device only warns: rather a run that may differ in its last bits than none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read when CUDA is first used
    before = torch.are_deterministic_algorithms_enabled()
    warn_only_before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only_before)
