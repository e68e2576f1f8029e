"""The plainest components that satisfy the protocols, as a plugin: they make runs of milliseconds for tests.

The world they know: an image is four quadrants, each one thing of one word.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from icekit import Extraction, hookimpl
from icekit.paths import PLACE
from icekit.plugins import Origin, Plugins
from icekit.protocols import (
    CHANGES_NO_RESULT,
    NO_TOKENS,
    Attention,
    Attribute,
    BenchImage,
    Candidate,
    Checkpoint,
    Column,
    ComponentSettings,
    Conditioning,
    FineTuning,
    InputError,
    Learned,
    Look,
    Outcome,
    Prediction,
    Proposal,
    Region,
    Score,
    Step,
    Tokens,
    Trained,
    Tuned,
    View,
    nearest_grids,
    token_names,
)

SIDE, DIM = 32, 8
NAMES = dict.fromkeys(("backbone", "retriever", "segmentor", "learner"), "plain")
"""Settings that choose them."""
ENCODER = "clip_l"
"""The one text encoder that the plain backbone has."""
WORDS = ("cup", "red bowl", "vase", "ball")


def embedding_of(text: str) -> Tensor:
    """A fixed random vector ``[DIM]`` for a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed))


class PlainBackbone:
    """Words are vectors, images are latents."""

    class Settings(ComponentSettings):
        """Which model, and how its images are made."""

        model: Annotated[str, PLACE] = Field("plain", description="its name, or a folder of that name")
        image_size: tuple[int, int] = Field((SIDE, SIDE), description="height and width of its images")
        images_at_once: int = Field(
            1, ge=1, description="images made as one batch", json_schema_extra=CHANGES_NO_RESULT
        )

    preset = "plain"
    lacks: Collection[str] = ("fine_tuning",)
    rows: Mapping[str, int] = {ENCODER: DIM}

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.identity = f"the words of {Path(settings.model).name}"
        self.image_size = height, width = settings.image_size
        self.latent_shape = (3, height, width)
        self.word_grids = self.pixel_grids = tuple((height // cell, width // cell) for cell in (2, 4, 8))

    def knows(self, word: str) -> bool:
        return word != "maroon"

    def word_rows(self, word: str, pieces: str = "mean") -> dict[str, Tensor]:
        return {ENCODER: embedding_of(word)}

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        return Conditioning({"pooled": torch.stack([self._pooled(prompt, tokens) for prompt in prompts])})

    def _pooled(self, prompt: str, tokens: Tokens) -> Tensor:
        words = prompt.split()
        for word in words:
            if word.startswith("<") and word not in tokens:
                raise InputError(f"prompt {prompt!r} has the token {word}, which was not handed in")
        vectors = [tokens[word][ENCODER] if word in tokens else embedding_of(word) for word in words]
        return torch.nn.functional.normalize(torch.stack([*vectors, torch.zeros(DIM)]).sum(dim=0), dim=-1)

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        return self.encode_prompts(texts, tokens).parts["pooled"]

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        return [[prompt.split().index(word)] for word in words]

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        return latents + shares[:, None, None, None] * noise

    def training_target(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        return noise

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        look, batch, generator = look or Look(), len(noisy), torch.Generator().manual_seed(0)
        grids, places = nearest_grids(self.word_grids, look.words), nearest_grids(self.pixel_grids, look.pixels)
        words = [torch.rand(batch, 16, *grid, generator=generator) for grid in grids]
        pixels = [torch.rand(batch, *grid, *grid, generator=generator) for grid in places]
        return Prediction(
            noisy,
            Attention(
                tuple(one / one.sum(dim=1, keepdim=True) for one in words),
                tuple(one / one.sum(dim=(-2, -1), keepdim=True) for one in pixels),
            ),
        )

    def fine_tuned(self, trained: Trained, rank: int, generator: torch.Generator) -> AbstractContextManager[Tuned]:
        raise InputError("this model has no weights to train")

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        tokens: Tokens = NO_TOKENS,
        steps: int | None = None,
        guidance_scale: float | None = None,
        tuning: FineTuning | None = None,
        skip: Collection[int] = (),
        on_image: Callable[[int, Image.Image], None] | None = None,
    ) -> list[Image.Image]:
        """Images of the prompt's and the seed's colour; their first pixel says how many were made as one batch."""
        colours = (self.embed_texts(prompts, tokens)[:, :2].clamp(0, 1) * 255).int().tolist()
        images, at_once = [], self.settings.images_at_once
        for start in range(0, len(prompts), at_once):
            batch = range(start, min(start + at_once, len(prompts)))
            for place in batch:
                if place in skip:
                    continue
                image = Image.new("RGB", self.image_size[::-1], (*colours[place], seeds[place] % 256))
                image.paste((len(batch),) * 3, (0, 0, 1, 1))
                images.append(image)
                if on_image:
                    on_image(place, image)
        return images


class PlainRetriever:
    """Says the words of the quadrants that are still visible, and "ghost" first of all."""

    class Settings(ComponentSettings):
        """Which words."""

        ghosts: int = Field(1, ge=0, description="how many words to say that are nowhere")

    def __init__(self, settings: Settings, backbone: PlainBackbone) -> None:
        self.settings = settings

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        ghosts = [f"ghost {number}" for number in range(self.settings.ghosts)]
        seen = [word for word in WORDS if bool((quadrant(word, view.visible.shape) & view.visible).any())]
        return [Candidate(word, 0.5) for word in [*ghosts, *seen] if word not in used]


class DescribingRetriever(PlainRetriever):
    """Sees an attribute's first two words in everything."""

    def describe(self, view: View, noun: str, words: Sequence[str]) -> Mapping[str, float]:
        return {words[0]: 0.75, words[1]: 0.25}


class EmbeddingRetriever(PlainRetriever):
    """Places a quadrant where its word is, and a text at the mean of its words."""

    space = "plain words"

    def embed(self, view: View) -> Tensor:
        shares = [float((quadrant(word, view.visible.shape) & view.visible).sum()) for word in WORDS]
        return PlainTexts().embed([WORDS[shares.index(max(shares))]])[0]

    @staticmethod
    def text_encoder(settings: PlainRetriever.Settings, device: torch.device) -> PlainTexts:
        return PlainTexts()


class PlainTexts:
    """Texts as the mean of their words."""

    space = EmbeddingRetriever.space

    def embed(self, texts: Sequence[str]) -> Tensor:
        means = [torch.stack([embedding_of(word) for word in text.split()]).mean(dim=0) for text in texts]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def write_data_set(folder: Path, words: Sequence[str] = ("cup",)) -> None:
    """A folder for the data set ``folder``: one picture, ``one``, with the words' quadrants as masks."""
    masks = folder / "masks" / "one"
    masks.mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "one.png")
    for number, word in enumerate(words):
        Image.fromarray(quadrant(word).numpy().astype(np.uint8) * 255).save(masks / f"{number}-{word}.png")


def quadrant(word: str, size: Sequence[int] = (SIDE, SIDE)) -> Tensor:
    """The word's quadrant, bool, of this height and width."""
    mask = torch.zeros(*size, dtype=torch.bool)
    if word in WORDS:
        row, column = divmod(WORDS.index(word), 2)
        height, width = size[0] // 2, size[1] // 2
        mask[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    return mask


class PlainSegmentor:
    """A word's quadrant, with a random frayed edge."""

    class Settings(ComponentSettings):
        """How slowly."""

        pause: float = Field(0.0, description="seconds to wait")

    def __init__(self, settings: Settings, backbone: PlainBackbone) -> None:
        self.settings = settings

    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        time.sleep(self.settings.pause)
        kept = torch.rand(view.visible.shape, generator=generator) < 0.97
        return quadrant(word, view.visible.shape) & view.visible & kept


class ProposingSegmentor:
    """Knows three masks before it is asked for any word, and the word of the last."""

    Settings = PlainSegmentor.Settings

    def __init__(self, settings: PlainSegmentor.Settings, backbone: PlainBackbone) -> None:
        pass

    def propose(self, image: Tensor) -> list[Proposal]:
        vase, ball, cup = (quadrant(word, image.shape[1:]) for word in ("vase", "ball", "cup"))
        return [Proposal(vase), Proposal(ball), Proposal(cup, word="mug")]


class PlainLearner:
    """A random walk from the word's embedding: it depends on every step before it, as learning does."""

    class Settings(ComponentSettings):
        """How long."""

        steps: int = Field(20, ge=1, description="steps of the walk")
        rate: float = Field(0.1, gt=0, description="length of a step")
        pause: float = Field(
            0.0, ge=0, description="seconds to wait after each step", json_schema_extra=CHANGES_NO_RESULT
        )
        fail_at: int | None = Field(None, description="a step to fail at")

    def __init__(self, settings: Settings, backbone: PlainBackbone) -> None:
        self.settings = settings

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        tokens = {
            token: embedding_of(region.word) + region.mask.float().mean()
            for region in regions
            for token in token_names(region, attributes).values()
        }
        generator, done = torch.Generator().manual_seed(seed), 0
        if saved := checkpoint.load():
            tensors, state = saved
            generator.set_state(tensors.pop("generator"))
            # A file keeps no order, and the walk goes from token to token.
            tokens, done = {token: tensors[token] for token in tokens}, state["step"]
        for step in range(done + 1, self.settings.steps + 1):
            if step == self.settings.fail_at:
                raise ValueError("two\nlines")
            for row in tokens.values():
                row += self.settings.rate * torch.randn(row.shape, generator=generator)
            on_step(Step(step, self.settings.steps, "walk", {"total": 1 / step}))
            if step % 5 == 0:
                checkpoint.save(tokens | {"generator": generator.get_state()}, {"step": step})
            time.sleep(self.settings.pause)
        return Learned({token: {ENCODER: row} for token, row in tokens.items()})


class OneTokenLearner(PlainLearner):
    """A token for the instance, and nothing else."""

    parts = ("instance",)

    def learn(self, *arguments: Any, **options: Any) -> Learned:
        tokens = super().learn(*arguments, **options).tokens
        return Learned({token: row for token, row in tokens.items() if token.endswith("-instance>")})


class Named:
    """Whether the colour's token was named."""

    class Settings(ComponentSettings):
        """There are none."""

    columns: Mapping[str, Column] = {"named": Column("colour tokens that were named")}
    needs: Collection[str] = ()

    def __init__(self, settings: Settings, backbone: PlainBackbone) -> None:
        pass

    def prepare(self, images: Sequence[BenchImage]) -> None: ...

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        if "colour" not in outcome.attributes:
            return {}
        named = [float(bool(match.found and match.found.words["colour"])) for match in outcome.matches]
        return {"named": Score(sum(named) / len(named))}


class Looked(Named):
    """Whether images that are generated have the shape of the source."""

    columns: Mapping[str, Column] = {"looked": Column("images of the right shape")}

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        images = outcome.generate("a photo of a cup")
        shape = tuple(outcome.image.pixels.shape[1:])
        return {"looked": Score(sum(one.size[::-1] == shape for one in images) / len(images), ("a photo of a cup",))}


class PlainExporter:
    """A text file for each concept."""

    class Settings(ComponentSettings):
        """There are none."""

    def __init__(self, settings: Settings) -> None:
        pass

    def files(self, extraction: Extraction) -> Sequence[str]:
        return [f"words/{concept.index}-{concept.label}.txt" for concept in extraction.concepts]

    def export(self, extraction: Extraction, folder: Path) -> None:
        (folder / "words").mkdir()
        for name, concept in zip(self.files(extraction), extraction.concepts, strict=True):
            (folder / name).write_text(concept.label)


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("plain", PlainExporter)


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    register("seen", Named)
    register("looked", Looked)


@hookimpl
def register_presets(register: Callable[[str, Path], None]) -> None:
    register("plain", Path(__file__).parent / "plain.toml")


@hookimpl
def register_backbones(register: Callable[[str, type], None]) -> None:
    register("plain", PlainBackbone)


@hookimpl
def register_retrievers(register: Callable[[str, type], None]) -> None:
    register("plain", PlainRetriever)
    register("describing", DescribingRetriever)
    register("embedding", EmbeddingRetriever)


@hookimpl
def register_segmentors(register: Callable[[str, type], None]) -> None:
    register("plain", PlainSegmentor)
    register("proposing", ProposingSegmentor)


@hookimpl
def register_learners(register: Callable[[str, type], None]) -> None:
    register("plain", PlainLearner)
    register("one-token", OneTokenLearner)


OPTIONS = [f"--{role}=plain" for role in ("backbone", "retriever", "segmentor", "learner")]
"""Command-line options that choose these components."""


def write_distribution(folder: Path, module: str, source: str, *, name: str, version: str = "1.0") -> Path:
    """An installed distribution with one module and one entry point for icekit, in a folder for ``PYTHONPATH``."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[icekit]\n{module} = {module}\n")
    (folder / f"{module}.py").write_text(source)
    return folder


def beside_builtins(**plugins: Any) -> Plugins:
    """The built-ins and these plugins by name; without any, the plain one."""
    from icekit import builtin

    found = Plugins()
    for name, plugin in (plugins or {"plain": sys.modules[__name__]}).items():
        found.add(Origin(name, f"{name}-plugin", "1.0"), lambda plugin=plugin: plugin)  # type: ignore[misc]
    found.add(Origin("builtin", "icekit", "0"), lambda: builtin)
    return found
