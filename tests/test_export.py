"""Exporters: what they write into run directories and other folders, of third parties, and what becomes of it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import tomli_w
from icekit_process import icekit as in_a_process
from icekit_process import in_this_process, plain_plugin
from PIL import Image
from plain_components import write_distribution
from pydantic import Field

from icekit import ComponentSettings, Extraction, InputError, Plugins, export, extract, hookimpl
from icekit.plugins import ComponentError
from icekit.run.exporting import ExportError
from icekit.run.exports import STAGING
from icekit.run.ownership import EXPORTS, EXPORTS_LOCK, LOCK
from icekit.settings import load_settings

Icekit = Callable[..., tuple[int, str, str]]
RUN = ["run", "photo.png", *plain.OPTIONS, "--set", "samples=0", "--set", "learner.steps=2"]

TOKENS = '''\
"""A plugin of another distribution."""

from icekit import ComponentSettings, hookimpl
from pydantic import Field


class Tokens:
    """A text file for each concept."""

    class Settings(ComponentSettings):
        """How it is written."""

        between: str = Field(" ", description="between the tokens")

    def __init__(self, settings):
        self.settings = settings

    def files(self, extraction):
        return [f"tokens/{concept.label}-{concept.index}.txt" for concept in extraction.concepts]

    def export(self, extraction, folder):
        print("on standard output")
        (folder / "tokens").mkdir()
        for name, concept in zip(self.files(extraction), extraction.concepts, strict=True):
            (folder / name).write_text(self.settings.between.join(concept.tokens.values()))


@hookimpl
def register_exporters(register):
    register("tokens", Tokens)
'''


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {*tree(folder)} - {EXPORTS}


# --- A third party's, in processes of their own -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain components and the exporter ``tokens``, installed."""
    folder = plain_plugin(tmp_path_factory.mktemp("site"))
    return write_distribution(folder, "tokens", TOKENS, name="icekit-tokens", version="0.3")


