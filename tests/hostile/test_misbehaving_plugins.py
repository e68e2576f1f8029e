"""Plugins that print, exit, raise and return what they should not: named, and nobody else is the worse for them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
from icekit_process import icekit, in_this_process, plain_plugin, start
from PIL import Image
from plain_components import write_distribution

from icekit import InputError, extract, hookimpl
from icekit.bench import bench
from icekit.foreign import Ended, aside, guarded, said, watched_interrupts
from icekit.plugins import ComponentError, PluginError, Plugins, check_attribute, check_component
from icekit.protocols import Attribute, Learned, RunError
from icekit.settings import load_settings

Run = Callable[..., tuple[int, str, str]]

ENDINGS = {
    "exits": "raise SystemExit(3)",
    "exits_with_text": "import sys; sys.exit('good\\nbye')",
    "generator": "raise GeneratorExit",
    "interrupts": "raise KeyboardInterrupt",
    "group": "raise BaseExceptionGroup('many', [SystemExit(1), ValueError('x')])",
    "divides": "1 / 0",
    "unsayable": "class E(Exception):\n        def __str__(self): raise SystemExit(4)\n    raise E",
    "long": "raise ValueError('x' * 100_000 + '\\n' + 'y')",
    "deep": "def f(): f()\n    f()",
}
"""How foreign code may end, as a function's body."""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``icekit`` in this process, with the plugins of ``use``."""
    return in_this_process(tmp_path, monkeypatch, capsys)


def use(monkeypatch: pytest.MonkeyPatch, **plugins: Any) -> Plugins:
    found = plain.beside_builtins(plain=plain, **plugins)
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    return found


def ending(body: str) -> Callable[..., Any]:
    """A function that ends so, whatever it is given."""
    names: dict[str, Any] = {}
    exec(f"def ends(*given, **named):\n    {body}\n", names)
    return names["ends"]  # type: ignore[no-any-return]


def one_line(text: str) -> str:
    [line] = text.splitlines()
    assert len(line) < 1000 and "Traceback" not in line
    return line


# --- At import, in hooks and commands: through real entry points -----------------------------------------------------


