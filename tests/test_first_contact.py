"""What somebody meets first: no network, a demo, a picture that the small model does not know, tables on a terminal."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import torch
from icekit_process import Call, in_this_process, with_what_is_installed
from PIL import Image
from rich.cells import cell_len

import icekit
from icekit import Demo, InputError, Located, Region, Settings
from icekit.cli import demo as demo_command
from icekit.cli.common import print_table, table_of
from icekit.model_files import check_within_reach
from icekit.plugins import installed
from icekit.run.models import load_backbone

ROOT = Path(__file__).resolve().parents[1]
BOTH_WAYS = r'with --model; or see icekit at work with .*: `pip install "icekit\[demo\]"`, then `icekit demo`$'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 50), "red").save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return in_this_process(place, monkeypatch, capsys)


# --- Without a network -----------------------------------------------------------------------------------------------


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """The address of a hub that takes requests and never answers: the worst that a network can do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_both_ways_out_are_told_within_seconds(place: Path, silent_hub: str) -> None:
    told = {"HF_ENDPOINT": silent_hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "cache")}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "icekit", "run", "photo.png"],
        cwd=place,
        env=os.environ | told,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - begun
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no network: no answer in 3 s, and the cache has not got" in done.stderr
    assert re.search(BOTH_WAYS, done.stderr.strip())
    alone = os.getloadavg()[0] < 1  # other tests run beside this one, and the program starts slowly
    assert seconds < (5 if alone else 20)
    assert not (place / "runs").exists()


