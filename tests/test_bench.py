"""`icekit bench`: what it measures, prints and keeps, and how it goes on."""

import csv
import json
import signal
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plain_components as plain
import pytest
from icekit_process import in_this_process, plain_plugin, start, with_what_is_installed
from PIL import Image

from icekit import ComponentSettings, plugins
from icekit.plugins import PluginError, check_component
from icekit.protocols import Outcome, Score

Run = Callable[..., tuple[int, str, str]]
PLAIN = ["--backbone=plain", "--retriever=plain", "--segmentor=plain"]
QUICK = ["--set", "bench.images=2", "--set", "sample_steps=1", "--set", "learner.plain.steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures whose true masks are two of the quadrants that the plain components find."""
    folder = tmp_path_factory.mktemp("bench")
    plain_plugin(folder / "plugin")
    for name, colour in (("one", "red"), ("two", "blue")):
        (folder / "data" / "masks" / name).mkdir(parents=True)
        Image.new("RGB", (plain.SIDE, plain.SIDE), colour).save(folder / "data" / f"{name}.png")
        for number, word in enumerate(("cup", "vase")):
            mask = Image.fromarray(plain.quadrant(word).numpy().astype(np.uint8) * 255)
            mask.save(folder / "data" / "masks" / name / f"{number}-{word}.png")
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program in this process, with the plain components and the built-ins."""
    return in_this_process(place, monkeypatch, capsys)


class Pictures(HTMLParser):
    """The pictures and links of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_table_files_and_page(place: Path, run: Run, clip_folder: Path) -> None:
    arguments = [
        "bench", "folder", "--path", "data", *PLAIN, "--learner", "plain", "--learner", "random", *QUICK,
        "--set", f"metric.clip=local-dir:{clip_folder}", "--seed", "3", "--out", "full",
    ]  # fmt: skip
    status, out, err = run(*arguments)
    assert status == 0, err
    lines = out.splitlines()
    assert [word for word in lines[0].split() if word != "!"] == [
        "sim_i", "sim_c", "acc1", "acc3", "miou", "recall", "word_accuracy"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:5]] == ["plain-plain", "plain-random", "floor", "ceiling"]
    assert "8/8 two: ceiling" in err

    made = json.loads((place / "full" / "results.json").read_text())
    assert made["command"].startswith("icekit bench folder --path data --backbone=plain")
    assert (made["n"], made["seed"], made["versions"]["plain-plugin"]) == (2, 3, "1.0")
    rows = {row["name"]: row for row in made["rows"]}
    assert rows["plain-plain"]["components"]["learner"] == "plain"
    assert rows["ceiling"]["values"]["miou"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    assert rows["ceiling"]["values"]["word_accuracy"]["mean"] == 1
    # The quadrants with a frayed edge, both words right; both learners were given the same masks.
    assert 0.9 < rows["plain-plain"]["values"]["miou"]["mean"] < 1
    assert rows["plain-plain"]["values"]["recall"]["mean"] == 1
    assert rows["plain-random"]["images"]["one"]["miou"] == rows["plain-plain"]["images"]["one"]["miou"]
    assert rows["floor"]["values"]["miou"]["mean"] < 0.5
    assert {"sim_i", "sim_c", "acc1", "acc3"} <= made["columns"].keys()
    assert (place / "full" / "runs" / "plain-plain" / "one" / "manifest.json").is_file()
    for column, what in made["columns"].items():
        if what["says_nothing"]:
            assert f"! {column} says nothing here" in out
            assert f"{column} !" in lines[0]

    table = list(csv.DictReader((place / "full" / "results.csv").open()))
    assert [row["row"] for row in table] == list(rows)
    assert float(table[0]["miou_mean"]) == rows["plain-plain"]["values"]["miou"]["mean"]

    page = (place / "full" / "bench.html").read_text()
    pictures = Pictures(page).sources
    assert any(source.startswith("data:image/png") for source in pictures)
    assert all(source.startswith(("data:", "#")) for source in pictures)  # nothing is fetched
    assert "&lt;cup-0-instance&gt;" in page and "<cup-0-instance>" not in page

    # What is there is kept; a metric, a learner, fewer images may be asked for later.
    before = {path: path.stat().st_mtime_ns for path in (place / "full" / "runs").rglob("manifest.json")}
    status, out, err = run(*arguments, "--learner", "words", "--metric", "sim_i", "--n", "1", "--resume", "--json")
    assert status == 0, err
    again = json.loads(out)
    assert [row["name"] for row in again["rows"]][2] == "plain-words"
    assert again["rows"][0]["images"]["one"] == {"sim_i": rows["plain-plain"]["images"]["one"]["sim_i"]}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert run(*arguments)[0] == 2
    status, _, err = run(*arguments, "--set", "learner.plain.rate=0.7", "--resume")
    assert status == 2
    assert "learner.plain.rate was 0.5, now 0.7 (--overwrite starts it afresh)" in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["foldr"], "no dataset 'foldr': did you mean 'folder'?"),
        (["folder"], "give one, as in --path FOLDER"),
        (["folder", "--path", "nowhere"], "dataset.path: no such folder: nowhere"),
        (["folder", "--path", "data", "--learner", "icy"], "no learner 'icy': did you mean 'ice'?"),
        (["folder", "--path", "data", "--metric", "miuo"], "no metric 'miuo': did you mean 'miou'?"),
        (["folder", "--path", "data", "--set", "learner.stps=3"], "unknown setting 'learner.stps': did you mean"),
        (["folder", "--path", "data", "--set", "bench.image=3"], "did you mean 'bench.images'?"),
        (["folder", "--path", "data", "--set", "metric.clp=x"], "unknown setting 'metric.clp': did you mean"),
        (["folder", "--path", "data", "--n", "9"], "--n 9: data has 2 pictures"),
        (["folder", "--path", "data", "--n", "0"], "0 is not in the range"),
        (["folder", "--path", "plugin"], "no picture in plugin"),
        (["folder", "--path", "data", "--out", "plugin"], "no bench of icekit's"),
        (["folder", "--path", "data", "--resume", "--overwrite"], "give one of them"),
        (["folder", "--path", "data", "--workers", "0"], "0 is not in the range"),
        (["folder", "--path", "data", "--executor", "lokal"], "no executor 'lokal': did you mean 'local'?"),
    ],
)
def test_wrong_input(run: Run, arguments: list[str], hint: str) -> None:
    out = [] if "--out" in arguments else ["--out", "wrong"]
    status, printed, err = run("bench", *arguments, *out, *PLAIN)
    assert (status, printed) == (2, "")
    assert hint in err
    assert len(err.splitlines()) == 1


