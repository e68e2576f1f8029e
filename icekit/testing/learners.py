"""The conformance checks of ``icekit.protocols.Learner``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import load, save
from torch import Tensor

from icekit.protocols import (
    ATTRIBUTES,
    Attribute,
    Backbone,
    InputError,
    Learned,
    Region,
    RunError,
    Step,
    parts_of,
    token_names,
)
from icekit.testing import components
from icekit.testing.asserting import (
    assert_backbone_unchanged,
    assert_number,
    assert_shape,
    kind_of,
    other_random_numbers,
    trace_of,
)
from icekit.testing.scenes import Scene, one_colour, one_pixel_object, ten_objects, two_objects
from icekit.testing.subjects import LearnerUnderTest

COLOUR = Attribute("colour", anchor="colour", vocabulary=("red", "blue", "green", "yellow"))
MATERIAL = Attribute("material", anchor="material", vocabulary=("metal", "rubber", "glass"))
TWO = (COLOUR, MATERIAL)
"""The attributes that are learned where nothing else is said."""
EIGHT = (
    *TWO,
    Attribute("texture", anchor="texture", vocabulary=("plain", "striped")),
    Attribute("size", anchor="big", vocabulary=("big", "small")),
    Attribute("age", anchor="new", vocabulary=("new", "clean")),
    Attribute("brightness", anchor="bright", vocabulary=("bright", "dark")),
    Attribute("quality", anchor="good", vocabulary=("good", "nice")),
    Attribute("form", anchor="shape", vocabulary=("cube", "ball")),
)
MOST_PLACES = 3
"""After how many steps learning is killed, and from how many saved states it goes on."""


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


class MemoryCheckpoint:
    """A checkpoint as a run's, in memory: tensors as safetensors, the state as JSON. It keeps every save.

    held: an earlier save to go on from.
    """

    def __init__(self, held: tuple[bytes, str] | None = None) -> None:
        self.saves: list[tuple[bytes, str]] = [] if held is None else [held]

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last save, as a file gives it back: the tensors are in no order."""
        if not self.saves:
            return None
        tensors, state = self.saves[-1]
        return load(tensors), json.loads(state)

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep this as a file would."""
        for name, tensor in tensors.items():
            assert isinstance(tensor, Tensor), f"the learner saved {kind_of(tensor)} as {name!r}; it should be a tensor"
        try:
            text = json.dumps(dict(state))
        except (TypeError, ValueError) as error:
            raise AssertionError(f"the learner saved a state that is no JSON: {error}") from error
        self.saves.append((save({name: one.detach().cpu().contiguous() for name, one in tensors.items()}), text))


@dataclass(frozen=True)
class Course:
    """One call of ``learn``: what was learned, the steps that were told, the states that were saved."""

    learned: Learned
    steps: list[Step]
    saves: list[tuple[bytes, str]]


def check_parts(subject: LearnerUnderTest) -> None:
    """``parts``, if it says so, is a selection of ``ALL_PARTS`` with ``"instance"``, ``"category"`` or both in it."""
    parts = getattr(subject.component, "parts", None)
    if parts is None:
        return
    assert isinstance(parts, tuple | list), f"parts is {kind_of(parts)}; it should be a tuple"
    strange = [part for part in parts if part not in ("category", "instance", ATTRIBUTES)]
    assert not strange, f"parts has {strange[0]!r}; it can have 'category', 'instance' and {ATTRIBUTES!r}"
    assert {"category", "instance"} & set(parts), "parts has neither 'category' nor 'instance': a concept needs one"


def check_tokens(subject: LearnerUnderTest) -> None:
    """The tokens of every concept, no more and no less: those of ``token_names`` that are among its ``parts``. Each has
    a row for every text encoder: finite, float32, on the CPU, of that encoder's length, without a gradient.
    """
    _are_tokens(subject, _scene(subject), _whole(subject).learned, TWO)


def check_rows_are_the_callers(subject: LearnerUnderTest) -> None:
    """No two tokens share memory: who changes one changes no other."""
    learned = _whole(subject).learned
    places: dict[int, str] = {}
    for name, token in learned.tokens.items():
        for row in token.values():
            other = places.setdefault(row.data_ptr(), name)
            assert other == name, f"the tokens {other} and {name} are one row in memory: clone it"


def check_steps(subject: LearnerUnderTest) -> None:
    """``on_step`` is called after every step: from 1 to a total that stays the same, each with finite losses."""
    steps = _whole(subject).steps
    if not steps:
        raise SkipTest("it makes no step")
    totals = {step.total for step in steps}
    assert len(totals) == 1, f"the total of steps changes: {sorted(totals)}"
    numbers = [step.step for step in steps]
    assert numbers == list(range(1, steps[0].total + 1)), (
        f"the steps told are {numbers}; they should be 1 to {steps[0].total}, each once"
    )
    for step in steps:
        assert isinstance(step, Step), f"on_step was called with {kind_of(step)}, no icekit.Step"
        assert isinstance(step.phase, str) and step.phase, f"the phase of step {step.step} is {step.phase!r}, no text"
        for name, loss in step.losses.items():
            assert_number(f"the loss {name!r} of step {step.step}", loss)


def check_same_seed_same_tokens(subject: LearnerUnderTest) -> None:
    """The same seed gives the same tokens and weights, bit for bit, whatever is random elsewhere."""
    with other_random_numbers(1):
        again = _learn(subject, _scene(subject))
    _are_equal(again.learned, _whole(subject).learned, "learned a second time from the same seed, under another global")


def check_another_seed_other_tokens(subject: LearnerUnderTest) -> None:
    """Another seed gives other tokens or weights."""
    whole, other = _whole(subject), _learn(subject, _scene(subject), seed=1)
    if _difference(other.learned, whole.learned) is None:
        if not whole.steps:
            raise SkipTest("it makes no step, and draws nothing")
        raise AssertionError("another seed learns the very same tokens and weights: draw what is random from the seed")


def check_killed_and_resumed(subject: LearnerUnderTest) -> None:
    """Killed after any step and resumed from what was saved, it ends with equal tokens and weights, bit for bit."""
    whole, scene, backbone = _whole(subject), _scene(subject), subject.on()
    if not whole.steps:
        raise SkipTest("it makes no step: there is nothing to resume")
    before, tried = trace_of(backbone), set[tuple[bytes, str]]()
    for place in _spread(len(whole.steps)):
        saved = MemoryCheckpoint()
        try:
            _learn(subject, scene, checkpoint=saved, kill_at=place)
        except Killed:
            pass
        else:
            raise AssertionError(f"it was killed after step {place}, and went on: it must not catch BaseException")
        assert_backbone_unchanged(backbone, before, f"learning was killed after step {place},")
        tried.update(saved.saves[-1:])
        _goes_on(subject, whole, saved, f"killed after step {place} and resumed")
    for place in _spread(len(whole.saves)):
        if (held := whole.saves[place - 1]) not in tried:
            _goes_on(subject, whole, MemoryCheckpoint(held), f"resumed from save {place} of {len(whole.saves)}")


def check_what_it_is_given(subject: LearnerUnderTest) -> None:
    """The image, the regions and the backbone are afterwards as they were, bit for bit."""
    backbone = subject.on()
    scene, before = _scene(subject), trace_of(backbone)
    image, regions = scene.image.clone(), scene.regions(TWO)
    with other_random_numbers(1):
        subject.build(scene, backbone).learn(
            image, regions, TWO, seed=0, checkpoint=MemoryCheckpoint(), on_step=lambda step: None
        )
    assert torch.equal(image, scene.image), "learn has changed the image"
    for region, as_it_was in zip(regions, scene.regions(TWO), strict=True):
        assert torch.equal(region.mask, as_it_was.mask), f"learn has changed the mask of {region.word!r}"
        assert region.hints == as_it_was.hints, f"learn has changed the hints of {region.word!r}"
    assert_backbone_unchanged(backbone, before, "learn")


def check_two_sided_pictures(subject: LearnerUnderTest) -> None:
    """Pictures need not be square."""
    scene = two_objects(subject.sizes()[0])
    _are_tokens(subject, scene, _learn(subject.shorter(), scene).learned, TWO)


def check_one_pixel(subject: LearnerUnderTest) -> None:
    """An object may be one pixel."""
    _learns_or_refuses(subject, one_pixel_object(subject.on().image_size), TWO, "an object of one pixel")


def check_empty_mask(subject: LearnerUnderTest) -> None:
    """A mask without a pixel is refused in one line, or its tokens are finite numbers like all others."""
    scene = _scene(subject)
    first, second = scene.concepts
    empty = Scene(scene.image, (first, replace(second, mask=torch.zeros_like(second.mask))))
    _learns_or_refuses(subject, empty, TWO, "an empty mask")


def check_one_colour(subject: LearnerUnderTest) -> None:
    """A picture may have one colour everywhere."""
    _learns_or_refuses(subject, one_colour(subject.on().image_size), TWO, "a picture of one colour")


def check_ten_concepts(subject: LearnerUnderTest) -> None:
    """Ten concepts are learned, or refused in one line before the first step."""
    _learns_or_refuses(subject, ten_objects(subject.on().image_size), TWO, "ten concepts")


def check_no_attributes(subject: LearnerUnderTest) -> None:
    """No attribute need be asked for."""
    scene = _scene(subject)
    _are_tokens(subject, scene, _learn(subject.shorter(), scene, ()).learned, ())


def check_eight_attributes(subject: LearnerUnderTest) -> None:
    """Eight attributes are learned, or refused in one line before the first step."""
    _learns_or_refuses(subject, _scene(subject), EIGHT, "eight attributes")


def check_no_hints(subject: LearnerUnderTest) -> None:
    """Regions that nobody described are learned, or refused in one line before the first step."""
    scene = _scene(subject)
    _learns_or_refuses(subject, scene, TWO, "regions without hints", scene.regions())


def check_nan_is_an_error(subject: LearnerUnderTest) -> None:
    """Where the noise predictor gives NaN a ``RunError`` says so, in one line; no tokens come back."""
    if not _whole(subject).steps:
        raise SkipTest("it makes no step")
    backbone: Any = copy.copy(subject.on())
    predict = backbone.predict

    def not_a_number(*arguments: Any, **named: Any) -> Any:
        prediction = predict(*arguments, **named)
        return replace(prediction, output=prediction.output * torch.nan)

    backbone.predict = not_a_number
    try:
        _learn(subject, _scene(subject), backbone=backbone)
    except RunError as error:
        assert "\n" not in str(error), f"the message is longer than a line: {str(error)!r}"
        return
    except Exception as error:
        raise AssertionError(
            f"where a loss becomes NaN there is a {type(error).__name__} ({error}); it should be an icekit.RunError"
        ) from error
    raise AssertionError("the noise predictor gives NaN, and tokens come back; there should be an icekit.RunError")


def _scene(subject: LearnerUnderTest) -> Scene:
    return two_objects(subject.on().image_size)


def _learn(
    subject: LearnerUnderTest,
    scene: Scene,
    attributes: Sequence[Attribute] = TWO,
    *,
    regions: Sequence[Region] | None = None,
    backbone: Backbone | None = None,
    checkpoint: MemoryCheckpoint | None = None,
    kill_at: int | None = None,
    seed: int = 0,
    steps: list[Step] | None = None,
) -> Course:
    """Learn a scene with a new instance, with deterministic kernels as in a run. ``Killed`` after a step.

    steps: where they are put, for a call that may not come back.
    """
    from icekit.run.models import reproducible

    told: list[Step] = [] if steps is None else steps
    checkpoint = checkpoint or MemoryCheckpoint()

    def on_step(step: Step) -> None:
        told.append(step)
        if step.step == kill_at:
            raise Killed

    with reproducible():
        learned = subject.build(scene, backbone).learn(
            scene.image.clone(),
            scene.regions(attributes) if regions is None else regions,
            attributes,
            seed=seed,
            checkpoint=checkpoint,
            on_step=on_step,
        )
    assert isinstance(learned, Learned), f"learn gives {kind_of(learned)}, no icekit.Learned"
    return Course(learned, told, checkpoint.saves)


def _whole(subject: LearnerUnderTest) -> Course:
    """The scene learned from the seed 0 without an interruption; once for all checks of a subject."""
    known: Course | None = subject.__dict__.get("_course")
    if known is None:
        known = subject.__dict__["_course"] = _learn(subject, _scene(subject))
    return known


def _are_tokens(subject: LearnerUnderTest, scene: Scene, learned: Learned, attributes: Sequence[Attribute]) -> None:
    """That these are the tokens of a scene's concepts, see ``check_tokens``."""
    rows = subject.on(scene.size).rows
    parts = parts_of(subject.component, [one.name for one in attributes])
    promised = [
        token for region in scene.regions() for part, token in token_names(region, attributes).items() if part in parts
    ]
    missing = [token for token in promised if token not in learned.tokens]
    more = [token for token in learned.tokens if token not in promised]
    told = f"its parts are {', '.join(parts)}, so the tokens should be {', '.join(promised)}"
    assert not missing, f"there is no token {missing[0]} ({len(missing)} are missing): {told}"
    assert not more, f"there is a token {more[0]} ({len(more)} too many): {told}"
    for name, token in learned.tokens.items():
        assert set(token) == set(rows), f"{name} has rows for {', '.join(token) or 'none'}, not for {', '.join(rows)}"
        for encoder, row in token.items():
            what = f"the row of {name} for {encoder}"
            assert isinstance(row, Tensor), f"{what} is {kind_of(row)}; it should be a tensor"
            assert_shape(what, row, (rows[encoder],))
            assert row.device.type == "cpu", f"{what} is on {row.device}; it should be on the CPU"
            assert not row.requires_grad, f"{what} requires a gradient: detach it"
    for key, weight in {**learned.tuning.lora, **learned.tuning.weights}.items():
        finite = not weight.is_floating_point() or bool(weight.isfinite().all())
        assert finite, f"the weight {key} has numbers that are not finite"