def test_without_waiting_where_the_cache_alone_is_to_be_used(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    status, out, err = call("run", "photo.png")
    assert (status, out) == (2, "") and "does not give it: offline, and the cache has not got model_index.json" in err
    assert re.search(BOTH_WAYS, err.strip())
    with pytest.raises(InputError, match=r'as in Settings\(backbone={"model": FOLDER}\); or see icekit at work'):
        check_within_reach("somebody/model")

    snapshot = place / "cache" / "models--somebody--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    check_within_reach("somebody/model")  # it is here; whoever loads it says what is wrong with it
    check_within_reach(str(place))


# --- The demo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain backbone brings a demo, and small settings."""
    brings = Demo("package:icekit_tabletop/demo.png", {"learn": 16.0, "generate": 44.0}, "one core")
    monkeypatch.setattr(plain.PlainBackbone.Settings, "demo", brings, raising=False)
    small = Settings(components=plain.NAMES, samples=1, sample_steps=1, max_concepts=1)
    monkeypatch.setattr(demo_command, "Settings", lambda components: small)


@pytest.mark.usefixtures("shown")
def test_the_demo(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda page: bool(opened.append(page)) or True)
    status, out, err = call("demo")
    assert status == 0, err
    assert err.startswith("the whole method with backbone plain on demo.png: about a minute (measured on one core)\n")
    assert re.search(r"at this machine's pace about \d+ seconds to go", err)
    assert "<cup-0-colour>" in out and out.endswith("page: runs/demo/report.html\n")
    assert "next: icekit compose 'a photo of a cup {a.colour}' a=runs/demo" in err
    assert not opened  # this is no terminal

    status, out, err = call("demo", "--open")  # it is there, and shown
    assert (status, opened) == (0, [(place / "runs" / "demo" / "report.html").as_uri()]), err
    assert "learning tokens" not in err
    monkeypatch.setattr("webbrowser.open", lambda page: False)
    assert "no browser was found to open it: file://" in call("demo", "--open")[2]


def test_when_a_page_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not demo_command._has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.get", lambda: object())
    assert demo_command._has_browser()


def test_without_a_model_for_a_demo(call: Call) -> None:
    status, out, err = call("demo")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert '`pip install "icekit[demo]"` brings one; `icekit run IMAGE --model FOLDER` takes a model of yours' in err


def test_a_demo_of_another_backbone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = with_what_is_installed(place, monkeypatch, capsys)
    assert "backbone 'sd21' brings no demo: choose from tabletop" in call("demo", "--backbone", "sd21")[2]
    assert "no backbone 'tabeltop': did you mean 'tabletop'?" in call("demo", "--backbone", "tabeltop")[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_from_wheels(tmp_path: Path) -> None:
    """As somebody meets it who has installed ``icekit[demo]``, in a folder of their own."""
    uv, venv, wheels = Path(sys.executable).with_name("uv"), tmp_path / "venv", tmp_path / "wheels"

    def do(*words: str | Path) -> str:
        done = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    do(uv, "venv", "--quiet", "--offline", "--python", sys.executable, venv)
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    build = [uv, "build", "--quiet", "--offline", "--wheel", "--no-build-isolation", "--python", sys.executable]
    for source in (ROOT, ROOT / "plugins" / "icekit-tabletop"):
        do(*build, "--out-dir", wheels, source)
    install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", venv / "bin" / "python"]
    do(*install, *sorted(wheels.glob("*.whl")))
    where = "import icekit, icekit_tabletop; print(icekit.__file__, icekit_tabletop.__file__)"
    assert do(venv / "bin" / "python", "-P", "-c", where).count(str(venv)) == 2
    [metadata] = packages.glob("icekit-*.dist-info/METADATA")
    assert "Requires-Dist: icekit-tabletop<0.2,>=0.1; extra == 'demo'" in metadata.read_text()
    assert do(venv / "bin" / "icekit", "demo").endswith("page: runs/demo/report.html\n")
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


def test_the_demos_picture_is_the_examples() -> None:
    shipped = ROOT / "plugins" / "icekit-tabletop" / "icekit_tabletop" / "demo.png"
    assert shipped.read_bytes() == (ROOT / "examples" / "tabletop.png").read_bytes()


# --- A picture that the small model does not know --------------------------------------------------------------------


def test_a_photograph_for_the_tabletop(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    from skimage import data

    Image.fromarray(data.coffee()).save(place / "coffee.png")
    found = installed()
    settings = Settings(backbone="tabletop", learner="words", samples=0, exporters=())
    backbone = load_backbone(found, found.resolve(settings), torch.device("cpu"))
    region = Region(0, "cup", 0.3, torch.ones(64, 64, dtype=torch.bool))  # stage one has no part in it
    given: dict[str, Any] = {"backbone": backbone, "located": Located((region,), finished=True), "installed": found}

    run = icekit.extract(place / "coffee.png", place / "run", settings, **given)
    [warning] = run.record.warnings
    assert f"{place}/coffee.png is unlike all that backbone 'tabletop' knows, which is ten shapes on a table" in warning
    assert re.search(r"\(denoising error 0\.[45]\d; pictures that it knows have at most 0\.25\)$", warning)
    assert f"warning: {warning}" in caplog.text and "&#9888;" in run._repr_html_()
    assert run.record.evaluations["familiarity"].forward == 4

    caplog.clear()
    run = icekit.extract(ROOT / "examples" / "tabletop.png", place / "known", settings, **given)
    assert run.record.warnings == [] and "unlike" not in caplog.text


# --- Tables ----------------------------------------------------------------------------------------------------------

ANSI = re.compile(r"\x1b\[[\d;]*m")
TOKENS = [f"<bottle-of-olive-oil-0{part}>" for part in ("", "-instance", "-colour", "-material", "-texture")]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 300])
def test_tables_break_no_token(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    table = table_of("", "concept", "score", "area", "colour", "material", "tokens")
    table.add_row("0", "bottle-of-olive-oil", "0.41", "12%", "dark green, 杯, red", "glass, stone", " ".join(TOKENS))
    table.add_row("1", "cup", "0.30", "7%", "white", "–", "<cup-1>")
    print_table(table)
    lines = ANSI.sub("", capsys.readouterr().out).splitlines()
    for token in [*TOKENS, "bottle-of-olive-oil", "<cup-1>"]:
        assert any(token in line for line in lines), (token, lines)
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    assert width < 300 or any("dark green, 杯, red" in line and "glass, stone" in line for line in lines)


def test_commands_on_a_narrow_terminal(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_run = [*plain.OPTIONS, "--set", "samples=0", "--max-concepts", "2", "--out", "run"]
    assert call("run", "photo.png", *plain_run)[0] == 0
    for width in (60, 80, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        for arguments in (["run", "photo.png", "--out", "run", "--resume"], ["plugins"]):
            lines = ANSI.sub("", call(*arguments)[1]).splitlines()
            assert lines and max(cell_len(line.rstrip()) for line in lines) <= width, (arguments, lines)
            if arguments[0] == "run":
                assert all(
                    any(f"<red-bowl-1{part}>" in line for line in lines) for part in ("", "-instance", "-colour")
                )