@pytest.mark.timeout(600)  # a process of its own: on a busy machine its imports take minutes
@pytest.mark.slow
def test_killed_and_resumed(place: Path, run: Run) -> None:
    def arguments(out: str) -> list[str]:
        return [
            "bench", "folder", "--path", "data", *PLAIN, "--learner", "plain", "--metric", "miou", "--metric",
            "word_accuracy", *QUICK, "--set", "learner.plain.pause=0.3", "--out", out,
        ]  # fmt: skip

    process = start(arguments("cut"), place, place / "plugin")
    second = place / "cut" / "runs" / "plain-plain" / "two" / "log.jsonl"
    deadline = time.monotonic() + 400
    while not second.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert second.is_file() and not (place / "cut" / "results.json").exists()
    first = place / "cut" / "runs" / "plain-plain" / "one" / "manifest.json"
    made_at = first.stat().st_mtime_ns

    status, resumed, err = run(*arguments("cut"), "--resume")
    assert status == 0, err
    assert first.stat().st_mtime_ns == made_at
    status, whole, err = run(*arguments("whole"))
    assert status == 0, err
    assert resumed.splitlines()[:-1] == whole.splitlines()[:-1]
    for name in ("one", "two"):
        tokens = [place / out / "runs" / "plain-plain" / name / "embeddings.safetensors" for out in ("whole", "cut")]
        assert tokens[0].read_bytes() == tokens[1].read_bytes()


