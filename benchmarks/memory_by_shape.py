"""What a step of learning holds beside the weights, counted by shapes: ``python benchmarks/memory_by_shape.py``.

For models that no device at hand can hold. The noise predictor and the text encoders have their true size, and are
PyTorch's fake tensors, which have shapes and no numbers. icekit's own backbone predicts with them, two concepts in one
pass, in bfloat16, and its attention is read; then the gradient is computed. Counted are the bytes of all storages that
are alive, the weights not among them; noted is the most there were at once (of the text encoders, what they hold for
the gradient). What is left out: work space of kernels, the allocator's rounding, AdamW, the texts of the triplets.

Each family is counted with gradient checkpointing and without. Beside it stands what ``benchmarks/memory.json`` has
measured of such a step, where it has.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import icekit_dit.flux2_klein
import torch
from icekit_dit.llm_encoder import PaddedLanguageModel
from memory import FAMILIES, GIB, Maker
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import icekit.backbones.pipeline
from icekit.backbones.text_encoder import TextEncoder
from icekit.protocols import Conditioning, Look

PROMPTS = ["a photo of a cup", "a photo of a ball"]
MEASURED = Path(__file__).with_name("memory.json")
CPU = torch.device("cpu")
DEPTH = 2
"""How many layers of a text encoder really run, to say of which shape prompts are."""
READ = max(icekit_dit.flux2_klein.LAYERS)
"""How many layers FLUX.2-klein reads of its own: what those after them hold goes at once."""


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are born in the block and alive: ``now``, and ``most`` so far."""

    def __init__(self, *weights: nn.Module) -> None:
        """weights: modules whose parameters and buffers do not count."""
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for module in weights:
            for tensor in (*module.parameters(), *module.buffers()):
                self._is_new(tensor)

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known() is not None:
            return False
        self._known[storage._cdata] = weakref.ref(storage)
        return True

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._is_new(tensor):
                storage = tensor.untyped_storage()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result


class ByShape:
    """Makes a pipeline as ``Maker`` does, with a fake noise predictor and text encoders of few layers.

    predictors: the fake ones. texts: the text encoders as they should be, fake, without a head, by the width of their
    rows.
    """

    predictor = text = torch.bfloat16

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self.predictors: list[Any] = []
        self.texts: dict[int, Any] = {}

    def part(self, make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
        """See ``Maker``."""
        nowhere, here = (
            Maker(torch.device(device), self.predictor, self.text, waiting=False) for device in ("meta", "cpu")
        )
        whole = nowhere.part(make, dtype)
        if hasattr(whole, "get_input_embeddings"):
            shallow = copy.deepcopy(whole.config)
            for count in ("num_layers", "num_hidden_layers"):
                if hasattr(shallow, count):
                    setattr(shallow, count, min(getattr(shallow, count), DEPTH))
            self.texts[whole.get_input_embeddings().embedding_dim] = self.faked(getattr(whole, "model", whole))
            return here.part(lambda: type(whole)(shallow), dtype)
        if "2D" in type(whole).__name__:
            predictor = self.faked(whole)
            predictor.to = lambda *_, **__: predictor  # it is where it should be, and fake tensors cannot be moved
            self.predictors.append(predictor)
            return predictor
        return here.part(make, dtype)

    def faked(self, module: Any) -> Any:
        """The module, its parameters and buffers fake tensors."""
        with self.fake:
            for one in module.modules():
                for name, tensor in one._parameters.items():
                    if tensor is not None:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        one._parameters[name] = nn.Parameter(fake, requires_grad=False)
                for name, tensor in one._buffers.items():
                    if tensor is not None:
                        one._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return module.eval()


@contextmanager
def without_numbers() -> Iterator[None]:
    """Nothing is asked for its values until the block ends: fake tensors have none."""
    before = icekit.backbones.pipeline.check_finite
    icekit.backbones.pipeline.check_finite = lambda *_, **__: None
    try:
        yield
    finally:
        icekit.backbones.pipeline.check_finite = before


def all_positions(backbone: Any, prompts: Conditioning) -> list[Tensor]:
    """Z-Image's prompts with their padding: without, their lengths would be values."""
    return list(prompts.parts["sequence"].to(backbone.transformer.dtype))


def held_by(text: TextEncoder, whole: Any, fake: FakeTensorMode) -> int:
    """Bytes that a text encoder holds for the gradient of ``PROMPTS``.

    Args:
        text: the shallow one, which says how long they are.
        whole: the fake one.
        fake: its mode.
    """
    shape = text.token_ids(PROMPTS).shape
    if isinstance(text, PaddedLanguageModel):
        shape, whole.layers = (len(PROMPTS), text.length), whole.layers[:READ]
    tables = [one for one in whole.modules() if isinstance(one, nn.Embedding) and one.embedding_dim == text.dim]
    hooks = [one.register_forward_hook(lambda _module, _inputs, rows: rows.requires_grad_()) for one in tables]
    live = Live(whole)
    with fake, live:
        states = whole(torch.zeros(shape, dtype=torch.long)).last_hidden_state
        held = live.now
    del states
    for hook in hooks:
        hook.remove()
    return held


def step(backbone: Any, predictor: nn.Module, prompts: Conditioning, fake: FakeTensorMode, learning: bool) -> int:
    """The most bytes that predicting two pictures takes at once.

    learning: whether the attention is read and the gradient computed; otherwise it is a guided pass of drawing.
    """
    live = Live(predictor)
    with fake, live, torch.set_grad_enabled(learning):
        parts = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in prompts.parts.items()}
        for part in parts.values():
            part.requires_grad_(part.is_floating_point() and learning)
        noisy = torch.empty(len(PROMPTS), *backbone.latent_shape)
        shares = torch.full((len(PROMPTS),), 0.5)
        look = Look(words=(16,)) if learning else None
        prediction = backbone.predict(noisy, shares, replace(prompts, parts=parts), look)
        if learning:
            maps = sum((words**2).mean() for words in prediction.attention.words)
            ((prediction.output - noisy) ** 2).mean().add(maps).backward()
    return live.most


