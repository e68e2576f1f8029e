"""What the conformance checks are run on, one class a kind of component. Made without torch, built when checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from icekit.protocols import Attribute, Backbone, ComponentSettings
    from icekit.testing.scenes import Scene

Kind = Literal[
    "attribute", "retriever", "segmentor", "learner", "backbone", "metric", "dataset", "exporter", "executor"
]
"""The kinds of components that there are checks for."""

Values = Mapping[str, Any]
"""Settings, as a settings file has them."""


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    name: the check's. holds: what must hold. outcome: whether it does. found: what was found instead, or why it was
    skipped; empty when it passed.
    """

    name: str
    holds: str
    outcome: Literal["passed", "failed", "skipped"]
    found: str


@dataclass
class AttributeUnderTest:
    """An attribute, and the backbone whose words it is held against.

    backbone: None for the kit's own, of random weights, which takes any word.
    """

    kind: ClassVar[Kind] = "attribute"

    attribute: Attribute
    backbone: Backbone | None = None

    @property
    def label(self) -> str:
        """What it is called in a list of tests."""
        return str(getattr(self.attribute, "name", self.attribute))

    def on(self) -> Backbone:
        """The backbone to check it on."""
        return self.backbone or kit_backbone()


@dataclass
class ComponentUnderTest:
    """A class of components with the settings that it is checked with.

    component: the class, as it is registered.
    settings: as in a settings file; or a function of a ``scenes.Scene`` that makes them, for a component that is about
        one picture: it may write files for it.
    name: what it is called in a list of tests; the class's name by default.
    """

    kind: ClassVar[Kind]
    quick: ClassVar[Values] = {}
    """Values that keep the checks short, of settings that the component has and that nobody gave."""

    component: type
    settings: Values | Callable[[Scene], Values] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """What it is called in a list of tests."""
        return self.name or getattr(self.component, "__name__", repr(self.component))

    def settings_for(self, scene: Scene) -> ComponentSettings:
        """Its settings for a picture, validated."""
        from icekit.settings import validate

        model: type[ComponentSettings] = self.component.Settings  # type: ignore[attr-defined]
        given = self.settings(scene) if callable(self.settings) else self.settings
        quick = {key: value for key, value in self.quick.items() if key in model.model_fields}
        return validate(model, {**quick, **given}, prefix=f"{self.kind}.")