def _learns_or_refuses(
    subject: LearnerUnderTest,
    scene: Scene,
    attributes: Sequence[Attribute],
    what: str,
    regions: Sequence[Region] | None = None,
) -> None:
    """That these tokens are learned, or refused with an InputError in one line before the first step."""
    steps: list[Step] = []
    try:
        course = _learn(subject.shorter(), scene, attributes, regions=regions, steps=steps)
    except InputError as error:
        assert "\n" not in str(error), f"the message is longer than a line: {str(error)!r}"
        assert not steps, f"{what}: refused after {len(steps)} steps, not before the first: {error}"
        return
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"{what}: {type(error).__name__}: {error}; it should be learned, or refused with an icekit.InputError"
        ) from error
    _are_tokens(subject, scene, course.learned, attributes)


def _goes_on(subject: LearnerUnderTest, whole: Course, saved: MemoryCheckpoint, how: str) -> None:
    """That learning from a saved state ends as it did without an interruption."""
    resumed = _learn(subject, _scene(subject), checkpoint=saved)
    _are_equal(resumed.learned, whole.learned, how)
    last = [step.step for step in whole.steps]
    numbers = [step.step for step in resumed.steps]
    assert numbers == last[len(last) - len(numbers) :], (
        f"{how} it tells of the steps {numbers}; they should be the last of {last[0]} to {last[-1]}"
    )