@pytest.mark.slow
def test_plugins_that_end_at_import_and_in_hooks(tmp_path: Path, photo: Path) -> None:
    """In one process: each is named, stdout has the result alone, and the other plugins work."""
    site = plain_plugin(tmp_path / "site")
    noise = "print('NOISE')\nsys.__stdout__.write('NOISE')\nos.write(1, b'NOISE')\n"
    slow = "os.system('echo NOISE')\nctypes.CDLL(None).puts(b'NOISE')\n"
    source = f"import atexit, ctypes, os, sys\nfrom icekit import hookimpl\n{noise}{slow}"
    source += "atexit.register(lambda: print('NOISE'))\n"
    for hook in ("register_learners(register)", "register_commands(cli)", "region_found(region)", "step_done(step)"):
        body = noise if hook.startswith("step") else noise + slow
        source += f"@hookimpl\ndef {hook}:\n" + "".join(f"    {line}\n" for line in body.splitlines())
    write_distribution(site, "noisy", source, name="noisy-plugin")
    for name, body in ENDINGS.items():
        text = f"from icekit import hookimpl\n@hookimpl\ndef register_learners(register):\n    {body}\n"
        write_distribution(site, f"hook_{name}", text, name=f"hook-{name}")
        write_distribution(site, f"import_{name}", f"def f():\n    {body}\nf()\n", name=f"import-{name}")
    write_distribution(site, "odd_object", "odd_object = {}\n", name="odd")
    info = next(site.glob("odd-*")) / "entry_points.txt"
    info.write_text("[icekit]\nodd_object = odd_object:odd_object\nno_name = :::\n")

    options = [*plain.OPTIONS, "--set", "retriever.ghosts=0", "--set", "samples=0"]
    done = icekit(["run", photo, "--out", "out", "--json", *options], tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_version"] and "NOISE" not in done.stdout
    assert done.stderr.count("NOISE") >= 5 * 5

    expected = {f"{place}_{name}" for place in ("import", "hook") for name in ENDINGS}
    for plugin in expected:
        [line] = [line for line in done.stderr.splitlines() if f"warning: plugin {plugin!r} " in line]
        assert f"({plugin.replace('_', '-', 1)} 1.0) is broken: " in line and len(line) < 600
    for plugin, why in {
        "import_exits": "SystemExit: 3",
        "hook_exits_with_text": "SystemExit: good bye",
        "import_interrupts": "KeyboardInterrupt",
        "odd_object": "TypeError: ",
        "no_name": "",
    }.items():
        assert f"warning: plugin {plugin!r} (" in done.stderr and f" is broken: {why}" in done.stderr
    helped = icekit(["--help"], tmp_path, site)
    assert helped.returncode == 0 and "NOISE" not in helped.stdout


def test_ctrl_c_at_import_ends_the_program(tmp_path: Path) -> None:
    """Even where the plugin makes something else of it."""
    site = tmp_path / "site"
    source = (
        "import time\nopen('here', 'w').close()\ntry: time.sleep(100)\nexcept BaseException: raise ImportError('no')\n"
    )
    write_distribution(site, "slow", source, name="slow-plugin")
    process = start(["plugins"], tmp_path, site)
    while process.poll() is None and not (tmp_path / "here").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, one_line(err)) == (130, "", "icekit: interrupted")


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generator", "divides", "unsayable", "long"])
def test_a_command_that_fails_is_named(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @hookimpl
        def register_commands(self, cli: Any) -> None:
            cli.command("odd")(lambda: ending(ENDINGS[name])())

    use(monkeypatch, mine=Plugin())
    status, out, err = run("odd")
    assert (status, out) == (1, "")
    assert one_line(err).startswith("icekit: command 'odd' of plugin 'mine' (mine-plugin 1.0) failed: ")


def test_a_command_may_exit_with_its_own_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @hookimpl
        def register_commands(self, cli: Any) -> None:
            cli.command("odd")(lambda: print("MINE") or sys.exit(5))

    use(monkeypatch, mine=Plugin())
    assert run("odd") == (5, "MINE\n", "")


def test_a_command_that_is_there_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @hookimpl
        def register_commands(self, cli: Any) -> None:
            cli.command("run")(lambda: print("MINE"))

    found = use(monkeypatch, mine=Plugin())
    assert "Extract the concepts of IMAGE" in run("run", "--help")[1]
    assert [str(one) for one in found.broken] == [
        "plugin 'mine' (mine-plugin 1.0) is broken: there is a command 'run' already"
    ]


# --- Components ------------------------------------------------------------------------------------------------------

METHODS = {
    "backbone load": (plain.PlainBackbone, "__init__", "load"),
    "retriever load": (plain.PlainRetriever, "__init__", "load"),
    "retriever": (plain.PlainRetriever, "retrieve", "localise"),
    "segmentor": (plain.PlainSegmentor, "segment", "localise"),
    "learner": (plain.PlainLearner, "learn", "learn"),
    "backbone": (plain.PlainBackbone, "generate", "generate"),
    "naming": (plain.PlainBackbone, "embed_texts", "generate"),
}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        *((where, "exits_with_text") for where in METHODS),
        *(("learner", name) for name in ("interrupts", "generator", "divides", "unsayable")),
        ("retriever", "divides"),
        ("backbone load", "interrupts"),
    ],
)
def test_a_component_that_ends_is_named(
    where: str, name: str, photo: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, method, stage = METHODS[where]
    use(monkeypatch)
    options = [*plain.OPTIONS, "--set", "retriever.ghosts=0", "--set", "samples=1"]
    monkeypatch.setattr(component, method, ending(ENDINGS[name]))
    status, out, err = run("run", "photo.png", "--out", "run", *options)
    assert (status, out) == (1, "")
    role = "retriever" if "retriever" in where else where.split()[0] if where != "naming" else "backbone"
    prefix = f"icekit: {role} 'plain' of plugin 'plain' (plain-plugin 1.0) failed in stage {stage}: "
    assert one_line(err.splitlines()[-1]).startswith(prefix), err
    if name == "exits_with_text":
        assert err.splitlines()[-1] == f"{prefix}SystemExit: good bye (--traceback shows where)"
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_what_happens_in_our_own_code_is_no_components_fault(photo: Path, tmp_path: Path) -> None:
    """The learner calls us back, and we cannot write: nobody blames the learner."""
    from icekit.run.directory import RunDirectory

    class Full:
        def write(self, step: object) -> None:
            raise OSError(5, "Input/output error")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None: ...

    settings = load_settings(None, [*(f"components.{one[2:].replace('=', '=')}" for one in plain.OPTIONS), "samples=0"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(RunDirectory, "open_log", lambda self: Full())
        extract(photo, tmp_path / "run", settings, installed=plain.beside_builtins())


RETURNS = {
    "retriever": (plain.PlainRetriever, "retrieve", (None, 5, ["cup"], [None]), "a list of icekit.Candidate is right"),
    "segmentor": (plain.PlainSegmentor, "segment", (None, 5, "mask"), "as a mask: a tensor of bool "),
    "proposing": (plain.ProposingSegmentor, "propose", (None, 5, ["mask"]), "a list of icekit.Proposal is right"),
    "learner": (plain.PlainLearner, "learn", (None, {}), "an icekit.Learned is right"),
    "tokens": (plain.PlainLearner, "learn", (Learned({"<a>": None}), Learned({"<cup-0>": {}})), "of 16 tokens"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("where", RETURNS)
def test_what_a_component_returns_is_checked(
    where: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, method, values, message = RETURNS[where]
    parts = {one.split("=")[0][2:]: "plain" for one in plain.OPTIONS}
    parts |= {"segmentor": "proposing"} if where == "proposing" else {}
    settings = load_settings(options={"components": parts, "samples": 0})
    for value in values:
        monkeypatch.setattr(component, method, lambda *given, value=value, **named: value)
        with pytest.raises(RunError, match=message) as error:
            extract(photo, tmp_path / "run", settings, installed=plain.beside_builtins(), overwrite=True)
        assert len(one_line(str(error.value))) < 300


@pytest.mark.parametrize("name", ["exits", "interrupts", "generator", "divides", "unsayable"])
def test_an_observer_that_ends_is_heard_no_more(
    name: str, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Observer:
        @hookimpl
        def region_found(self, region: object) -> None:
            ending(ENDINGS[name])()

    settings = load_settings(options={"components": {one.split("=")[0][2:]: "plain" for one in plain.OPTIONS}})
    found = plain.beside_builtins(plain=plain, mine=Observer())
    run = extract(photo, tmp_path / "run", settings, installed=found)
    assert run.concepts
    [line] = caplog.messages
    assert line.startswith("plugin 'mine' (mine-plugin 1.0) failed in region_found and is ignored from here on: ")


def test_ctrl_c_in_an_observer_interrupts(photo: Path, tmp_path: Path) -> None:
    class Observer:
        @hookimpl
        def region_found(self, region: object) -> None:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("swallowed") from None

    settings = load_settings(options={"components": {one.split("=")[0][2:]: "plain" for one in plain.OPTIONS}})
    found = plain.beside_builtins(plain=plain, mine=Observer())
    with pytest.raises(KeyboardInterrupt):
        extract(photo, tmp_path / "run", settings, installed=found)


def test_settings_that_break_are_named() -> None:
    from pydantic import field_validator

    from icekit.protocols import ComponentSettings

    class Learner(plain.PlainLearner):
        class Settings(ComponentSettings):
            steps: int = 1

            @field_validator("steps")
            @classmethod
            def _breaks(cls, value: int) -> int:
                raise SystemExit(value)

    class Plugin:
        @hookimpl
        def register_learners(self, register: Any) -> None:
            register("odd", Learner)

    found = plain.beside_builtins(mine=Plugin())
    with pytest.raises(ComponentError, match=r"^learner 'odd' of plugin 'mine' .* in stage settings: SystemExit: 2$"):
        found.component_settings("learner", "odd", {"steps": 2})


# --- Metrics and data sets -------------------------------------------------------------------------------------------


def bench_with(monkeypatch: pytest.MonkeyPatch, out: Path, pictures: Path, metric: str = "seen") -> None:
    parts = {one.split("=")[0][2:]: ["plain"] for one in plain.OPTIONS}
    bench(
        "folder",
        out,
        components=parts,
        metrics=[metric],
        settings={"dataset": {"path": str(pictures)}, "retriever": {"ghosts": 0}},
        installed=plain.beside_builtins(),
    )


@pytest.mark.parametrize("method", ["__init__", "prepare", "measure"])
@pytest.mark.parametrize("name", ["exits", "divides"])
def test_a_metric_that_ends_is_named(
    name: str, method: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain.Named, method, ending(ENDINGS[name]))
    stage = "load" if method == "__init__" else method
    with pytest.raises(
        RunError, match=rf"^metric 'seen' of plugin 'plain' \(plain-plugin 1.0\) failed in stage {stage}: "
    ):
        bench_with(monkeypatch, tmp_path / "bench", tmp_path)


def test_what_a_metric_returns_is_checked(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, value in enumerate((None, 5, {"named": 0.5})):
        monkeypatch.setattr(plain.Named, "measure", lambda *given, value=value: value)
        with pytest.raises(
            RunError, match=r"^metric 'seen' of plugin 'plain' \(plain-plugin 1.0\) returned .* icekit.Score is"
        ):
            bench_with(monkeypatch, tmp_path / f"bench-{number}", tmp_path)


@pytest.mark.parametrize("name", ["exits", "divides"])
def test_a_data_set_that_ends_is_named(name: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from icekit.builtin.datasets.folder import FolderDataset

    for method in ("__init__", "pictures"):
        with monkeypatch.context() as patch:
            patch.setattr(FolderDataset, method, ending(ENDINGS[name]))
            with pytest.raises(RunError, match=r"^data ?set 'folder' of plugin 'builtin' .* failed in stage load: "):
                bench_with(monkeypatch, tmp_path / "bench", tmp_path)
    monkeypatch.setattr(FolderDataset, "pictures", lambda *given: ["picture"])
    with pytest.raises(RunError, match=r"^dataset 'folder' of plugin .* has str \('picture'\) among its pictures"):
        bench_with(monkeypatch, tmp_path / "bench", tmp_path)


# --- What is registered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [5, None, "", "a b", "../x", "a.b", "x\0", b"x"])
def test_names_that_a_component_cannot_have(name: Any) -> None:
    class Plugin:
        @hookimpl
        def register_learners(self, register: Any) -> None:
            register(name, plain.PlainLearner)

    found = plain.beside_builtins(mine=Plugin())
    with pytest.raises(InputError, match="cannot be a learner's name"):
        found.component("learner", "odd")


def test_methods_that_cannot_be_called() -> None:
    for method in (lambda self: None, lambda self, view, word: None, lambda self, *, view: None):
        odd = type("Odd", (plain.PlainSegmentor,), {"segment": method})
        with pytest.raises(PluginError, match=r"segment.* cannot be called as segment"):
            check_component("segmentor", "odd", odd)
    with pytest.raises(PluginError, match="has the preset 5"):
        check_component("backbone", "odd", type("Odd", (plain.PlainBackbone,), {"preset": 5}))


@pytest.mark.parametrize(
    "values",
    [
        {"name": 5},
        {"anchor": None},
        {"anchor": ""},
        {"vocabulary": "red"},
        {"vocabulary": (5,)},
        {"vocabulary": ("",)},
        {"aliases": None},
    ],
)
def test_attributes_of_the_wrong_shape(values: dict[str, Any]) -> None:
    with pytest.raises(PluginError) as error:
        check_attribute(Attribute(**({"name": "mood", "anchor": "mood", "vocabulary": ("gay",)} | values)))
    assert "mood" in one_line(str(error.value)) or "5" in str(error.value)


# --- The guards themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDINGS)
def test_what_leaves_a_guard_is_an_exception(name: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Exception) as error, guarded():
        ending(ENDINGS[name])()
    assert len(one_line(said(error.value))) <= 440
    assert signal.getsignal(signal.SIGINT) is before


def test_guards_in_threads() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with guarded():
                raise KeyboardInterrupt
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(one) for one in caught] == [Ended]


def test_a_handler_that_foreign_code_sets_is_taken_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with guarded(), guarded():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
    with watched_interrupts() as interrupted:
        assert not interrupted()


def test_what_is_printed_aside(capfd: pytest.CaptureFixture[str]) -> None:
    def lines() -> Iterator[str]:
        yield "python"
        yield "descriptor"

    with capfd.disabled():
        pass
    print("before")
    with aside():
        for line in lines():
            print(line) if line == "python" else os.write(1, f"{line}\n".encode())
        with aside():
            sys.stdout.write("nested\n")
        sys.stdout.close()
        sys.stdout.flush()
    print("after")
    out, err = capfd.readouterr()
    assert out.split() == ["before", "after"]
    assert sorted(err.split()) == ["descriptor", "nested", "python"]
