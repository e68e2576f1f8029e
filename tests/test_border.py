"""What a component returns is checked where it comes in: whose it is, what it was and what is right is said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import torch
from icekit_process import Call, in_this_process
from PIL import Image

from icekit import extract
from icekit.plugins import BreachError
from icekit.protocols import (
    BenchPicture,
    Candidate,
    InputError,
    Learned,
    Proposal,
    RunError,
    Score,
    Segmentation,
    Step,
    TrueConcept,
)
from icekit.settings import load_settings

MASK = plain.quadrant("cup")
WHOSE = "of plugin 'plain' (plain-plugin 1.0)"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def breach(photo: Path, **given: Any) -> str:
    """The message with which a run ends, one line; nothing is complete."""
    components = plain.NAMES | given.pop("components", {})
    settings = load_settings(options={"components": components, "samples": 1, "retriever": {"ghosts": 0}} | given)
    run = photo.parent / "run"
    with pytest.raises(BreachError) as error:
        extract(photo, run, settings, installed=plain.beside_builtins(), overwrite=True)
    assert not (run / "manifest.json").exists()
    [line] = str(error.value).splitlines()
    return line


def returns(value: Any) -> Callable[..., Any]:
    return lambda *given, **named: value


RETURNED: dict[str, tuple[type, str, Any, str]] = {
    "no words": (plain.PlainRetriever, "retrieve", None, "returned None: a list of icekit.Candidate is right"),
    "plain words": (plain.PlainRetriever, "retrieve", ["cup"], "returned a list of str: a list of icekit.Candidate is"),
    "no word": (plain.PlainRetriever, "retrieve", [Candidate(None, 1.0)], "returned None as a word: text is right"),  # type: ignore[arg-type]
    "empty word": (plain.PlainRetriever, "retrieve", [Candidate(" ", 1.0)], "returned str (' ') as a word: text is"),
    "no score": (
        plain.PlainRetriever,
        "retrieve",
        [Candidate("cup", None)],
        "returned None as the score of the word 'cup': a float is right",
    ),  # type: ignore[arg-type]
    "tensor as score": (
        plain.PlainRetriever,
        "retrieve",
        [Candidate("cup", torch.tensor(0.5))],  # type: ignore[arg-type]
        "returned a tensor of float32 [] on cpu as the score of the word 'cup': a float is right",
    ),
    "infinite score": (
        plain.PlainRetriever,
        "retrieve",
        [Candidate("cup", math.inf)],
        "returned inf as the score of the word 'cup': a finite",
    ),
    "no mask": (plain.PlainSegmentor, "segment", None, "returned None as a mask: a tensor of bool [32, 32] is right"),
    "array": (plain.PlainSegmentor, "segment", MASK.numpy(), "returned ndarray ("),
    "soft mask": (plain.PlainSegmentor, "segment", MASK.float(), "returned a mask of dtype float32: bool is right"),
    "small mask": (plain.PlainSegmentor, "segment", MASK[:8], "a mask of shape [8, 32]: [32, 32] is right"),
    "elsewhere": (plain.PlainSegmentor, "segment", MASK.to("meta"), "returned a mask on meta: the CPU is right"),
    "odd erased": (
        plain.PlainSegmentor,
        "segment",
        Segmentation(MASK, MASK.float()),
        "returned what is erased of dtype float32: bool is right",
    ),
    "no row": (plain.PlainLearner, "learn", Learned({"<cup-0>": None}), "of 16 tokens"),  # type: ignore[dict-item]
    "nothing learned": (plain.PlainLearner, "learn", None, "returned None: an icekit.Learned is right"),
}


@pytest.mark.parametrize("what", RETURNED)
def test_what_a_component_returns(what: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component, method, value, message = RETURNED[what]
    monkeypatch.setattr(component, method, returns(value))
    said = breach(photo)
    role = component.__name__.removeprefix("Plain").lower()
    assert said.startswith(f"{role} 'plain' {WHOSE} ") and message in said
    assert len(said) < 300


def test_what_a_proposer_returns(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, message in {
        (Proposal(MASK & ~MASK),): "a mask without a pixel",
        (Proposal(MASK, ""),): "returned str ('') as a word",
        (MASK,): "returned a tuple of Tensor: a list of icekit.Proposal is right",
    }.items():
        monkeypatch.setattr(plain.ProposingSegmentor, "propose", returns(value))
        assert message in breach(photo, components={"segmentor": "proposing"})


def test_what_a_describer_returns(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, message in {
        (): "described with tuple (()): a mapping of words to probabilities is right",
        (("red", 1.5),): "returned 1.5 as the probability of 'red': 0 to 1 is",
        (("red", math.nan),): "returned nan as the probability of 'red': a finite number",
        (("nobody", 0.5),): "described with the word 'nobody', which it was not asked about",
    }.items():
        monkeypatch.setattr(plain.DescribingRetriever, "describe", returns(dict(value) if value else value))
        assert message in breach(photo, components={"retriever": "describing"}, attributes=("colour",))


def test_what_is_handed_in_stays_as_it_was(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(method: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, *given: Any, **named: Any) -> Any:
            made = method(self, *given, **named)
            change(*given)
            return made

        return changed

    for component, method, change, message in (
        (plain.PlainSegmentor, "segment", lambda view, *_: view.pixels.mul_(0.5), "changed the view's pixels that it"),
        (plain.PlainSegmentor, "segment", lambda view, *_: view.visible.zero_(), "changed the view's visible that it"),
        (plain.PlainRetriever, "retrieve", lambda view, *_: view.original.zero_(), "changed the view's original that"),
        (plain.PlainLearner, "learn", lambda image, *_: image.zero_(), "changed the picture that it was handed"),
        (plain.PlainLearner, "learn", lambda _, regions, __: regions[1].mask.zero_(), "changed the mask of concept 1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(component, method, changing(getattr(component, method), change))
            said = breach(photo)
        assert f"{WHOSE} {message}" in said and said.endswith("it should change a copy (.clone())")


def test_what_a_learner_tells(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tells(step: Any) -> Callable[..., Any]:
        return lambda *given, on_step, **named: on_step(step)

    for step, message in (
        (5, "called on_step with int (5): an icekit.Step is right"),
        (Step(1, 2, "walk", {"total": None}), "with the loss 'total' as None: a float is right"),  # type: ignore[dict-item]
    ):
        monkeypatch.setattr(plain.PlainLearner, "learn", tells(step))
        assert f"learner 'plain' {WHOSE} {'called'}" in (said := breach(photo)) and message in said


def test_what_a_backbone_gives(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generates(picture: Any, *places: int) -> Callable[..., Any]:
        def generate(self: Any, prompts: Any, *, on_image: Callable[..., None], **named: Any) -> list[Any]:
            for place in places or range(len(prompts)):
                on_image(place, picture)
            return [picture] * len(prompts)

        return generate

    right = Image.new("RGB", (plain.SIDE, plain.SIDE))
    for made, message in (
        (generates(None), "generated None: a PIL image is right"),
        (generates(right.resize((8, 9))), "a picture of (8, 9): (width, height) (32, 32) is right"),
        (generates(right, 0), "generated 1 of 6 pictures"),
        (generates(right, 0, 0), "called on_image for picture 0, which was not asked for or made before"),
    ):
        monkeypatch.setattr(plain.PlainBackbone, "generate", made)
        assert f"backbone 'plain' {WHOSE} " in (said := breach(photo, max_concepts=1)) and message in said
    build = plain.PlainBackbone.__init__
    for name, value, message in (
        ("image_size", 32, "has int (32) as its image_size: (height, width) in pixels is right"),
        ("rows", {}, "has dict ({}) as its rows"),
        ("identity", None, "has None as its identity: text is right"),
    ):

        def odd(self: Any, settings: Any, device: Any, name: str = name, value: Any = value) -> None:
            build(self, settings, device)
            setattr(self, name, value)

        monkeypatch.setattr(plain.PlainBackbone, "__init__", odd)
        assert f"backbone 'plain' {WHOSE} {message}" in breach(photo)


def test_what_a_component_needs_may_fail(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_with(settings: object) -> object:
        return 1 / 0

    monkeypatch.setattr(plain.PlainLearner, "needs_with", staticmethod(needs_with), raising=False)
    found = plain.beside_builtins()
    with pytest.raises(RunError, match=r"^learner 'plain' of plugin 'plain' .* in stage settings: ZeroDivisionError: "):
        found.resolve(load_settings(options={"components": plain.NAMES}))


# --- Words that nobody knows -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return in_this_process(tmp_path, monkeypatch, capsys)


def test_an_attribute_of_unknown_words_is_refused_before_anything(run: Call, tmp_path: Path) -> None:
    config = 'attributes = ["mood", "gloss"]\n[attribute.mood]\nanchor = "mood"\nwords = ["sad"]\n'
    config += '[attribute.gloss]\nanchor = "gloss"\nwords = ["maroon"]\n'  # which the plain backbone knows not
    (tmp_path / "settings.toml").write_text(config)
    command = ["run", "photo.png", "--out", "run", *plain.OPTIONS, "--config", "settings.toml"]
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert "attribute 'gloss': backbone 'plain' knows none of its words (maroon), so that its token" in err
    assert not (tmp_path / "run").exists()
    plain.write_data_set(tmp_path / "data")
    bench = ["bench", "folder", "--path", "data", "--out", "bench", *plain.OPTIONS, "--metric", "miou", "--config"]
    status, _, err = run(*bench, "settings.toml")
    assert status == 2 and "attribute 'gloss': backbone 'plain' knows none of its words" in err


def test_show_says_which_words_a_model_knows(run: Call) -> None:
    status, out, err = run("plugins", "show", "color", "--backbone", "plain")
    assert status == 0, err
    assert "backbone plain knows 49 of 50: red, " in out and out.rstrip().endswith("; it does not know maroon")
    status, out, _ = run("plugins", "show", "material", "--backbone", "plain", "--json")
    assert status == 0 and '"known": [' in out
    assert "backbone plain knows all of them" in run("plugins", "show", "material", "--backbone", "plain")[1]
    for arguments, message in (
        (["ice", "--backbone", "plain"], "'ice' is no attribute: --backbone says which"),
        (["colour", "--backbone", "plan"], "no backbone 'plan': did you mean 'plain'?"),
        (["colour", "--set", "backbone.model=x"], "--set is for the model that --backbone names"),
    ):
        status, out, err = run("plugins", "show", *arguments)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1


# --- The bench -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(run: Call, tmp_path: Path) -> Iterator[Callable[[], tuple[int, str]]]:
    plain.write_data_set(tmp_path / "data")
    command, count = ["bench", "folder", "--path", "data", *plain.OPTIONS, "--metric", "seen"], itertools.count()

    def measure() -> tuple[int, str]:
        status, _, err = run(*command, "--out", f"bench-{next(count)}")
        return status, err.splitlines()[-1]

    yield measure


def test_what_a_metric_and_a_data_set_return(
    measured: Callable[[], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, message in (
        ({"named": Score("x")}, "returned str ('x') in the column 'named': a float or None is right"),  # type: ignore[arg-type]
        ({"named": Score(1.0, "a cup")}, "as prompts of 'named': a list of texts is right"),
        ({"other": Score(1.0)}, "measured 'other', which is none of its columns: named"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(plain.Named, "measure", returns(value))
            status, said = measured()
        assert status == 1, said
        assert said.startswith(f"icekit: metric 'seen' {WHOSE} ") and message in said
        assert "--traceback" not in said
    picture = BenchPicture("one", Image.new("RGB", (32, 32)), (TrueConcept(MASK, "cup"),))
    for given, message in (
        ([replace(picture, name="")], "returned str ('') as a picture's name: text is right"),
        ([replace(picture, concepts=(None,))], "has None in picture 'one': an icekit.TrueConcept is right"),
        ([replace(picture, concepts=(TrueConcept(None),))], "returned None as mask 0 of picture 'one'"),  # type: ignore[arg-type]
        ([replace(picture, concepts=(TrueConcept(~MASK & MASK),))], "mask 0 of picture 'one' without a pixel"),
        ([replace(picture, concepts=(TrueConcept(MASK, 5),))], "as the word of mask 0 of picture 'one'"),  # type: ignore[arg-type]
    ):
        monkeypatch.setattr("icekit.builtin.datasets.folder.FolderDataset.pictures", returns(given))
        status, said = measured()
        assert status == 1 and said.startswith("icekit: dataset 'folder' of plugin 'builtin' ") and message in said


def test_a_breach_is_a_run_that_failed() -> None:
    assert issubclass(BreachError, RunError) and not issubclass(BreachError, InputError)
