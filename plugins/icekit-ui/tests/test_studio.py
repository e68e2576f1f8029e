"""The work behind the page, with components that take milliseconds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plain_components as plain
import pytest
from icekit_ui.looking import BEGUN, COMPLETE, DAMAGED, FOUND, look
from icekit_ui.runs import Runs
from icekit_ui.studio import Busy, Outline, Studio
from PIL import Image

from icekit import InputError, load_settings
from icekit.settings import merge

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def studio_in(folder: Path, **given: Any) -> Studio:
    settings = {"components": plain.NAMES, "samples": 1, "max_concepts": 2, "exporters": []}
    return Studio(Runs(folder), load_settings(options=merge(settings, given)), plain.beside_builtins())


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    made = studio_in(tmp_path / "runs")
    yield made
    made.close()


def found(studio: Studio) -> str:
    name = studio.find(PICTURE, "Photo")
    assert studio.wait(60)
    return name


def seen(studio: Studio, name: str) -> Any:
    return look(studio.runs, studio.runs.find(name))


def test_from_a_picture_to_a_mix(studio: Studio) -> None:
    name = found(studio)
    assert (name, studio.job and studio.job.problem) == ("photo", "")
    first = seen(studio, name)
    assert (first.state, [one.word for one in first.things], first.samples) == (FOUND, ["cup", "red bowl"], {})
    assert studio.learn(studio.runs.find(name)) == name
    assert studio.wait(60)
    done = seen(studio, name)
    assert (done.state, len(done.steps), len(done.samples)) == (COMPLETE, 20, 12)
    assert done.things[0].tokens["colour"] == "<cup-0-colour>"
    run = studio.runs.find(name)
    mix = studio.mix("a {a} in {b.colour}", {"a": (run, 0), "b": (run, 1)}, count=2, seed=0)
    assert studio.wait(60)
    assert studio.job is not None and studio.job.problem == ""
    assert studio.runs.read_picture(studio.runs.folder / "mixes" / mix, "1.png") is not None


def test_the_model_is_loaded_once(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    begin = plain.PlainBackbone.__init__
    monkeypatch.setattr(plain.PlainBackbone, "__init__", lambda *made: (loaded.append(1), begin(*made))[1])
    name = found(studio)
    studio.learn(studio.runs.find(name))
    studio.wait(60)
    studio.mix("a {a}", {"a": (studio.runs.find(name), 0)}, count=1, seed=0)
    studio.wait(60)
    assert loaded == [1]


def test_what_is_corrected_is_learned(studio: Studio) -> None:
    name = found(studio)
    mask = np.zeros((32, 32), dtype=bool)
    mask[20:, :8] = True
    outlines = [Outline("mug", seen(studio, name).things[0].mask), Outline(None, mask), Outline("tray", ~mask)]
    studio.learn(studio.runs.find(name), outlines)
    assert studio.wait(60)
    done = seen(studio, name)
    assert [one.word for one in done.things][::2] == ["mug", "tray"]
    assert np.array_equal(done.things[1].mask, mask)
    assert done.things[1].word  # the program has named it


def test_it_stops_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    studio = studio_in(tmp_path / "runs", learner={"pause": 0.02, "steps": 30})
    name = found(studio)
    run = studio.runs.find(name)
    studio.learn(run)
    while studio.job is not None and studio.job.done < 7:
        assert not studio.job.ended
        studio.wait(0.01)
    with pytest.raises(Busy, match="photo is being worked on: wait for it, or stop it"):
        studio.find(PICTURE, "other")
    studio.stop()
    assert studio.wait(60)
    assert seen(studio, name).state == BEGUN
    again = studio_in(tmp_path / "runs")  # another day
    again.learn(again.runs.find(name))
    assert again.wait(60)
    assert seen(again, name).state == COMPLETE
    whole = studio_in(tmp_path / "whole", learner={"steps": 30})
    whole.learn(whole.runs.find(found(whole)))
    assert whole.wait(60)
    tokens = [
        (folder / name / "embeddings.safetensors").read_bytes() for folder in (tmp_path / "runs", tmp_path / "whole")
    ]
    assert tokens[0] == tokens[1]


def test_a_complete_run_stays_when_it_is_corrected(studio: Studio) -> None:
    name = found(studio)
    studio.learn(studio.runs.find(name))
    studio.wait(60)
    run = studio.runs.find(name)
    with pytest.raises(InputError, match="photo is complete: correct an object"):
        studio.learn(run)
    new = studio.learn(run, [Outline("mug", seen(studio, name).things[0].mask)])
    assert studio.wait(60)
    assert [one.word for one in seen(studio, new).things] == ["mug"]
    assert [one.word for one in seen(studio, name).things] == ["cup", "red bowl"]
    assert new == "photo-2"


def test_what_cannot_be_is_said(studio: Studio) -> None:
    with pytest.raises(InputError, match="max_concepts"):
        studio.find(PICTURE, "photo", {"max_concepts": -1})
    with pytest.raises(InputError, match="attribute"):
        studio.find(PICTURE, "photo", {"attributes": ("nothing",)})
    assert studio.runs.all() == [] and not list(studio.runs.folder.iterdir())
    name = found(studio)
    with pytest.raises(InputError, match="there is no object to learn"):
        studio.learn(studio.runs.find(name), [])
    (studio.runs.folder / ".pictures" / "photo.png").unlink()
    with pytest.raises(InputError, match="was begun elsewhere, and its picture is not here"):
        studio.learn(studio.runs.find(name))
    (studio.runs.folder / name / "checkpoint" / "regions.json").write_text("{")
    assert seen(studio, name).state == DAMAGED
    assert "regions.json" in seen(studio, name).problem


def test_a_prompt_that_cannot_be_is_the_works_problem(studio: Studio) -> None:
    name = found(studio)
    studio.learn(studio.runs.find(name))
    studio.wait(60)
    studio.mix("a {a.smell}", {"a": (studio.runs.find(name), 0)}, count=1, seed=0)
    assert studio.wait(60)
    assert studio.job is not None and "smell" in studio.job.problem
