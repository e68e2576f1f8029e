"""`icekit bench --config`: named rows of one table, each with settings of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plain_components as plain
import pytest
from icekit_process import in_this_process, plain_plugin
from PIL import Image
from safetensors.torch import load_file

Run = Callable[..., tuple[int, str, str]]
ROWS = """
sample_steps = 1

[components]
backbone = "plain"
retriever = "describing"
segmentor = "plain"

[bench]
images = 2

[learner.plain]
steps = 3

[rows.whole]
components.learner = "plain"

[rows.bare]
components.learner = "plain"
naming = "alone"

[rows.longer]
components.learner = "plain"
learner.steps = 6

[rows.fewer]
components.learner = "plain"
max_concepts = 1

[rows.described]
components.learner = "described"

[rows.single]
components.learner = "one-token"
"""
MEASURE = ["bench", "folder", "--path", "data", "--metric", "miou", "--metric", "seen"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    plain_plugin(folder / "plugin")
    for name in ("one", "two"):
        (folder / "data" / "masks" / name).mkdir(parents=True)
        Image.new("RGB", (plain.SIDE, plain.SIDE), "red").save(folder / "data" / f"{name}.png")
        for number, word in enumerate(("cup", "vase")):
            mask = Image.fromarray(plain.quadrant(word).numpy().astype(np.uint8) * 255)
            mask.save(folder / "data" / "masks" / name / f"{number}-{word}.png")
    (folder / "rows.toml").write_text(ROWS)
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_this_process(place, monkeypatch, capsys)


def tokens(place: Path, out: str, row: str, image: str = "one") -> dict:
    return load_file(place / out / "runs" / row / image / "embeddings.safetensors")


def test_rows_of_one_table(place: Path, run: Run) -> None:
    status, out, err = run(*MEASURE, "--config", "rows.toml", "--out", "table")
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:9]] == [
        "whole", "bare", "longer", "fewer", "described", "single", "floor", "ceiling"
    ]  # fmt: skip
    seen = lines[0].index("named")
    assert lines[6][1 + 3 * seen] == "–"  # one token: no attribute is named, and none is measured
    assert lines[1][1 + 3 * seen] == "1.00"

    made = json.loads((place / "table" / "results.json").read_text())
    rows = {row["name"]: row for row in made["rows"]}
    assert rows["longer"]["overrides"] == {"components": {"learner": "plain"}, "learner": {"steps": 6}}
    assert rows["floor"]["overrides"] is None
    assert "named" not in rows["single"]["values"]
    assert made["settings"]["rows"]["longer"]["learner"]["steps"] == 6
    assert made["settings"]["rows"]["whole"]["learner"]["steps"] == 3
    # The same masks for all that find the same, found once; another stage one for the row that stops earlier.
    assert rows["bare"]["images"]["one"]["miou"] == rows["single"]["images"]["one"]["miou"]
    assert rows["fewer"]["images"]["one"]["miou"] < rows["whole"]["images"]["one"]["miou"]
    places = sorted(path.name for path in (place / "table" / "located").iterdir())
    assert len(places) == 4 and places[1] == "describing-plain" and places[2].startswith("describing-plain-")

    def described(row: str) -> dict:
        manifest = json.loads((place / "table" / "runs" / row / "one" / "manifest.json").read_text())
        return manifest["concepts"][0]["described"]

    assert described("bare") == {} and described("whole")["colour"]
    # "described" learns nothing: its tokens are the words.
    words = described("described")["colour"]
    row = 0.75 * plain.embedding_of(words[0]) + 0.25 * plain.embedding_of(words[1])
    np.testing.assert_allclose(tokens(place, "table", "described")["<cup-0-colour>"], row, rtol=1e-5)
    np.testing.assert_allclose(tokens(place, "table", "described")["<cup-0>"], plain.embedding_of("cup"), rtol=1e-5)

    page = (place / "table" / "bench.html").read_text()
    assert "longer: plain and plain with <code>components.learner = &#34;plain&#34;, learner.steps = 6</code>" in page


@pytest.mark.slow
def test_rows_are_held_against_one_of_them(place: Path, run: Run) -> None:
    status, out, err = run(*MEASURE, "--config", "rows.toml", "--out", "against", "--set", "bench.against=bare")
    assert status == 0, err
    lines = out.splitlines()
    start = lines.index("against bare, image by image:")
    assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["whole", "longer"]
    assert "+" in lines[start + 2]
    assert "Against bare, image by image" in (place / "against" / "bench.html").read_text()
    status, _, err = run(*MEASURE, "--config", "rows.toml", "--out", "other", "--set", "bench.against=bar")
    assert status == 2 and "bench.against = 'bar' is no row: did you mean 'bare'?" in err


@pytest.mark.slow
def test_rows_go_on(place: Path, run: Run) -> None:
    arguments = [*MEASURE, "--config", "rows.toml", "--resume", "--out", "parts"]
    status, _, err = run(*arguments)
    assert status == 0, err
    before = {path: path.stat().st_mtime_ns for path in (place / "parts" / "runs").rglob("manifest.json")}
    status, out, err = run(*arguments, "--learner", "plain")  # a combination of components beside the rows
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["plain-plain", "whole"]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert str(tokens(place, "parts", "plain-plain")) == str(tokens(place, "parts", "whole"))
    status, _, err = run(*arguments, "--set", "rows.longer.learner.steps=7")
    assert status == 2
    assert "rows.longer.learner.steps was 6, now 7 (--overwrite starts it afresh)" in err


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("rows.floor.naming=alone", "row 'floor' cannot have this name: another row is called so"),
        ("rows.x={seed=3}", "row 'x' cannot have its own seed: all rows share it"),
        ("rows.x.metric={clip='y'}", "row 'x' cannot have its own metric"),
        ("rows.x.components={backbone='y'}", "row 'x' cannot have its own components.backbone"),
        ("rows.x=3", "setting 'rows.x' cannot be 3: it should be a table of settings"),
        ("rows=3", "setting 'rows' cannot be 3"),
        ("rows.x.namin=alone", "row 'x': unknown setting 'namin': did you mean 'naming'?"),
        ("rows.x.learner.stps=3", "row 'x': unknown setting 'learner.stps': did you mean 'learner.steps'?"),
        ("rows.x.components.learner=plian", "no learner 'plian': did you mean 'plain'?"),
        ("rows.x.preset=publishd", "no preset 'publishd': did you mean 'published'?"),
        ('rows={"a b"={}}', "row 'a b' cannot have this name: use letters, digits, - and _"),
    ],
)
def test_wrong_rows(run: Run, assignment: str, hint: str) -> None:
    components = [f"--set=components.{role}=plain" for role in ("backbone", "retriever", "segmentor", "learner")]
    status, printed, err = run("bench", "folder", "--path", "data", *components, "--set", assignment, "--out", "wrong")
    assert (status, printed) == (2, "")
    assert hint in err
    assert len(err.splitlines()) == 1


def test_described_needs_somebody_who_describes(run: Run) -> None:
    status, _, err = run(
        *MEASURE, "--config", "rows.toml", "--set", "rows.described.naming=alone", "--out", "undescribed"
    )
    assert status == 2
    assert (
        "learner 'described' has no word for the colour of 'cup' (concept 0): it needs naming = described and a " in err
    )
