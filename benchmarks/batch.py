"""What ``icekit batch`` costs and keeps: ``python benchmarks/batch.py measure --out FOLDER`` and ``page --out FOLDER``.

``measure`` draws pictures of the tabletop and does them with the executor ``local``: by one worker, by two, and by two
all of whose processes are killed (SIGKILL) in the middle, and started again. Among the pictures are bad ones. It says

- how much faster two workers are than one, from when they were set up: to be read on two cores that are idle;
- whether the tokens of all three are equal bit for bit;
- whether the bad pictures are in ``failures.jsonl`` and nowhere else;
- what the engine costs a picture: a worker's time beside its runs, and the driver's own processor time.

``page`` opens an index of many runs, made from few by copying, in headless Chromium, and types a search.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image

SEED = 30_000
"""Of the first picture; no other script draws it."""
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


def draw(folder: Path, count: int, bad: int) -> None:
    """Pictures of the tabletop, and files that are none."""
    from icekit_tabletop import render_scene

    folder.mkdir(parents=True)
    for number in range(count):
        render_scene(SEED + number).image.save(folder / f"scene-{number:03}.png")
    for number in range(bad):
        torn = folder / f"bad-{number}.png"
        if number % 2:
            torn.write_bytes((folder / "scene-000.png").read_bytes()[:200])
        else:
            Image.new("RGB", (8, 8)).save(torn)


def command(pictures: Path, out: Path, workers: int, assignments: Sequence[str], executor: str = "local") -> list[str]:
    """``icekit batch`` on the tabletop's backbone."""
    words = [sys.executable, "-m", "icekit", "batch", str(pictures), "--out", str(out), "--backbone", "tabletop"]
    words += ["--executor", executor, "--workers", str(workers)]
    return [*words, *(word for one in assignments for word in ("--set", one))]


def run(words: Sequence[str], status: int) -> float:
    """Run a command to its end; the processor time of its own process, seconds."""
    program = (
        "import resource, runpy, sys\n"
        "sys.argv = ['icekit', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('icekit', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as error:\n    code = error.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('processor', used.ru_utime + used.ru_stime)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *words[3:]], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status, f"exit status {done.returncode}, and not {status}: {done.stdout}"
    return float(done.stdout.rsplit("processor", 1)[1])


def killed(words: Sequence[str], out: Path, enough: int) -> int:
    """Start a batch in a session of its own and kill every process of it when so many runs are complete."""
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list(out.glob("runs/*/manifest.json"))) < enough:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(list(out.glob("runs/*/manifest.json")))


def seconds_of(out: Path) -> list[float]:
    """What each run took, from reading the picture to its thumbnail."""
    return [json.loads(line)["seconds"] for line in (out / "pictures.jsonl").read_text().splitlines()]


def stages_of(out: Path) -> list[float]:
    """What each run took by its own count."""
    return [sum(json.loads(one.read_text())["timings"].values()) for one in out.glob("runs/*/manifest.json")]


def tokens(out: Path) -> dict[str, bytes]:
    """The embeddings of each run, as they are in its file."""
    return {file.parent.name: file.read_bytes() for file in sorted(out.glob("runs/*/embeddings.safetensors"))}


