"""`icekit batch`: many pictures, a run each, whatever happens to one of them or to a worker."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_program import own_server
from icekit_process import start, with_what_is_installed
from PIL import Image

from icekit import Extraction, InputError, plugins
from icekit.batch import Progress
from icekit.batch.index import json_in_html, render_index
from icekit.batch.pictures import find_pictures, name_pictures
from icekit.batch.record import DoneRecord, SeenRecord

Call = Callable[..., tuple[int, str, str]]
HERE = Path(__file__).parent
PLAIN = [f"--{role}=plain" for role in ("backbone", "retriever", "segmentor", "learner")]
QUICK = [*PLAIN, "--set", "learner.steps=6", "--set", "sample_steps=1", "--set", "exporters=[]", "--max-concepts", "1"]
FILE = ["--plugin-file", str(HERE / "plain_components.py")]
COLOURS = ("red", "blue", "green")


def draw(file: Path, colour: str = "red", side: int = 48) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(file)
    return file


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with own_server():
        yield


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three pictures in a folder."""
    for colour in COLOURS:
        draw(tmp_path / "photos" / f"{colour}.png", colour)
    return tmp_path


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The program, in this process; its workers are others."""
    monkeypatch.setattr("icekit.plugins.sources._chosen", None)
    plugins.installed.cache_clear()
    return with_what_is_installed(place, monkeypatch, capsys)


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def tokens(run: Path) -> bytes:
    return (run / "embeddings.safetensors").read_bytes()


def test_every_picture_has_a_run_and_bad_ones_stop_no_other(place: Path, call: Call) -> None:
    (place / "photos" / "torn.jpg").write_bytes(b"no picture")
    draw(place / "photos" / "tiny.png", side=8)
    draw(place / "photos" / "more" / "red.png", "white")
    (place / "photos" / "notes.md").write_text("no picture either")
    status, out, err = call("batch", "photos", "--out", "made", "--workers", "2", *QUICK, *FILE)
    assert status == 1, err
    assert out.splitlines()[0] == "6 pictures: 4 done, 2 failed: made/failures.jsonl"
    assert "6/6" in err and "0 left" in err and "pictures a minute" in err
    runs = sorted(path.name for path in (place / "made" / "runs").iterdir())
    assert runs[:2] == ["blue", "green"] and all(name.startswith("red-") for name in runs[2:]) and len(runs) == 4
    failed = {str(one["name"]): one for one in lines(place / "made" / "failures.jsonl")}
    assert {name: one["stage"] for name, one in failed.items()} == {"torn": "read", "tiny": "read"}
    assert "too small (8 x 8)" in str(failed["tiny"]["error"]) and failed["torn"]["picture"] == str(
        place / "photos" / "torn.jpg"
    )
    record = json.loads((place / "made" / "batch.json").read_text())
    assert record["summary"]["finished"] and len(record["pictures"]) == 6

    # Each is a run like any other, with the same tokens.
    status, _, err = call("run", "photos/blue.png", "--out", "alone", *QUICK, *FILE)
    assert status == 0, err
    assert tokens(place / "alone") == tokens(place / "made" / "runs" / "blue")
    assert Extraction.open(place / "made" / "runs" / "green").concepts[0].label == "cup"
    page = (place / "made" / "index.html").read_text()
    assert "4 of 6 pictures done" in page and '"name":"green"' in page and "torn" not in page

    # Once more: what is done stays, what has failed is tried again, what is new is done.
    before = {path: path.stat().st_mtime_ns for path in (place / "made" / "runs").rglob("manifest.json")}
    draw(place / "photos" / "torn.jpg", "black")
    draw(place / "photos" / "blue.png", "yellow")  # another picture under the same name
    status, out, err = call("batch", "photos", "--out", "made", "--workers", "1", *QUICK, *FILE)
    assert status == 1, err
    assert out.splitlines()[0] == "6 pictures: 5 done (3 of them before), 1 failed: made/failures.jsonl"
    changed = [path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert changed == ["blue"]
    assert [one["name"] for one in lines(place / "made" / "failures.jsonl")] == ["tiny"]

    status, out, err = call("batch", "photos", "--out", "made", *QUICK, *FILE, "--seed", "1")
    assert (status, out) == (2, "")
    assert "the batch in made cannot go on: seed was 0, now 1 (--overwrite replaces its runs one by one)" in err


KILLING = """
import os, signal
from pathlib import Path
import plain_components as plain
from icekit import hookimpl

