"""The command line as a process: exit status, one clear line on stderr, results on stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import plain_components as plain
import pytest
from icekit_process import environment, icekit, in_this_process, plain_plugin, start
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
SAMPLES = ["--set", "samples=1", "--set", "sample_steps=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    plain_plugin(folder / "plugin")
    Image.new("RGB", (60, 50), "red").save(folder / "photo.png")
    Image.new("RGB", (60, 50), "blue").save(folder / "other.png")  # no test finishes a run with it
    (folder / "text.png").write_text("no image")
    (folder / "settings.toml").write_text('seed = 2\n[components]\nlearner = "plain"\n[learner]\nsteps = 3\n')
    return folder


def in_process(place: Path, *arguments: str | Path) -> tuple[int, str, str]:
    """A process of its own, plugins by their entry points: what a user meets."""
    done = icekit(arguments, place, place / "plugin")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same in this process, with the same plugins: a new one would import torch again."""
    return in_this_process(place, monkeypatch, capsys)


def test_table_and_manifest(place: Path, run: Run) -> None:
    status, out, err = in_process(place, "run", "photo.png", *plain.OPTIONS, *SAMPLES)
    assert status == 0, err
    assert [line.split()[:2] for line in out.splitlines()[1:5]] == [
        ["0", "cup"],
        ["1", "red-bowl"],
        ["2", "vase"],
        ["3", "ball"],
    ]
    assert "<red-bowl-1-material>" in out
    assert "learning tokens" in err
    assert "\x1b" not in out + err
    assert (place / "runs" / "photo" / "manifest.json").is_file()

    status, out, err = run("run", "photo.png", "--resume", "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads((place / "runs" / "photo" / "manifest.json").read_text())

    status, out, err = run("compose", "a {b.colour} cup", "b=runs/photo:red-bowl", "--n", "2", "--json")
    assert status == 0, err
    assert json.loads(out)["images"] == ["0.png", "1.png"]

    (place / "runs" / "photo" / "report.html").unlink()
    status, out, err = run("report", "runs/photo")
    assert (status, out.strip()) == (0, "runs/photo/report.html")
    assert (place / "runs" / "photo" / "report.html").is_file()


def test_layers_of_settings(place: Path, run: Run) -> None:
    arguments = ["--config", "settings.toml", "--set", "learner.steps=4", "--set", "seed=3", "--seed", "4"]
    status, out, err = run(
        "run", "photo.png", "--out", "layers", *plain.OPTIONS[:3], *SAMPLES, *arguments, "--attribute", "color",
        "--max-concepts", "1", "--device", "cpu", "--json",
    )  # fmt: skip
    assert status == 0, err
    manifest = json.loads(out)
    assert (manifest["seed"], manifest["attributes"], len(manifest["concepts"])) == (4, ["colour"], 1)
    assert len((place / "layers" / "log.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "nope.png"], "no such file: nope.png"),
        (["run", "text.png"], "text.png is not an image"),
        (["run", "plugin"], "plugin is a folder"),
        (["run", "other.png", "--out", "plugin"], "no run of icekit's"),
        (["run", "other.png", "--learner", "icy"], "no learner 'icy': did you mean 'ice'?"),
        (["run", "other.png", "--attribute", "colr"], "no attribute 'colr': did you mean 'colour'?"),
        (["run", "other.png", "--set", "learner.stps=3"], "did you mean 'learner.steps'?"),
        (["run", "other.png", "--set", "min_visible=high"], "setting 'min_visible' cannot be 'high'"),
        (["run", "other.png", "--set", "steps"], "expected KEY=VALUE"),
        (["run", "other.png", "--config", "nope.toml"], "settings file nope.toml"),
        (["run", "other.png", "--device", "tpu"], "'auto', 'cpu', 'cuda' or 'mps'"),
        (["run", "other.png", "--seed", "x"], "'x' is not a valid integer"),
        (["run", "other.png", "--retreiver", "clip"], "--retriever"),
        (["run"], "Missing argument 'IMAGE'"),
        (["rnu", "other.png"], "No such command 'rnu'"),
        (["compose", "{a}", "a"], "expected NAME=RUN_DIR"),
        (["compose", "{a}", "a=x", "a=y"], "given twice"),
        (["compose", "{a}", "a=nowhere"], "no such run directory: nowhere"),
        (["report", "plugin"], "is not a run directory"),
        (["plugins", "show", "ise"], "did you mean 'ice'?"),
    ],
)
def test_wrong_input(run: Run, arguments: list[str], hint: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert hint in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_wrong_input_as_a_user_meets_it(place: Path) -> None:
    status, out, err = in_process(place, "run", "other.png", "--learner", "icy")
    assert (status, out) == (2, "")
    assert err.startswith("icekit: no learner 'icy': did you mean 'ice'?")
    assert err.count("\n") == 1


def test_failed_run(place: Path, run: Run) -> None:
    command = ["run", "photo.png", "--out", "failed", *plain.OPTIONS, "--set", "learner.fail_at=2", "--set"]
    status, _, err = run(*command, "retriever.ghosts=5")
    assert status == 1
    assert "no concept found" in err.splitlines()[-1]
    status, _, err = in_process(place, *command, "retriever.ghosts=0", "--overwrite")
    assert status == 1
    assert err.splitlines()[-1] == (
        "icekit: learner 'plain' of plugin 'plain_plugin' (plain-plugin 1.0) failed in stage learn: "
        "ValueError: two lines (--traceback shows where)"
    )
    assert "Traceback" not in err
    status, _, err = run(*command, "retriever.ghosts=0", "--overwrite", "--traceback")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert "in learn" in err


@pytest.mark.slow
def test_interrupted(place: Path, run: Run) -> None:
    command = ["run", "photo.png", "--out", "interrupted", *plain.OPTIONS, *SAMPLES, "--set", "learner.pause=0.1"]
    process = start(command, place, place / "plugin")
    log = place / "interrupted" / "log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "icekit: interrupted: `icekit run photo.png --out interrupted --resume` goes on"
    assert "Traceback" not in err
    status, _, err = run(*command, "--resume")
    assert status == 0, err


def test_help(run: Run) -> None:
    for arguments in (["--help"], ["run", "--help"], ["compose", "-h"], ["plugins", "--help"], []):
        status, out, _ = run(*arguments)
        assert status == 0
        assert "Usage: icekit" in out
    assert run("--version")[1].startswith("icekit ")


def test_what_needs_no_model_does_not_wait_for_torch(place: Path) -> None:
    commands = ["--help", "--version", "run --help", "bench --help", "plugins list", "plugins new --help"]
    commands += [f"plugins show {name}" for name in ("ice", "clip", "sd21", "sim_i_dino", "published", "colour")]
    code = (
        "import sys, icekit.cli.program\n"
        f"for command in {commands}:\n"
        "    try: icekit.cli.program.main(command.split())\n"
        "    except SystemExit as end: assert not end.code\n"
        "    heavy = {'torch', 'numpy', 'diffusers', 'open_clip', 'transformers', 'PIL'} & set(sys.modules)\n"
        "    assert not heavy, f'{command} imports {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment(), capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("shell", "words", "expected"),
    [
        ("bash", "run photo.jpg --retriever ", {"clip", "splice", "words"}),
        ("bash", "run photo.jpg --attribute ", {"colour", "material"}),
        ("bash", "run photo.jpg --set learner.intrinsic_tr", {"learner.intrinsic_triplet_weight="}),
        ("bash", "bench fold", {"folder"}),
        ("zsh", "run photo.jpg --segmentor x", {"xattn"}),
        ("zsh", "run photo.jpg --preset publ", {"published"}),
        ("zsh", "bench folder --metric sim_i", {"sim_i", "sim_i_dino"}),
        ("fish", "run photo.jpg --learner i", {"ice"}),
        ("fish", "plugins show xa", {"xattn"}),
        ("fish", "plugins new gloss --kind att", {"attribute"}),
        ("fish", "pl", {"plugins"}),
    ],
)
def test_completion(place: Path, shell: str, words: str, expected: set[str]) -> None:
    """As the shell asks for it: with what was typed in the environment, click's protocol."""
    typed = f"icekit {words}"
    before, _, last = typed.rpartition(" ")
    variables = (
        {"COMP_WORDS": before, "COMP_CWORD": last}
        if shell == "fish"
        else {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - bool(last))}
    )
    done = subprocess.run(
        [sys.executable, "-m", "icekit"],
        cwd=place,
        env=environment() | variables | {"_ICEKIT_COMPLETE": f"{shell}_complete"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    found = {
        "bash": lambda line: line.partition(",")[2],
        "zsh": lambda line: line,
        "fish": lambda line: line.partition(",")[2].partition("\t")[0],
    }[shell]
    assert expected <= {found(line) for line in done.stdout.splitlines()}


def test_plugins_show(run: Run) -> None:
    status, out, _ = run("plugins", "show", "plain")
    assert status == 0
    for text in (
        "backbone plain",
        "learner plain",
        "learner.steps = 20  (int)",
        "steps of the walk",
        "plain-plugin 1.0",
    ):
        assert text in out
    status, out, _ = run("plugins", "show", "color", "--json")
    assert json.loads(out)[0]["name"] == "colour"