@click.group()
def main() -> None:
    """Measure ``icekit batch``."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder")
@click.option("--pictures", default=40, show_default=True, help="Good ones")
@click.option("--bad", default=5, show_default=True)
@click.option("--set", "assignments", multiple=True, help="Settings of the runs")
@click.option("--also", "others", multiple=True, help="Another executor, with two workers")
def measure(out: Path, pictures: int, bad: int, assignments: tuple[str, ...], others: tuple[str, ...]) -> None:
    """One worker, two, and two that were killed."""
    draw(out / "pictures", pictures, bad)
    status = int(bad > 0)
    driver: dict[int, float] = {}
    for workers in (1, 2):
        driver[workers] = run(command(out / "pictures", out / f"by-{workers}", workers, assignments), status)
    for other in others:
        run(command(out / "pictures", out / other, 2, assignments, other), status)
    again = command(out / "pictures", out / "killed", 2, assignments)
    finished = killed(again, out / "killed", max(1, pictures // 2))
    before = {file: file.stat().st_mtime_ns for file in (out / "killed").glob("runs/*/manifest.json")}
    run(again, status)
    kept = all(file.stat().st_mtime_ns == at for file, at in before.items())

    # What a driver costs that has nothing to hand out is no cost of a picture.
    idle = run(command(out / "pictures", out / "by-2", 2, assignments), status)
    print_measured(out, pictures, bad, driver, idle, finished, kept)
    for other in others:
        took, equal = elapsed(out / other), tokens(out / other) == tokens(out / "by-1")
        click.echo(f"{other}, two workers: {took:.1f} s, {took / elapsed(out / 'by-2'):.2f} of what local took; "
                   f"tokens {'equal bit for bit' if equal else 'DIFFERENT'}")  # fmt: skip


def print_measured(
    out: Path, pictures: int, bad: int, driver: dict[int, float], idle: float, finished: int, kept: bool
) -> None:
    """The figures, a line each."""
    folders = [out / "by-1", out / "by-2", out / "killed"]
    whole = {workers: elapsed(out / f"by-{workers}") for workers in (1, 2)}
    click.echo(f"{pictures} pictures: {whole[1]:.1f} s by one worker, {whole[2]:.1f} s by two: "
               f"{whole[1] / whole[2]:.2f} times as fast")  # fmt: skip
    equal = all(tokens(one) == tokens(folders[0]) for one in folders) and len(tokens(folders[0])) == pictures
    click.echo(f"tokens by one worker, by two, and after all were killed with {finished} runs complete: "
               f"{'equal bit for bit' if equal else 'DIFFERENT'}")  # fmt: skip
    click.echo(f"runs that were complete when all were killed: {'kept' if kept else 'MADE AGAIN'}")
    for folder in folders:
        failed = [json.loads(line)["name"] for line in (folder / "failures.jsonl").read_text().splitlines()]
        runs = {file.name for file in (folder / "runs").iterdir()}
        right = sorted(failed) == [f"bad-{number}" for number in range(bad)] and runs.isdisjoint(failed)
        click.echo(f"{folder.name}: {len(failed)} failed, {'and nowhere else' if right else 'NOT AS THEY SHOULD'}")
    for workers, folder in ((1, out / "by-1"), (2, out / "by-2")):
        beside = (whole[workers] * workers - sum(seconds_of(folder))) / pictures
        around = statistics.mean(seconds_of(folder)) - statistics.mean(stages_of(folder))
        click.echo(f"{workers} worker(s): {statistics.mean(seconds_of(folder)):.2f} s a run, {around:.3f} s of it in "
                   f"no timed stage (exporters are none); {beside:.3f} s a picture between runs")  # fmt: skip
    click.echo(f"driver: {(driver[2] - idle) / pictures * 1000:.1f} ms of a processor a picture")


def elapsed(out: Path) -> float:
    """Seconds from when the first run began to when the last one ended, by the files of the runs.

    A run's line in ``pictures.jsonl`` says what it took, and its thumbnail is the last that it writes.
    """
    took = {one["name"]: one["seconds"] for one in map(json.loads, (out / "pictures.jsonl").read_text().splitlines())}
    ends = {name: (out / "thumbnails" / f"{name}.jpg").stat().st_mtime for name in took}
    return max(ends.values()) - min(ends[name] - took[name] for name in took)


@main.command()
@click.option("--runs", "source", type=click.Path(path_type=Path, exists=True), required=True, help="A batch's folder")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder")
@click.option("--count", default=2000, show_default=True, help="Runs, made from those by copying")
@click.option("--query", default="red", show_default=True, help="What is typed")
def page(source: Path, out: Path, count: int, query: str) -> None:
    """Open the page of many runs, and search in it."""
    from playwright.sync_api import sync_playwright

    from icekit.batch import Progress
    from icekit.batch.index import render_index
    from icekit.batch.record import DoneRecord

    lines = (source / "pictures.jsonl").read_text().splitlines()
    few = [DoneRecord.model_validate_json(line) for line in lines]
    (out / "thumbnails").mkdir(parents=True)
    many = []
    for number in range(count):
        one = few[number % len(few)]
        many.append(one.model_copy(update={"name": f"{one.name}-{number}"}))
        shutil.copy(source / "thumbnails" / f"{one.name}.jpg", out / "thumbnails" / f"{one.name}-{number}.jpg")
        shutil.copytree(source / "runs" / one.name, out / "runs" / f"{one.name}-{number}")
    (out / "index.html").write_text(render_index(out.name, many, Progress(count, count, 0, 0)), encoding="utf-8")
    found = next(path for path in CHROMIUM if Path(path).exists())
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        tab = browser.new_page()
        begun = time.monotonic()
        tab.goto((out / "index.html").absolute().as_uri(), wait_until="load")
        loaded = time.monotonic() - begun
        tab.wait_for_function("[...document.querySelectorAll('#runs img')].slice(0, 4).every((one) => one.complete)")
        shown = time.monotonic() - begun
        typed = []
        for end in range(1, len(query) + 1):
            script = """text => new Promise(done => {
                const box = document.getElementById("query"), begun = performance.now();
                box.value = text;
                box.dispatchEvent(new Event("input"));
                requestAnimationFrame(() => setTimeout(() => done(performance.now() - begun)));
            })"""
            typed.append(tab.evaluate(script, query[:end]))
        said = tab.locator("#count").inner_text()
        browser.close()
    size = (out / "index.html").stat().st_size
    click.echo(f"{count} runs, a page of {size / 1e6:.2f} MB: loaded in {loaded * 1000:.0f} ms, first pictures shown "
               f"in {shown * 1000:.0f} ms")  # fmt: skip
    click.echo(f"{query!r} typed: {max(typed):.0f} ms a letter at most; {said}")


if __name__ == "__main__":
    main()