@pytest.mark.slow
def test_workers_measure_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image of a row at a time; what is measured is not measured again, and stage one is shared."""
    monkeypatch.setattr("icekit.plugins.sources._chosen", None)
    plugins.installed.cache_clear()
    call = with_what_is_installed(place, monkeypatch, capsys)
    arguments = ["bench", "folder", "--path", "data", *PLAIN, "--learner", "plain", "--metric", "miou", *QUICK]
    arguments += ["--learner", "one-token", "--plugin-file", str(Path(plain.__file__))]
    status, shared, err = call(*arguments, "--out", "shared", "--workers", "2")
    assert status == 0, err
    assert "8/8" in err
    runs = {path: path.stat().st_mtime_ns for path in (place / "shared" / "runs").rglob("manifest.json")}
    located = place / "shared" / "located"
    assert sorted(one.name for one in located.iterdir()) == ["ceiling", "floor", "plain-plain"]
    status, again, err = call(*arguments, "--out", "shared", "--workers", "1", "--resume")
    assert (status, again) == (0, shared), err
    assert {path: path.stat().st_mtime_ns for path in (place / "shared" / "runs").rglob("manifest.json")} == runs
    status, alone, err = call(*arguments, "--out", "alone")
    assert status == 0, err
    assert alone.splitlines()[:-1] == shared.splitlines()[:-1]
    for name in ("one", "two"):
        ends = [place / out / "runs" / "plain-plain" / name / "embeddings.safetensors" for out in ("shared", "alone")]
        assert ends[0].read_bytes() == ends[1].read_bytes()


def test_what_is_no_number_is_not_measured(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And results.json is JSON."""

    def measure(self: object, outcome: Outcome) -> dict[str, Score]:
        return {"named": Score(float("nan") if outcome.image.name == "one" else 0.5)}

    monkeypatch.setattr(plain.Named, "measure", measure)
    arguments = ["bench", "folder", "--path", "data", *PLAIN, "--learner", "plain", "--metric", "seen", *QUICK]
    status, out, err = run(*arguments, "--out", "nan", "--json")
    assert status == 0, err

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for text in (out, (place / "nan" / "results.json").read_text()):
        made = json.loads(text, parse_constant=refuse)
        assert {image: table["named"] for image, table in made["rows"][0]["images"].items()} == {
            "one": None,
            "two": 0.5,
        }
        assert made["rows"][0]["values"]["named"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}


def test_pictures_of_two_sides(place: Path, run: Run) -> None:
    """Masks, random masks, runs and generated images are of the backbone's shape."""
    arguments = ["bench", "folder", "--path", "data", *PLAIN, "--learner", "plain", "--metric", "miou", *QUICK]
    arguments += ["--metric", "word_accuracy", "--metric", "looked", "--set", "backbone.image_size=[32,64]"]
    status, out, err = run(*arguments, "--out", "wide", "--json")
    assert status == 0, err
    rows = {row["name"]: row["values"] for row in json.loads(out)["rows"]}
    assert rows["ceiling"]["miou"]["mean"] == 1
    assert 0.8 < rows["plain-plain"]["miou"]["mean"] < 1
    assert rows["plain-plain"]["looked"]["mean"] == 1
    for name in ("data/one/image.png", "data/one/masks/0-cup.png", "located/floor/one/masks/0-cup.png"):
        if (place / "wide" / name).is_file():
            with Image.open(place / "wide" / name) as picture:
                assert picture.size == (64, 32)
    assert len(Pictures((place / "wide" / "bench.html").read_text()).sources) > 2


def test_a_metric_without_columns_is_broken() -> None:
    class Nameless:
        class Settings(ComponentSettings):
            pass

        def prepare(self, images: object) -> None: ...

        def measure(self, outcome: object) -> None: ...

    with pytest.raises(PluginError, match=r"lacks columns, needs; see icekit\.protocols\.Metric"):
        check_component("metric", "nameless", Nameless)