@dataclass
class OnBackbone(ComponentUnderTest):
    """A component that is built on a backbone.

    backbone: of a small model, on the CPU and in float32; None for the kit's own, of random weights.
    """

    backbone: Backbone | None = None

    def on(self, size: tuple[int, int] | None = None) -> Backbone:
        """The backbone to check it on; size: the pictures' (height, width), where it is the kit's own."""
        return self.backbone or kit_backbone(size)

    def build(self, scene: Scene, backbone: Backbone | None = None) -> Any:
        """The component, new, with its settings for this picture; on the backbone for pictures of that size."""
        return self.component(self.settings_for(scene), backbone or self.on(scene.size))

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of pictures that are not square, wide and tall.

        Raises:
            SkipTest: the backbone was handed in, and takes another size.
        """
        if self.backbone is None:
            return [(64, 96), (96, 64)]
        height, width = self.backbone.image_size
        if height == width:
            from unittest import SkipTest

            raise SkipTest(f"the backbone that was handed in takes pictures of {height} x {width} pixels alone")
        return [(height, width)]


@dataclass
class RetrieverUnderTest(OnBackbone):
    """A retriever."""

    kind: ClassVar[Kind] = "retriever"


@dataclass
class SegmentorUnderTest(OnBackbone):
    """A segmentor, or a ``Proposer``."""

    kind: ClassVar[Kind] = "segmentor"


@dataclass
class LearnerUnderTest(OnBackbone):
    """A learner. It learns from four steps, saving after each, where it has the settings of ``icekit.learning``."""

    kind: ClassVar[Kind] = "learner"
    quick: ClassVar[Values] = {"steps": 4, "checkpoint_every": 1, "prior_images": 2, "prior_steps": 1}
    quickest: ClassVar[Values] = {"steps": 2}
    """Where nothing but the form of what is learned is looked at."""

    def shorter(self) -> LearnerUnderTest:
        """The same with as few steps as there can be."""
        given = self.settings

        def values(scene: Scene) -> Values:
            model = self.component.Settings  # type: ignore[attr-defined]
            few = {key: value for key, value in self.quickest.items() if key in model.model_fields}
            return {**few, **(given(scene) if callable(given) else given)}

        return replace(self, settings=values)


@dataclass
class MetricUnderTest(OnBackbone):
    """A metric.

    words: what the objects of the pictures are called, for a metric that knows few words.
    attributes: attribute -> true words that objects have in turn, for a metric that needs others than a colour, a
        material and a texture.
    """

    kind: ClassVar[Kind] = "metric"

    words: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass
class DatasetUnderTest(ComponentUnderTest):
    """A data set. settings: a function of a scene can write a folder for it.

    count: pictures that it is asked for; it must have so many.
    """

    kind: ClassVar[Kind] = "dataset"

    count: int = 2


@dataclass
class ExporterUnderTest(ComponentUnderTest):
    """An exporter."""

    kind: ClassVar[Kind] = "exporter"


@dataclass
class ExecutorUnderTest(ComponentUnderTest):
    """An executor. It has two workers, on the CPU."""

    kind: ClassVar[Kind] = "executor"
    quick: ClassVar[Values] = {"workers": 2}


@dataclass
class BackboneUnderTest:
    """A backbone, and what its checks have to know of it. A family that differs more overrides a method.

    backbone: on the CPU and in float32, of a small model.
    reference: the diffusers pipeline of the same model, loaded apart, with the scheduler that the backbone samples
        with; None leaves out what is compared with it.
    words: two words of the prompt below that the text encoders were made for; one piece each is best.
    prompt: plain words, among them both.
    steps: denoising steps of the pictures that are compared.
    guidance_scale: how strongly the prompt is followed in them.
    encoders: name of a text encoder -> the pipeline's names of its tokenizer and its model.
    call: further arguments of the pipeline's call.
    unguided: the pipeline's ``guidance_scale`` that turns guidance off.
    takes_space: whether the space before a token is part of it: ``AddedToken(..., lstrip=True)``.
    """

    kind: ClassVar[Kind] = "backbone"

    backbone: Backbone
    reference: Any = None
    words: tuple[str, str] = ("cup", "table")
    prompt: str = "a photo of a cup on a table"
    steps: int = 3
    guidance_scale: float = 5.0
    encoders: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    unguided: float = 1.0
    takes_space: bool = False

    def __post_init__(self) -> None:
        if not self.encoders and len(self.backbone.rows) == 1:
            self.encoders = dict.fromkeys(self.backbone.rows, ("tokenizer", "text_encoder"))

    @property
    def label(self) -> str:
        """What it is called in a list of tests."""
        return type(self.backbone).__name__

    @property
    def denoiser(self) -> Any:
        """The reference's noise predictor."""
        return getattr(self.reference, "unet", None) or self.reference.transformer

    def share_of(self, timestep: float) -> float:
        """The share of the schedule at which the pipeline tells its noise predictor this time."""
        return timestep / self.reference.scheduler.config.num_train_timesteps

    def call_of(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, float]:
        """What the pipeline hands to its noise predictor: noisy latents as the backbone has them, and the time."""
        import torch

        noisy = arguments[0] if arguments else named.get("hidden_states", named.get("sample"))
        timestep = arguments[1] if len(arguments) > 1 else named["timestep"]
        return self.latents_of(noisy), float(torch.as_tensor(timestep).flatten()[0])

    def latents_of(self, latents: Any) -> Tensor:
        """The pipeline's latents ``[B, ...]`` as the backbone has them, ``[B, C, h, w]``: its may be packed."""
        import torch

        return torch.as_tensor(latents)

    def output_of(self, returned: Any) -> Tensor:
        """What the noise predictor returns to the pipeline, as the backbone's prediction ``[B, C, h, w]``."""
        return self.latents_of(returned[0])

    def returned(self, prediction: Tensor) -> Any:
        """What the noise predictor would return to the pipeline: ``output_of`` the other way round."""
        return (prediction,)

    def load_token(self, name: str, file: Path) -> None:
        """Load a token's file, as a run directory has it, into the reference: as a user of the pipeline does."""
        from safetensors.torch import load_file

        if len(self.backbone.rows) == 1 and hasattr(self.reference, "load_textual_inversion"):
            self.reference.load_textual_inversion(str(file))
            return
        rows = load_file(file)
        if len(self.backbone.rows) == 1:  # a lone row is kept by the token's name
            rows = dict(zip(self.backbone.rows, rows.values(), strict=True))
        for encoder, row in rows.items():
            self.add_row(name, encoder, row)

    def add_row(self, name: str, encoder: str, row: Tensor) -> None:
        """What diffusers' ``load_textual_inversion`` does with a row, for a pipeline that does not have it."""
        from tokenizers import AddedToken

        assert encoder in self.encoders, f"BackboneUnderTest.encoders does not say where {encoder} is"
        tokenizer, model = (getattr(self.reference, part) for part in self.encoders[encoder])
        tokenizer.add_tokens(AddedToken(name, normalized=False, lstrip=self.takes_space))
        place = tokenizer.convert_tokens_to_ids(name)
        model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
        model.get_input_embeddings().weight.data[place] = row

    def reference_picture(self, prompt: str, seed: int, **others: Any) -> Image.Image:
        """The picture that the pipeline makes by itself; others: arguments of its call that are to be different."""
        import torch

        self.reference.set_progress_bar_config(disable=True)
        height, width = self.backbone.image_size
        arguments = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(seed),
            **self.call,
            **others,
        }
        return self.reference(**arguments).images[0]


