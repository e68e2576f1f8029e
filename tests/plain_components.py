"""The plainest components that satisfy the protocols, as a plugin: they make runs of milliseconds for tests.

The world they know: an image of 32 x 32 pixels is four quadrants, each one thing of one word.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from icekit import hookimpl
from icekit.protocols import (
    Attribute,
    BenchImage,
    Candidate,
    Checkpoint,
    Column,
    ComponentSettings,
    Conditioning,
    Learned,
    Outcome,
    Proposal,
    Region,
    Score,
    Step,
    View,
    token_names,
)

SIDE, DIM = 32, 8
WORDS = ("cup", "red bowl", "vase", "ball")


def embedding_of(text: str) -> Tensor:
    """A fixed random vector ``[DIM]`` for a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed))


class PlainMaps:
    def cross(self, resolution: int) -> Tensor:
        maps = torch.rand(1, 16, resolution, resolution, generator=torch.Generator().manual_seed(0))
        return maps / maps.sum(dim=1, keepdim=True)


class PlainBackbone:
    """Words are vectors, images are latents."""

    class Settings(ComponentSettings):
        """Which model."""

        model: str = Field("plain", description="its name")

    image_size = SIDE
    latent_shape = (3, SIDE, SIDE)
    embedding_dim = DIM
    num_timesteps = 100
    attention_resolutions = (16, 8, 4)
    suggestions: Mapping[str, Any] = {"min_visible": 0.05, "learner.rate": 0.5, "retriever.strange": 1}

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device, self.rows = settings, device, {}
        self.unet = torch.nn.Identity()

    def knows(self, word: str) -> bool:
        return word != "maroon"

    def set_tokens(self, rows: Mapping[str, Tensor]) -> None:
        self.rows = dict(rows)

    def word_embedding(self, word: str, pieces: str = "mean") -> Tensor:
        return embedding_of(word)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pooled = []
        for prompt in prompts:
            words = prompt.split()
            assert all(word in self.rows for word in words if word.startswith("<")), prompt
            pooled.append(sum(self.rows[word] if word in self.rows else embedding_of(word) for word in words))
        stacked = torch.nn.functional.normalize(torch.stack(pooled), dim=-1)
        return Conditioning(stacked[:, None], stacked)

    def embed_texts(self, texts: Sequence[str], pool: str = "end") -> Tensor:
        return self.encode_prompts(texts).pooled

    def token_positions(self, prompt: str, words: Sequence[str]) -> list[list[int]]:
        return [[prompt.split().index(word)] for word in words]

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents + noise

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return noisy

    @contextmanager
    def capture_attention(
        self, cross: Collection[int] = (), self_: Collection[int] = (), places: Collection[str] = ("down", "mid", "up")
    ) -> Iterator[PlainMaps]:
        yield PlainMaps()

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> list[Image.Image]:
        colours = (self.encode_prompts(prompts).pooled[:, :3].clamp(0, 1) * 255).int().tolist()
        return [
            Image.new("RGB", (SIDE, SIDE), (*colour[:2], seed % 256))
            for colour, seed in zip(colours, seeds, strict=True)
        ]


class PlainRetriever:
    """Says the words of the quadrants that are still visible, and "ghost" first of all."""

    class Settings(ComponentSettings):
        """Which words."""

        ghosts: int = Field(1, ge=0, description="how many words to say that are nowhere")

    def __init__(self, settings: Settings, backbone: PlainBackbone) -> None:
        self.settings = settings

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        ghosts = [f"ghost {number}" for number in range(self.settings.ghosts)]
        seen = [word for word in WORDS if bool((quadrant(word) & view.visible).any())]
        return [Candidate(word, 0.5) for word in [*ghosts, *seen] if word not in used]


class DescribingRetriever(PlainRetriever):
    """Sees an attribute's first two words in everything."""

    def describe(self, view: View, noun: str, words: Sequence[str]) -> Mapping[str, float]:
        return {words[0]: 0.75, words[1]: 0.25}


def quadrant(word: str) -> Tensor:
    """The word's quadrant, bool ``[SIDE, SIDE]``."""
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    if word in WORDS:
        row, column = divmod(WORDS.index(word), 2)
        mask[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = True
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
        kept = torch.rand(SIDE, SIDE, generator=generator) < 0.97
        return quadrant(word) & view.visible & kept


class ProposingSegmentor:
    """Knows three masks before it is asked for any word, and the word of the last."""

    Settings = PlainSegmentor.Settings

    def __init__(self, settings: PlainSegmentor.Settings, backbone: PlainBackbone) -> None:
        pass

    def propose(self, image: Tensor) -> list[Proposal]:
        return [Proposal(quadrant("vase")), Proposal(quadrant("ball")), Proposal(quadrant("cup"), word="mug")]


class PlainLearner:
    """A random walk from the word's embedding: it depends on every step before it, as learning does."""

    class Settings(ComponentSettings):
        """How long."""

        steps: int = Field(20, ge=1, description="steps of the walk")
        rate: float = Field(0.1, gt=0, description="length of a step")
        pause: float = Field(0.0, ge=0, description="seconds to wait after each step")
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
            if step % 5 == 0:
                checkpoint.save(tokens | {"generator": generator.get_state()}, {"step": step})
            on_step(Step(step, self.settings.steps, "walk", {"total": 1 / step}))
            time.sleep(self.settings.pause)
        return Learned(tokens)


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


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    register("seen", Named)


@hookimpl
def register_backbones(register: Callable[[str, type], None]) -> None:
    register("plain", PlainBackbone)


@hookimpl
def register_retrievers(register: Callable[[str, type], None]) -> None:
    register("plain", PlainRetriever)
    register("describing", DescribingRetriever)


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