@pytest.mark.slow
def test_an_exporter_of_another_distribution(tmp_path: Path, site: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    listed = in_a_process(["plugins", "list", "--json"], tmp_path, site)
    [found] = [one for one in json.loads(listed.stdout)["plugins"] if one["name"] == "tokens"]
    assert (found["kind"], found["distribution"], found["version"]) == ("exporter", "icekit-tokens", "0.3")

    settings = ["--set", 'exporters=["tokens","report"]', "--set", "exporter.tokens.between=+"]
    done = in_a_process([*RUN, "--out", "run", "--max-concepts", "2", *settings], tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert "on standard output" in done.stderr and "on standard output" not in done.stdout
    run = tmp_path / "run"
    files = {"tokens/cup-0.txt", "tokens/red-bowl-1.txt", "report.html"}
    assert files | {EXPORTS} <= names(run) | {EXPORTS}
    assert (run / "tokens" / "cup-0.txt").read_text() == "<cup-0>+<cup-0-instance>+<cup-0-colour>+<cup-0-material>"
    assert {*Extraction.open(run).manifest["files"]} == {*tree(run)}

    # Into a folder of its own, which has files of somebody else.
    (tmp_path / "other" / "tokens").mkdir(parents=True)
    (tmp_path / "other" / "tokens" / "mine.txt").write_text("mine")
    typed = ["export", "run", "--format", "tokens", "--out", "other"]
    done = in_a_process(typed, tmp_path, site)
    assert (done.returncode, done.stdout) == (0, "other/tokens/cup-0.txt\nother/tokens/red-bowl-1.txt\n"), done.stderr
    assert "+" in (tmp_path / "other" / "tokens" / "cup-0.txt").read_text()  # as the run's settings say
    done = in_a_process([*typed, "--set", "between=|"], tmp_path, site)
    assert done.returncode == 0
    assert "<cup-0>|<cup-0-instance>" in (tmp_path / "other" / "tokens" / "cup-0.txt").read_text()
    assert names(tmp_path / "other") == {"tokens/mine.txt", "tokens/cup-0.txt", "tokens/red-bowl-1.txt"}
    assert names(run) == {*Extraction.open(run).manifest["files"]} - {EXPORTS}

    # Without the plugin: who was it?
    done = in_a_process(["export", "run", "--format", "tokens"], tmp_path, plain_plugin(tmp_path / "without"))
    assert (done.returncode, done.stderr) == (
        2,
        "icekit: no exporter 'tokens': choose from a1111, comfyui, diffusers, invokeai, plain, report\n",
    )


# --- In this process --------------------------------------------------------------------------------------------------


class Labels:
    """A file for each concept, and one for the run."""

    class Settings(ComponentSettings):
        """What is in them."""

        text: str = Field("a", description="what is in each file")

    wrong: Callable[[Any, Extraction, Path], None] | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def files(self, extraction: Extraction) -> Sequence[str]:
        return [*(f"labels/{one.index}-{one.label}.txt" for one in extraction.concepts), "labels.txt"]

    def export(self, extraction: Extraction, folder: Path) -> None:
        (folder / "labels").mkdir()
        for name in self.files(extraction):
            (folder / name).write_text(self.settings.text)
        if self.wrong is not None:
            self.wrong(extraction, folder)


class Others(Labels):
    """The same files."""


class Weights(Labels):
    """Files that a run directory has for itself."""

    def files(self, extraction: Extraction) -> Sequence[str]:
        return ["lora.safetensors"]

    def export(self, extraction: Extraction, folder: Path) -> None:
        (folder / "lora.safetensors").write_text("w")


@hookimpl
def register_exporters(register: Any) -> None:
    register("labels", Labels)
    register("others", Others)
    register("weights", Weights)


@hookimpl
def register_presets(register: Any) -> None:
    if Path("some.toml").is_file():
        register("some", Path("some.toml"))


class Plugin:
    register_exporters = staticmethod(register_exporters)
    register_presets = staticmethod(register_presets)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    return plain.beside_builtins(plain=plain, labels=Plugin())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def icekit(place: Path, found: Plugins, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Icekit:
    call = in_this_process(place, monkeypatch, capsys)
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    return call


def run(icekit: Icekit, concepts: int = 2, *options: str) -> tuple[int, str, str]:
    labels = ["--set", 'exporters=["labels"]']
    return icekit(*RUN, "--out", "run", "--max-concepts", str(concepts), *labels, *options)


def refused(result: tuple[int, str, str], *hints: str, status: int = 2) -> None:
    assert (result[0], result[1], len(result[2].splitlines())) == (status, "", 1), result
    assert all(hint in result[2] for hint in hints), result


def test_overwrite_deletes_what_exporters_wrote_and_nothing_else(icekit: Icekit, place: Path) -> None:
    assert run(icekit)[0] == 0
    assert icekit("export", "run", "--format", "report")[0] == 0  # later, and not by the run's settings
    mine = ["labels/2-mine.txt", "notes.txt", "labels.html"]
    for name in mine:
        (place / "run" / name).write_text("mine")
    assert {"labels/0-cup.txt", "labels/1-red-bowl.txt", "labels.txt", "report.html"} <= names(place / "run")
    status, _, err = run(icekit, 1, "--overwrite")
    assert status == 0, err
    assert {one for one in names(place / "run") if "label" in one} == {
        "labels/0-cup.txt",
        "labels.txt",
        *mine[:1],
        mine[2],
    }
    assert not (place / "run" / "report.html").exists()
    assert [(place / "run" / name).read_text() for name in mine] == ["mine"] * 3
    status, _, err = run(icekit, 1, "--overwrite", "--set", "exporters=[]")
    assert status == 0, err
    assert {one for one in tree(place / "run") if "label" in one or "icekit" in one} == {mine[0], mine[2]}


def test_exported_again_it_replaces_its_own(icekit: Icekit, place: Path) -> None:
    assert run(icekit)[0] == 0
    before = tree(place / "run")
    assert icekit("export", "run", "--format", "labels", "--set", "text=b")[0] == 0
    after = tree(place / "run")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {
        "labels.txt", "labels/0-cup.txt", "labels/1-red-bowl.txt",
    }  # fmt: skip
    # A folder takes what is of several runs, as far as no name is taken.
    assert icekit("export", "run", "--format", "labels", "--out", "all")[0] == 0
    (place / "run").rename(place / "first")
    assert run(icekit, 1)[0] == 0
    refused(
        icekit("export", "first", "--format", "labels", "--out", "all"),
        "all/labels.txt is in the way: exporter 'labels' wrote it of the run",
        "choose another --out",
    )
    # The same place, another run by now: what it has no more goes.
    assert icekit("export", "run", "--format", "labels", "--out", "all")[0] == 0
    assert names(place / "all") == {"labels.txt", "labels/0-cup.txt"}


def test_what_is_in_the_way_is_not_replaced(icekit: Icekit, place: Path) -> None:
    assert run(icekit, 1, "--set", "exporters=[]")[0] == 0
    (place / "run" / "labels").mkdir()
    (place / "run" / "labels" / "0-cup.txt").write_text("mine")
    before = tree(place / "run")
    refused(
        icekit("export", "run", "--format", "labels"), "run/labels/0-cup.txt is in the way: icekit did not write it"
    )
    (place / "run" / "labels" / "0-cup.txt").unlink()
    (place / "run" / "labels").rmdir()
    (place / "elsewhere").mkdir()
    (place / "run" / "labels").symlink_to(place / "elsewhere")
    refused(icekit("export", "run", "--format", "labels"), "run/labels is a symbolic link")
    (place / "run" / "labels").unlink()
    (place / "run" / "labels").write_text("mine")
    refused(icekit("export", "run", "--format", "labels"), "run/labels is in the way")
    assert [*before] != [*tree(place / "run")] and list((place / "elsewhere").iterdir()) == []
    (place / "run" / "labels").unlink()
    assert icekit("export", "run", "--format", "labels")[0] == 0
    refused(icekit("export", "run", "--format", "others"), "run/labels.txt is in the way: exporter 'labels' wrote it;")
    refused(
        icekit("export", "run", "--format", "weights"),
        "exporter 'weights' writes lora.safetensors, and a run directory has such files of its own",
        "--out DIR",
    )
    assert icekit("export", "run", "--format", "weights", "--out", "weights")[0] == 0
    refused(icekit("export", "run", "--format", "labels", "--out", "photo.png"), "photo.png is a file")
    refused(icekit("export", "run", "--format", "lables"), "no exporter 'lables': did you mean 'labels'?")
    refused(icekit("export", "nowhere", "--format", "labels"), "no such run directory: nowhere")
    refused(
        icekit("export", "run", "--format", "labels", "--set", "txet=a"),
        "unknown setting 'exporter.labels.txet': did you mean 'exporter.labels.text'?",
    )
    refused(icekit("export", "run", "--format", "labels", "--set", "text"), "expected KEY=VALUE")
    (place / "run" / EXPORTS).write_text("{")
    refused(icekit("export", "run", "--format", "labels"), EXPORTS, "is damaged", "delete it")


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "run/../../photo.png"])
def test_a_record_of_somebody_else_reaches_nothing_outside(icekit: Icekit, place: Path, name: str) -> None:
    assert run(icekit, 1)[0] == 0
    for file in ("a", "b"):
        (place / file).write_text("mine")
    (place / "run" / EXPORTS).write_text(json.dumps({"exports": [{"exporter": "labels", "files": [name]}]}))
    refused(icekit("export", "run", "--format", "labels"), "should be a file inside the directory")
    run(icekit, 1, "--overwrite")
    assert (place / "a").read_text() == (place / "b").read_text() == "mine" and (place / "photo.png").is_file()


# --- Exporters that are wrong -----------------------------------------------------------------------------------------


def leave(*_: Any) -> None:
    raise SystemExit(3)


def divide(*_: Any) -> None:
    raise ZeroDivisionError("division by zero")


def refuse(*_: Any) -> None:
    raise InputError("this run cannot be written so")


def write_more(_: Any, folder: Path) -> None:
    (folder / "more.txt").write_text("more")


def write_less(_: Any, folder: Path) -> None:
    (folder / "labels.txt").unlink()


def write_link(_: Any, folder: Path) -> None:
    (folder / "labels.txt").unlink()
    (folder / "labels.txt").symlink_to("/etc/hostname")


NAMED = "exporter 'labels' of plugin 'labels' (labels-plugin 1.0)"
WRONG: dict[str, tuple[Callable[..., None], int, str]] = {
    "raises": (divide, 1, f"{NAMED} failed in stage export: ZeroDivisionError: division by zero"),
    "exits": (leave, 1, f"{NAMED} failed in stage export: SystemExit: 3"),
    "refuses": (refuse, 2, "this run cannot be written so"),
    "writes more": (write_more, 1, f"{NAMED} wrote more.txt, which it had not declared"),
    "writes less": (write_less, 1, f"{NAMED} declared labels.txt and did not write it"),
    "writes a link": (write_link, 1, f"{NAMED} wrote 'labels.txt' as a link"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failure_is_named_and_leaves_the_run_complete(
    icekit: Icekit, place: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    fault, status, message = WRONG[wrong]
    with monkeypatch.context() as patched:
        patched.setattr(Labels, "wrong", staticmethod(fault))
        got, out, err = run(icekit, 1, "--set", 'exporters=["labels","report"]')
        last = err.splitlines()[-1]
        assert got == 1 and "cup" in out and NAMED in last and message in last
        assert "the run is complete; `icekit export run --format labels` writes what is missing" in last
        assert err.count("\n") == err.count("\n", 0, err.index(last)) + 1
        complete = tree(place / "run")
        assert "report.html" in complete and "manifest.json" in complete  # the others go on
        assert not [one for one in complete if "labels" in one]
        refused(icekit("export", "run", "--format", "labels"), message, status=status)
        assert tree(place / "run") == complete
        assert icekit(*RUN, "--out", "run", "--resume")[0] == 0  # it is complete, and stays as it is
    assert icekit("export", "run", "--format", "labels")[0] == 0
    assert tree(place / "run").keys() == complete.keys() | {"labels.txt", "labels/0-cup.txt"}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("labels.txt", "declares 'labels.txt' as its files: it should be a list of names"),
        (None, "declares None as its files"),
        ([3], "declares 3 as a file"),
        (["../labels.txt"], "declares the file '../labels.txt': it should be in the folder"),
        (["/labels.txt"], "declares the file '/labels.txt'"),
        (["a//b"], "declares the file 'a//b'"),
        (["a\nb"], "declares the file 'a\\nb'"),
        (["a", "A"], "declares 'A' and 'a': names should differ in more than case"),
        (["a", "a/b"], "declares 'a' as a file and as a folder"),
        (["a" * 250], "a name should have 195 bytes at most"),
        ([EXPORTS], "which icekit has for itself"),
        ([".next/a"], "which icekit has for itself"),
    ],
)
def test_wrong_names_are_refused(
    icekit: Icekit, place: Path, found: Plugins, monkeypatch: pytest.MonkeyPatch, declared: Any, message: str
) -> None:
    settings = load_settings(options={"components": plain.NAMES, "samples": 0, "max_concepts": 1, "exporters": []})
    extract(place / "photo.png", "run", settings, installed=found)
    before = tree(place)
    monkeypatch.setattr(Labels, "files", lambda self, extraction: declared)
    with pytest.raises(ComponentError) as error:
        export("run", "labels", "out", installed=found)
    assert str(error.value).startswith(f"{NAMED} declares ") and message in str(error.value)
    assert tree(place) == before


def test_a_run_from_python_says_so_too(place: Path, found: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(Labels, "wrong", staticmethod(divide))
    told: list[str] = []

    class Observer:
        @hookimpl
        def stage_started(self, name: str) -> None:
            told.append(name)

        @hookimpl
        def run_finished(self) -> None:
            told.append("finished")

        @hookimpl
        def run_failed(self) -> None:
            told.append("failed")

    settings = load_settings(options={"components": plain.NAMES, "samples": 0, "exporters": ["labels", "labels"]})
    with pytest.raises(ExportError, match="division by zero") as error:
        extract("photo.png", "run", settings, installed=found, observers=[Observer()])
    assert error.value.extraction.run_dir == Path("run")
    assert told == ["load", "localise", "learn", "generate", "export", "finished"]


def test_a_killed_export_is_made_up_for(icekit: Icekit, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had half-written goes, and what it had put into its place is known as its own."""
    assert run(icekit)[0] == 0
    replace, moved = __import__("os").replace, []

    def until(source: Any, target: Any) -> None:
        if moved and str(target).endswith(".txt"):
            raise KeyboardInterrupt
        moved.extend([target] * str(target).endswith(".txt"))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", until)
        assert icekit("export", "run", "--format", "labels", "--out", "out")[0] == 130
    (place / "out" / STAGING / "labels").mkdir(parents=True)
    (place / "out" / EXPORTS_LOCK).write_text("99999999\n")
    assert len(names(place / "out") - {EXPORTS_LOCK}) == 1
    assert icekit("export", "run", "--format", "labels", "--out", "out")[0] == 0
    assert names(place / "out") == {"labels.txt", "labels/0-cup.txt", "labels/1-red-bowl.txt"}
    assert not (place / "out" / STAGING).exists() and not (place / "out" / LOCK).exists()


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_settings_of_exporters(icekit: Icekit, place: Path) -> None:
    lines = "# A preset.\n[exporter.labels]\ntext = 'from a preset'\n[exporter.others]\ntext = 'x'\n"
    (place / "some.toml").write_text(lines)
    (place / "settings.toml").write_text('exporters = ["labels"]\n[exporter.labels]\ntext = "from a file"\n')
    assert icekit(*RUN, "--out", "run", "--max-concepts", "1", "--config", "settings.toml")[0] == 0
    assert (place / "run" / "labels.txt").read_text() == "from a file"
    settings = Extraction.open(place / "run").settings()
    assert (settings.exporters, settings.exporter) == (("labels",), {"labels": {"text": "from a file"}})
    for typed, message in {
        'exporters=["lables"]': "no exporter 'lables': did you mean 'labels'?",
        "exporter.report.side=3": "unknown setting 'exporter.report.side': did you mean 'exporter.report.image_side'?",
        "exporter.report.image_side=3": "setting 'exporter.report.image_side' cannot be 3",
        "exporter.raport.image_side=300": "no exporter 'raport': did you mean 'report'?",
        "exporter.report=3": "setting 'exporter.report' cannot be 3: it should be",
    }.items():
        refused(icekit(*RUN, "--out", "other", "--set", typed), message)
        assert not (place / "other").exists()
    # A preset's table is for the exporters that the run has.
    for number, (more, text) in enumerate(([[], "from a preset"], [["--set", "exporter.labels.text=typed"], "typed"])):
        typed = ["--preset", "some", "--max-concepts", "1", "--set", 'exporters=["labels"]', *more]
        assert icekit(*RUN, "--out", f"preset-{number}", *typed)[0] == 0
        assert (place / f"preset-{number}" / "labels.txt").read_text() == text
        assert "others" not in Extraction.open(place / f"preset-{number}").settings().exporter
    # What is written of a run changes nothing of what it found: a run that goes on takes it.
    assert icekit(*RUN, "--out", "broken", "--set", "learner.steps=9", "--set", "learner.fail_at=3")[0] == 1
    state = place / "broken" / "checkpoint" / "run.json"
    record = json.loads(state.read_text())
    record["settings"]["learner"]["fail_at"] = None
    state.write_text(json.dumps(record))
    again = ["--resume", "--set", "learner.steps=9", "--set", 'exporters=["labels"]', "--set", "exporter.labels.text=c"]
    status, _, err = icekit(*RUN, "--out", "broken", *again)
    assert status == 0, err
    assert (place / "broken" / "labels.txt").read_text() == "c"
    assert not (place / "broken" / "report.html").exists()


def test_a_run_of_an_earlier_version(icekit: Icekit, place: Path) -> None:
    """Its report was the run's own: the manifest names it, and no record of exports."""
    assert icekit(*RUN, "--out", "run", "--max-concepts", "1")[0] == 0
    (place / "run" / EXPORTS).unlink()
    manifest = place / "run" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"].remove(EXPORTS)
    manifest.write_text(json.dumps(content))
    settings = place / "run" / "settings.toml"
    values = tomllib.loads(settings.read_text())
    del values["exporters"], values["exporter"]
    settings.write_text(tomli_w.dumps(values))
    (place / "run" / "report.html").write_text("as it was")
    assert icekit("export", "run", "--format", "report")[:2] == (0, "run/report.html\n")
    assert (place / "run" / "report.html").read_text() != "as it was"
    (place / "run" / EXPORTS).unlink()
    assert icekit(*RUN, "--out", "run", "--resume")[0] == 0
    assert icekit(*RUN, "--out", "run", "--max-concepts", "1", "--overwrite", "--set", "exporters=[]")[0] == 0
    assert not (place / "run" / "report.html").exists()


# --- For other programs -----------------------------------------------------------------------------------------------


def test_files_for_other_programs(icekit: Icekit, place: Path) -> None:
    """In a run directory in a folder of their own, in any other folder right there, several runs together."""
    both = ["--set", 'exporters=["comfyui"]', "--set", "exporter.comfyui.prefix=a"]
    assert icekit(*RUN, "--out", "run", "--max-concepts", "1", *both)[0] == 0
    files = ["a-cup-0.safetensors", "a-cup-0-instance.safetensors", "a-cup-0-colour.safetensors",
             "a-cup-0-material.safetensors"]  # fmt: skip
    assert {one for one in names(place / "run") if one.startswith("comfyui/")} == {
        *(f"comfyui/embeddings/{file}" for file in files),
        "comfyui/a-prompts.txt",
    }
    for program in ("a1111", "invokeai", "diffusers"):
        status, out, err = icekit("export", "run", "--format", program)
        assert status == 0, err
        assert out.splitlines()[0] == f"run/{program}/embeddings/run-cup-0.safetensors"
    assert len(Extraction.open("run").concepts) == 1
    status, out, err = icekit("export", "run", "--format", "comfyui", "--out", "models", "--set", "prefix=none")
    assert (status, out.splitlines()[-1]) == (0, "models/run-prompts.txt"), err
    assert icekit(*RUN, "--out", "more", "--max-concepts", "1")[0] == 0
    assert icekit("export", "more", "--format", "comfyui", "--out", "models")[0] == 0
    assert {one.split("-")[0] for one in names(place / "models")} == {
        "embeddings/run",
        "embeddings/more",
        "run",
        "more",
    }
    refused(
        icekit("export", "run", "--format", "comfyui", "--set", "prefix=my photo"),
        "exporter.comfyui.prefix",
        "my photo",
    )
    # A new run in its place takes all of them away.
    assert icekit(*RUN, "--out", "run", "--max-concepts", "1", "--overwrite", "--set", "exporters=[]")[0] == 0
    assert not any((place / "run" / name).exists() for name in ("comfyui", "a1111", "invokeai", "diffusers"))