Subject = AttributeUnderTest | ComponentUnderTest | BackboneUnderTest
"""What a check can be run on."""


def kit_backbone(size: tuple[int, int] | None = None) -> Backbone:
    """``tiny.tiny_backbone`` for pictures of this (height, width), 64 pixels by default; made once a process."""
    return _made_once(size or (64, 64))


@functools.cache
def _made_once(size: tuple[int, int]) -> Backbone:
    from icekit.testing.tiny import tiny_backbone

    return tiny_backbone(size)


_METHODS: Mapping[str, type[ComponentUnderTest]] = {
    "retrieve": RetrieverUnderTest,
    "segment": SegmentorUnderTest,
    "propose": SegmentorUnderTest,
    "learn": LearnerUnderTest,
    "measure": MetricUnderTest,
    "pictures": DatasetUnderTest,
    "export": ExporterUnderTest,
    "execute": ExecutorUnderTest,
}
"""The method that tells what kind of component a class is."""


def as_subject(given: Any, kind: Kind | None = None) -> Subject:
    """A subject as it is, an attribute, or a class of components with its default settings.

    kind: that it must be; None: its methods tell.

    Raises:
        TypeError: it is nothing that there are checks for, or of another kind.
    """
    subject = _as_any_subject(given, kind)
    if kind is not None and subject.kind != kind:
        raise TypeError(f"{subject.label} is a {subject.kind}: use check_{subject.kind}, not check_{kind}")
    return subject


def _as_any_subject(given: Any, kind: Kind | None) -> Subject:
    from icekit.protocols import Attribute

    if isinstance(given, AttributeUnderTest | ComponentUnderTest | BackboneUnderTest):
        return given
    if isinstance(given, Attribute) or kind == "attribute":
        return AttributeUnderTest(given)
    if not isinstance(given, type):
        raise TypeError(f"{given!r} is no component: give its class, an Attribute, or a ...UnderTest of icekit.testing")
    if kind == "backbone" or hasattr(given, "predict"):
        raise TypeError(f"{given.__name__} needs a model: give icekit.testing.BackboneUnderTest(backbone, ...)")
    for one in _METHODS.values():
        if one.kind == kind:  # what it lacks is for a check to say
            return one(given)
    for method, one in _METHODS.items():
        if callable(getattr(given, method, None)):
            return one(given)
    raise TypeError(f"{given.__name__} has no method of a component: one of {', '.join(_METHODS)}")
