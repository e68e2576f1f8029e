"""What a backbone says of itself."""

from __future__ import annotations

import inspect
from typing import get_args

from icekit.protocols import Backbone, Capability, Look, PosteriorBackbone, Trained
from icekit.testing.asserting import generator_of, refused
from icekit.testing.backbone.common import lacks_of, predicted_by
from icekit.testing.subjects import BackboneUnderTest


def it_offers_everything(subject: BackboneUnderTest) -> None:
    """Every method of ``protocols.Backbone`` is there and takes the same arguments; every fact is there."""
    backbone = subject.backbone
    for name, member in vars(Backbone).items():
        if name.startswith("_") or not inspect.isfunction(member):
            continue
        assert callable(getattr(backbone, name, None)), f"there is no method {name}"
        wanted = list(inspect.signature(member).parameters.values())[1:]
        given = list(inspect.signature(getattr(backbone, name)).parameters.values())
        assert [(one.name, one.kind) for one in given[: len(wanted)]] == [(one.name, one.kind) for one in wanted], (
            f"{name} takes {', '.join(one.name for one in given)}; it must take {', '.join(one.name for one in wanted)}"
        )
        for one, other in zip(given, wanted, strict=False):
            assert other.default is one.empty or one.default is not one.empty, f"{name}: {one.name} has no default"
        for one in given[len(wanted) :]:
            assert one.default is not one.empty, f"{name} needs {one.name}, which nobody will give it"
    for name in Backbone.__annotations__:
        assert hasattr(backbone, name), f"there is no {name}"


def its_facts_are_consistent(subject: BackboneUnderTest) -> None:
    """Sizes, rows, grids and names are of the right types; grids come finest first."""
    backbone = subject.backbone
    assert _is_size(backbone.image_size), f"image_size is {backbone.image_size!r}, not (height, width)"
    shape = backbone.latent_shape
    assert len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape), (
        f"latent_shape is {shape!r}, not (C, h, w)"
    )
    assert backbone.rows, "rows is empty: a token has a row for at least one text encoder"
    for name, length in backbone.rows.items():
        assert isinstance(length, int) and length > 0, f"rows[{name!r}] is {length!r}, not the length of a row"
    assert isinstance(backbone.identity, str) and backbone.identity, f"identity is {backbone.identity!r}, not a text"
    for kind, grids in (("word_grids", backbone.word_grids), ("pixel_grids", backbone.pixel_grids)):
        assert isinstance(grids, tuple) and all(_is_size(grid) for grid in grids), (
            f"{kind} is {grids!r}, not a tuple of (height, width)"
        )
        assert len(set(grids)) == len(grids), f"{kind} has a grid twice: {grids}"
        assert list(grids) == sorted(grids, key=min, reverse=True), f"{kind} is not finest first: {grids}"
    lacks = lacks_of(backbone)
    assert lacks <= set(get_args(Capability)), f"lacks names {sorted(lacks - set(get_args(Capability)))}: no capability"
    preset = getattr(backbone, "preset", None)
    assert preset is None or isinstance(preset, str), f"preset is {preset!r}, not the name of a preset"


def what_it_lacks_is_true(subject: BackboneUnderTest) -> None:
    """What is in ``lacks`` is refused with an InputError, and what is not in it is there."""
    backbone = subject.backbone
    lacks = lacks_of(backbone)
    for capability, grids, look in (
        ("attention", backbone.word_grids, Look(words=(16,))),
        ("similarity", backbone.pixel_grids, Look(pixels=(16,))),
    ):
        if capability not in lacks:
            assert grids, f"it has no grid for {look}, and does not say that it lacks {capability!r}"
            continue
        assert not grids, f"it lacks {capability!r}, and has grids for it: {grids}"
        refused(f"{look} of a family without {capability}", predicted_by, subject, look=look)
    if "fine_tuning" in lacks:
        for trained in get_args(Trained):
            refused(f"training {trained} of a family without fine_tuning", _trained_for_nothing, backbone, trained)
    has_posterior = isinstance(backbone, PosteriorBackbone)
    assert has_posterior == ("posterior" not in lacks), (
        f"it has {'a' if has_posterior else 'no'} method posterior, and lacks is {sorted(lacks)}"
    )


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)


def _trained_for_nothing(backbone: Backbone, trained: Trained) -> None:
    with backbone.fine_tuned(trained, 1, generator_of(0)):
        pass
