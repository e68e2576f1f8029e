"""A learner that has no token for some parts of a concept: what users see of it, from the run to the prompt."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from icekit_process import in_this_process, plain_plugin
from PIL import Image
from safetensors.torch import load_file

from icekit.protocols import object_tokens, parts_of

Run = Callable[..., tuple[int, str, str]]
ONE_TOKEN = ["--backbone=plain", "--retriever=plain", "--segmentor=plain", "--learner=one-token"]
QUICK = ["--max-concepts", "1", "--set", "learner.steps=3", "--set", "samples=1", "--set", "sample_steps=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    plain_plugin(folder / "plugin")
    Image.new("RGB", (40, 32), "red").save(folder / "photo.png")
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_this_process(place, monkeypatch, capsys)


def test_parts_of_a_learner() -> None:
    class Everything:
        pass

    class Bound:
        parts = ("instance", "category")

    assert parts_of(Everything, ["colour"]) == ("category", "instance", "colour")
    assert parts_of(Bound, ["colour"]) == ("category", "instance")
    assert object_tokens({"category": "<cup-0>", "instance": "<cup-0-instance>"}) == "<cup-0-instance> <cup-0>"
    assert object_tokens({"instance": "<cup-0-instance>", "colour": "<cup-0-colour>"}) == "<cup-0-instance>"


def test_a_method_of_one_token(place: Path, run: Run) -> None:
    status, out, err = run("run", "photo.png", *ONE_TOKEN, *QUICK, "--out", "one")
    assert status == 0, err
    [row] = [line for line in out.splitlines() if "cup" in line]
    assert row.split()[-3:] == ["–", "–", "<cup-0-instance>"]  # no word for colour and material
    folder = place / "one"
    [concept] = json.loads((folder / "manifest.json").read_text())["concepts"]
    assert (concept["tokens"], concept["words"]) == ({"instance": "<cup-0-instance>"}, {})
    assert list(load_file(folder / "embeddings.safetensors")) == ["<cup-0-instance>"]
    assert [path.name for path in (folder / "embeddings").iterdir()] == ["cup-0-instance.safetensors"]
    assert [path.name for path in (folder / "attention").iterdir()] == ["0-instance.png"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["0-object-0.png", "0-object-words-0.png"]
    page = (folder / "report.html").read_text()
    assert "Generated with &lt;cup-0-instance&gt;, sample" in page
    assert "cup-0-colour" not in page and "instance and category together" not in page

    status, out, err = run("compose", "a {a} on a table", "a=one", "--n", "1", "--json")
    assert status == 0, err
    assert json.loads(out)["expanded"] == "a <a-cup-0-instance> on a table"
    status, _, err = run("compose", "a cup, {a.colour}", "a=one")
    assert status == 2
    assert "has {a.colour} at character 8, but a has no token 'colour': choose from instance" in err


def test_a_part_that_was_promised_must_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import plain_components as plain

    monkeypatch.setattr(plain.OneTokenLearner, "parts", ("instance", "category"))
    status, _, err = run("run", "photo.png", *ONE_TOKEN, *QUICK, "--out", "broken")
    assert status == 1
    assert "learner 'one-token' of plugin 'plain' (plain-plugin 1.0) returned 1 of 2 tokens: <cup-0> is missing" in err