def _spread(count: int) -> list[int]:
    """At most ``MOST_PLACES`` of the numbers from 1 to ``count``: the first, the last, those between."""
    if count <= MOST_PLACES:
        return list(range(1, count + 1))
    return sorted({1 + round(place * (count - 1) / (MOST_PLACES - 1)) for place in range(MOST_PLACES)})


def _are_equal(learned: Learned, expected: Learned, how: str) -> None:
    difference = _difference(learned, expected)
    assert difference is None, f"{how}: {difference}; it should end with equal tokens, bit for bit"


def _difference(learned: Learned, expected: Learned) -> str | None:
    """In what two results differ, the first such thing; None where they are equal bit for bit."""
    one, other = _tensors(learned), _tensors(expected)
    if one.keys() != other.keys():
        return f"{sorted(one.keys() ^ other.keys())[0]} is in one of them alone"
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            same_shape = tensor.shape == other[name].shape
            off = float((tensor - other[name]).detach().float().abs().max()) if same_shape else 0
            return f"{name} differs" + (f" by up to {off:.3g}" if off else "")
    return None


def _tensors(learned: Learned) -> dict[str, Tensor]:
    rows = {f"{name} ({encoder})": row for name, token in learned.tokens.items() for encoder, row in token.items()}
    return {**rows, **learned.tuning.lora, **learned.tuning.weights}


CHECKS = (
    *components.CHECKS,
    check_parts,
    check_tokens,
    check_rows_are_the_callers,
    check_steps,
    check_no_attributes,
    check_no_hints,
    check_one_pixel,
    check_empty_mask,
    check_one_colour,
    check_nan_is_an_error,
    check_what_it_is_given,
    check_same_seed_same_tokens,
    check_another_seed_other_tokens,
    check_eight_attributes,
    check_ten_concepts,
    check_two_sided_pictures,
    check_killed_and_resumed,
)
"""All checks of a learner, cheap ones first."""