def count(family: str, checkpointing: bool) -> dict[str, Any]:
    """What a step of a family's learning holds, GiB, with gradient checkpointing or without."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    maker: Any = ByShape(fake)
    icekit_dit.flux2_klein.LAYERS = (1, 1, DEPTH)  # as many states of a prompt as it reads
    family_kind, pipeline = FAMILIES[family](maker)
    kind: Any = type(
        family_kind.__name__, (family_kind,), {"_try_out": lambda _self, _named: None, "_captions": all_positions}
    )
    settings = kind.Settings(model=family, gradient_checkpointing=checkpointing)
    backbone = kind.from_pipeline(pipeline, CPU, settings)
    [predictor] = maker.predictors
    texts = [(text, maker.texts[text.dim]) for text in backbone._texts.values()]
    with torch.no_grad():
        prompts = backbone.encode_prompts(PROMPTS)
    with without_numbers():
        found = {
            "predictor": step(backbone, predictor, prompts, fake, learning=True) / GIB,
            "texts": sum(held_by(*text, fake) for text in texts) / GIB,
            "drawing": step(backbone, predictor, prompts, fake, learning=False) / GIB,
        }
    found["step"] = found["predictor"] + found["texts"]
    found |= measured(family, "checkpointing" if checkpointing else "auto")
    million = math.prod(backbone.image_size) / 1e6
    found["step_a_million_pixels"] = found["step"] / len(PROMPTS) / million
    found["drawing_a_million_pixels"] = found["drawing"] / million
    return {"family": family, "checkpointing": checkpointing} | {name: round(one, 2) for name, one in found.items()}


def measured(family: str, setting: str) -> dict[str, float]:
    """What a step of the first phase, and a guided pass, took on a device beyond what the model holds, where known."""
    for row in json.loads(MEASURED.read_text()):
        if (row["family"], row["setting"]) == (family, setting) and "held_gib" in row:
            peaks = {f"measured_{name}": row["phases"].get(phase, {}).get("peak_gib")
                     for name, phase in (("step", "step"), ("drawing", "pass"))}  # fmt: skip
            return {name: peak - row["held_gib"] for name, peak in peaks.items() if peak}
    return {}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(sorted(FAMILIES)), help="Count this; give it once for each.")
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the counts there, too.")
def main(only: tuple[str, ...], out: Path | None) -> None:
    """Count what a step of learning holds beside the weights."""
    rows = []
    for family in only or FAMILIES:
        for checkpointing in (False, True):
            rows.append(count(family, checkpointing))
            print(rows[-1], flush=True)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