class Killing(plain.PlainLearner):
    '''Kills its worker: always for a red picture, once for a green one.'''

    def learn(self, image, *arguments, **options):
        red, green = float(image[0].mean()), float(image[1].mean())
        marker = Path({marker!r})
        if red > 0.9 or (green > 0.4 and not marker.exists()):
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().learn(image, *arguments, **options)

class Full(plain.PlainLearner):
    '''The disk is full.'''

    def learn(self, *arguments, **options):
        from icekit.run.atomic import CannotWrite
        raise CannotWrite(Path("file"), OSError(28, "No space left on device"))

@hookimpl
def register_learners(register):
    register("killing", Killing)
    register("full", Full)
"""


def test_a_worker_that_dies_and_a_disk_that_is_full(place: Path, call: Call) -> None:
    source = f"import sys; sys.path.append({str(HERE)!r})\n" + KILLING.format(marker=str(place / "marker"))
    (place / "killing.py").write_text(source)
    arguments = ["batch", "photos", "--workers", "1", *QUICK, *FILE, "--plugin-file", "killing.py"]
    status, out, err = call(*arguments, "--out", "made", "--learner", "killing")
    assert status == 1, err
    assert out.splitlines()[0] == "3 pictures: 2 done, 1 failed: made/failures.jsonl"
    [failure] = lines(place / "made" / "failures.jsonl")
    assert (failure["name"], failure["stage"]) == ("red", "worker") and "worker" in str(failure["error"])
    # The green one went on where its worker died, and ends as if nothing had happened.
    status, out, err = call(*arguments, "--out", "full", "--learner", "full")
    assert (status, out) == (1, "")
    assert "cannot write file: no space left on device" in err and "--learner full` goes on" in err
    assert lines(place / "full" / "failures.jsonl") == []
    status, out, err = call(*arguments, "--out", "none", "--set", "backbone.model=3", "--learner", "nowhere")
    assert status == 2 and "no learner 'nowhere'" in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["nowhere"], "nowhere: there is no such file or folder, and it is no pattern"),
        (["empty"], "empty: there is no picture in it"),
        (["photos/*.gif"], "photos/*.gif: no file matches this pattern"),
        (["photos", "--executor", "lokal"], "no executor 'lokal': did you mean 'local'?"),
        (["photos", "--set", "executor.wrokers=2"], "unknown setting 'executor.wrokers': did you mean"),
        (["photos", "--set", "executor=2"], "setting 'executor' cannot be 2: it should be a table"),
        (["photos", "--set", "learner.stps=2"], "unknown setting 'learner.stps': did you mean 'learner.steps'?"),
        (["photos", "--out", "photos"], "photos is not empty and no batch of icekit's"),
        (
            ["photos", "--out", "s3://bucket/runs"],
            "a batch is written into a folder that all workers see, and this is a",
        ),
        (["photos", "--device", "cuda"], "device 'cuda' is not available here"),
    ],
)
def test_wrong_input(place: Path, call: Call, arguments: list[str], hint: str) -> None:
    (place / "empty").mkdir()
    out = [] if "--out" in arguments else ["--out", "made"]
    status, printed, err = call("batch", *arguments, *out, *PLAIN, *FILE)
    assert (status, printed) == (2, "")
    assert hint in err.splitlines()[-1]
    assert not (place / "made" / "runs").exists()


def test_files_of_others_are_in_the_way(place: Path, call: Call) -> None:
    """A picture whose place is taken fails; a link in the place of the runs' folder ends all."""
    (place / "elsewhere").mkdir()
    (place / "made" / "runs").mkdir(parents=True)
    assert call("batch", "photos/red.png", "--out", "made", *QUICK, *FILE)[0] == 2
    (place / "made" / "runs").rmdir()
    status, _, err = call("batch", "photos/red.png", "--out", "made", *QUICK, *FILE, "--workers", "1")
    assert status == 0, err
    (place / "made" / "runs" / "blue").mkdir()
    (place / "made" / "runs" / "blue" / "diary.txt").write_text("mine")
    status, _, err = call("batch", "photos/blue.png", "--out", "made", *QUICK, *FILE, "--workers", "1")
    assert status == 1 and "blue failed: made/runs/blue is in the way" in err
    assert (place / "made" / "runs" / "blue" / "diary.txt").read_text() == "mine"
    (place / "made" / "runs").rename(place / "elsewhere" / "runs")
    (place / "made" / "runs").symlink_to(place / "elsewhere" / "runs")
    status, _, err = call("batch", "photos/red.png", "--out", "made", *QUICK, *FILE)
    assert status == 2 and "made/runs is a symbolic link" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_all_of_it_ended_and_started_again(place: Path, call: Call, how: signal.Signals) -> None:
    """Finished pictures stay, half-done ones go on, and the tokens are those of a batch that nobody ended."""
    arguments = ["batch", "photos", *QUICK, *FILE, "--workers", "2", "--set", "learner.pause=0.3"]
    process = start([*arguments, "--out", "cut"], place)
    deadline = time.monotonic() + 250
    while not list((place / "cut").glob("runs/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT:
        assert "interrupted: `icekit batch photos" in err and "Traceback" not in err
        assert json.loads((place / "cut" / "batch.json").read_text())["summary"]["finished"] is False
    made = {path: path.stat().st_mtime_ns for path in (place / "cut").glob("runs/*/manifest.json")}
    assert 0 < len(made) < 3
    status, _, err = call(*arguments, "--out", "cut")
    assert status == 0, err
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    status, _, err = call(*arguments, "--out", "whole")
    assert status == 0, err
    for colour in COLOURS:
        assert tokens(place / "cut" / "runs" / colour) == tokens(place / "whole" / "runs" / colour)


def test_a_run_that_was_about_to_begin_when_all_was_killed(place: Path, call: Call) -> None:
    status, _, err = call("batch", "photos", "--out", "made", "--workers", "1", *QUICK, *FILE)
    assert status == 0, err
    run, before = place / "made" / "runs" / "blue", tokens(place / "made" / "runs" / "blue")
    shutil.rmtree(run)
    (run / "checkpoint").mkdir(parents=True)
    (run / "checkpoint" / "run.json").write_text('{"schema_version": 2, "ready": false}')
    status, _, err = call("batch", "photos", "--out", "made", "--workers", "1", *QUICK, *FILE)
    assert status == 0, err
    assert tokens(run) == before and not (run / "checkpoint").exists()


@pytest.mark.slow
def test_overwritten_by_other_settings(place: Path, call: Call) -> None:
    """Runs are replaced one by one; those of pictures that are no more in it go in the end."""
    arguments = ["batch", *QUICK, *FILE, "--workers", "1", "--out", "made"]
    assert call(*arguments, "photos")[0] == 0
    (place / "made" / "runs" / "green" / "mine.txt").write_text("mine")
    before = tokens(place / "made" / "runs" / "red")
    status, out, err = call(*arguments, "photos/red.png", "--seed", "1", "--overwrite")
    assert status == 0, err
    assert tokens(place / "made" / "runs" / "red") != before
    assert not (place / "made" / "runs" / "blue").exists()
    assert [path.name for path in (place / "made" / "runs" / "green").iterdir()] == ["mine.txt"]
    status, out, err = call(*arguments, "photos/red.png", "--seed", "1")
    assert status == 0 and "1 done (1 of them before)" in out, err


# --- Pictures and their names -----------------------------------------------------------------------------------------


def test_files_folders_lists_and_patterns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    draw(place / "photos" / "2.jpg")
    draw(place / "photos" / "10.jpg")
    draw(place / "photos" / ".hidden.png")
    draw(place / "photos" / "made" / "runs" / "red" / "image.png")
    (place / "photos" / "made" / "batch.json").write_text("{}")
    (place / "lists").mkdir()
    (place / "lists" / "some.txt").write_text("# of two\n\n../photos/2.jpg\nnot-there.png\n")

    def found(*given: str) -> list[str]:
        return [os.path.relpath(path, place) for path in find_pictures(given, place / "out")]

    assert found("photos") == [f"photos/{name}" for name in ("2.jpg", "10.jpg", "blue.png", "green.png", "red.png")]
    assert found("photos/*.jpg", "photos/red.png", "photos/2.jpg") == [
        "photos/2.jpg", "photos/10.jpg", "photos/red.png"
    ]  # fmt: skip
    assert found("lists/some.txt") == ["photos/2.jpg", "lists/not-there.png"]  # whether it is one is seen when read
    assert find_pictures(["photos"], place / "photos") == find_pictures(["photos"], place / "out")
    with pytest.raises(InputError, match=r"\[ab\]\.png: no file matches this pattern"):
        found("photos/[ab].png")
    draw(place / "photos" / "[ab].png")
    assert found("photos/[ab].png") == ["photos/[ab].png"]


def test_names_are_unique_whatever_the_order(place: Path) -> None:
    given = [place / name for name in ("a/cat.jpg", "b/cat.jpg", "b/Cat.png", "dog.jpg", "..png", f"{'x' * 300}.png")]
    names = name_pictures(given, {})
    assert names == name_pictures(given[::-1], {})
    assert len({name.casefold() for name in names.values()}) == len(given)
    assert names[given[3]] == "dog" and names[given[0]].startswith("cat-")
    assert all(len(name.encode()) <= 120 and not name.startswith(".") for name in names.values())
    kept = name_pictures([place / "c" / "dog.png", *given], names)
    assert {source: kept[source] for source in given} == names
    assert kept[place / "c" / "dog.png"].startswith("dog-")
    assert name_pictures([place / 'a<b>"c"\n&d.png'], {})[place / 'a<b>"c"\n&d.png'] == "a-b-c-&d"


# --- The page ---------------------------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=alert(1)>&amp;"


def seen(name: str, label: str = "cup", words: tuple[str, ...] = ("red",)) -> DoneRecord:
    concept = SeenRecord(label=label, score=0.5, words=list(words))
    return DoneRecord(
        name=name, sha256="0", settings="0", size=1, mtime_ns=1, seconds=1.0, report=True, concepts=[concept]
    )


def test_names_and_words_are_text_in_the_page() -> None:
    page = render_index("a <b> & c", [seen("it's 50% #1 & more", EVIL, (EVIL,))], Progress(1, 1, 0, 0))
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in page
    assert EVIL not in page and page.count("</script>") == 2
    [data] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["name"] == "it's 50% #1 & more" and data["concepts"] == [[EVIL, 0.5, [EVIL]]]
    assert data["place"] == "runs/it%27s%2050%25%20%231%20%26%20more/report.html"
    assert data["thumbnail"] == "thumbnails/it%27s%2050%25%20%231%20%26%20more.jpg"
    assert json.loads(json_in_html(EVIL)) == EVIL


@pytest.mark.slow
def test_the_page_of_two_thousand_runs_in_a_browser(tmp_path: Path) -> None:
    """It opens at once, finds words as one types, sorts and turns pages; nothing of a name is markup."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
    assert chromium is not None, "this test, run by name, needs Chromium: apt-get install chromium"
    runs = [seen(f"photo {number}", "cup" if number % 2 else "vase", (COLOURS[number % 3],)) for number in range(2000)]
    runs[7] = seen(f"the odd one {EVIL}".replace("/", "-"), EVIL)
    (tmp_path / "thumbnails").mkdir()
    for number in range(60):
        draw(tmp_path / "thumbnails" / f"photo {number}.jpg")
    (tmp_path / "index.html").write_text(render_index("holiday", runs, Progress(2000, 2000, 0, 0)))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append("a dialog"))
        page.goto((tmp_path / "index.html").as_uri(), wait_until="load")
        opened = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        assert opened < 2000, f"opened in {opened:.0f} ms"
        assert page.locator("#count").inner_text() == "2000 of 2000 runs"
        assert page.locator("#runs > li").count() == 60
        page.wait_for_function("document.querySelector('#runs img').naturalWidth > 0")
        page.locator("#query").press_sequentially("vase bl")
        assert page.locator("#count").inner_text() == "333 of 2000 runs"
        assert page.locator("#runs .name").first.inner_text() == "photo 4"
        page.locator("#later").click()
        assert page.locator("#page").inner_text() == "page 2 of 6"
        page.locator("#query").fill("onerror")
        assert page.locator("#count").inner_text() == "1 of 2000 runs"
        assert EVIL in page.locator("#runs .concepts").inner_text()
        page.locator("#query").fill("")
        page.locator("#sort").select_option("latest")
        assert page.locator("#runs .name").first.inner_text() == "photo 1999"
        browser.close()
    assert wrong == []
