"""Every block of code in the documents is run, or says why it is not.

A page's blocks are run in their order, in a folder of their own, with what ``make demo`` leaves if they use it:

- ``python`` is executed, all of a page's blocks in one namespace.
- A block with ``title="path"`` is that file: it is written before the page's next block is run. One in a folder is run
  by those that import it. One with hooks is handed to icekit's plugin manager, as an installed plugin is.
- ``bash`` is commands, each run in a process of its own: icekit, ``python -m``, and ``pip``, which installs into an
  environment of its own, offline.
- ``toml`` must be TOML, and where it is settings, settings.
- ``text`` is no code.

A comment above a block says that it is not run here, and why: ``<!-- not run: needs the hub -->``. Its lines that begin
with ``icekit`` are still held against the program: command, options, components and settings must be there. Learning
and sampling are shortened to a step or two, by options that are added to each ``icekit run``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from forked_program import run
from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from icekit.bench.rows import read_rows
from icekit.cli.program import cli
from icekit.plugins import KINDS, Origin, Plugins, installed
from icekit.plugins.sources import Choice, load
from icekit.settings import (
    BENCH_TABLES,
    ROLES,
    Settings,
    load_settings,
    merge,
    parse_assignment,
    read_settings_file,
    validate,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n[ \t]*\Z")
INFO = re.compile(r"(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[ \t]*$\n", re.MULTILINE)
UV = Path(sys.executable).with_name("uv")


# --- Finding the blocks ----------------------------------------------------------------------------------------------


def blocks_of(page: Path) -> list[Example]:
    """The fenced blocks of a page, in their order; ``parsed`` has language, title and source."""
    lexer = RawFencedCodeBlockLexer(INFO)

    def parse(document: Document) -> Any:
        fences = 0
        for region in lexer(document):
            fences += 1
            region.parsed = region.lexemes
            region.evaluator = lambda example: None
            yield region
        # One with an info string of another form, or left open, would be passed over.
        assert fences * 2 == len(re.findall(r"^[ \t]*`{3,}", document.text, re.MULTILINE)), f"{page}: a strange fence"

    return list(Sybil(parsers=[parse], path=str(ROOT)).parse(page).examples())


def is_run(block: Example) -> bool:
    """Whether nothing above the block says that it is not run."""
    return NOT_RUN.search(block.document.text[: block.region.start]) is None


def lines_of(source: str) -> list[list[str]]:
    """The commands of a block of bash, each as its words; comments and line breaks are gone."""
    return [words for line in source.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


# --- Running them ----------------------------------------------------------------------------------------------------


class Place:
    """A folder in which blocks are run. packages: where ``pip`` installs to."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder = folder
        self.packages = packages

    def run(self, source: str) -> None:
        """Run a block of commands, one after the other. Each must succeed."""
        folder = self.folder
        for program, *arguments in lines_of(source):
            if program == "cd":
                folder = folder / arguments[0]
                continue
            status, printed = self._run(program, arguments, folder)
            assert status == 0, f"{shlex.join([program, *arguments])}\n{printed[-5000:]}"

    def _run(self, program: str, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
        if program == "icekit":
            return run("icekit", shortened(arguments), folder, self.packages)
        if program == "python" and arguments[0] == "-m":
            return run(arguments[1], arguments[2:], folder, self.packages)
        assert [program, *arguments[:1]] == ["pip", "install"], f"{program}: neither icekit, python -m nor pip install"
        python = self.packages.parents[2] / "bin" / "python"
        install = [UV, "pip", "install", "--offline", "--no-build-isolation", "--no-deps", "--python", python]
        done = subprocess.run([*install, *arguments[1:]], cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


def shortened(arguments: Sequence[str]) -> list[str]:
    """The arguments of icekit, with few steps and samples if they are of a run."""
    options = []
    if arguments[0] == "run":
        options += ["sample_steps=1", "samples=1", "words_alone=false"]
        learner = arguments[arguments.index("--learner") + 1] if "--learner" in arguments else "ice"
        options += {"words": [], "ice": ["learner.steps=2", "learner.word_steps=1"]}.get(learner, ["learner.steps=2"])
    return [*arguments, *(word for option in options for word in ("--set", option))]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of packages of an environment of its own, that editable installations can go to.

    uv builds them with what this environment has.
    """
    made = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([UV, "venv", "--quiet", "--offline", "--python", sys.executable, made], check=True)
    [folder] = made.glob("lib/python*/site-packages")
    (folder / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder


@pytest.fixture(scope="session")
def demo(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after ``make demo``."""
    place = Place(tmp_path_factory.mktemp("demo"), packages)
    shutil.copytree(ROOT / "examples", place.folder / "examples")
    place.run(demo_command())
    return place.folder


def demo_command() -> str:
    """What ``make demo`` runs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\ndemo: setup\n")[2].partition("\n\n")[0]
    return recipe.replace("$(BIN)/", "").replace("\t", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks(page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    for block in blocks:
        where = f"{page.relative_to(ROOT)}:{block.line}"
        language = block.parsed["language"]
        assert language in ("python", "bash", "toml", "text"), f"{where}: a block of {language or 'no language'}"
    ran = [block for block in blocks if block.parsed["language"] in ("python", "bash", "toml") and is_run(block)]
    if ran:
        place = Place(tmp_path / "place", request.getfixturevalue("packages"))
        shutil.copytree(ROOT / "examples", place.folder / "examples")
        if any("runs/demo" in block.parsed["source"] for block in ran):
            shutil.copytree(request.getfixturevalue("demo") / "runs", place.folder / "runs")
        monkeypatch.chdir(place.folder)
        monkeypatch.syspath_prepend(place.folder)
        for block in ran:
            run_block(block, place)
    found = with_plugins([tmp_path / "place" / block.parsed["title"] for block in ran if is_plugin(block)])
    for block in blocks:
        if block.parsed["language"] == "bash" and block not in ran:
            for words in lines_of(block.parsed["source"]):
                check_command(words, found)


@pytest.fixture(autouse=True)
def forgotten(tmp_path: Path) -> Iterator[None]:
    """Modules that a page has written are no other test's."""
    yield
    written = [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(tmp_path))
    ]
    for name in written:
        del sys.modules[name]


def run_block(block: Example, place: Place) -> None:
    """Run one block as its language asks for."""
    language, title, source = (block.parsed[key] for key in ("language", "title", "source"))
    if title:
        file = place.folder / title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    if language == "python" and "/" not in (title or ""):  # a file of a package runs when it is imported
        block.namespace["__file__"] = str(place.folder / (title or "page.py"))
        block.parsed = source
        PythonEvaluator()(block)
        block.parsed = block.region.lexemes
    elif language == "bash":
        place.run(source)
    elif language == "toml":
        check_toml(tomllib.loads(source))


def check_toml(values: dict[str, Any]) -> None:
    """Hold settings against their models."""
    if values.keys() & {"project", "build-system"}:
        return
    for row in read_rows(values.pop("rows", {}), ()):
        validate(Settings, row.overrides)
    validate(Settings, {key: value for key, value in values.items() if key not in BENCH_TABLES})


# --- Holding commands against the program ----------------------------------------------------------------------------


def is_plugin(block: Example) -> bool:
    """Whether the block is a file with hooks."""
    return bool(block.parsed["title"]) and "@hookimpl\ndef " in block.parsed["source"]


def with_plugins(files: Sequence[Path]) -> Plugins:
    """What is installed, and the plugins of a page: icekit must find nothing wrong with them."""
    found = load(Choice.of())
    for file in files:
        package = file.name == "__init__.py"
        name, folder = (file.parent.name, file.parent.parent) if package else (file.stem, file.parent)
        sys.path.insert(0, str(folder))
        found.add(Origin(name, "page", "0"), lambda name=name: import_module(name))
        sys.path.remove(str(folder))
    for kind in KINDS:
        found.offered(kind)
    assert [str(broken) for broken in found.broken if broken.origin.distribution == "page"] == []
    return found


def check_command(words: Sequence[str], found: Plugins) -> None:
    """Hold a command that is not run against what there is."""
    program, *arguments = words
    if program == "icekit":
        command, values = parsed(arguments)
        check_names(command, values, found)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments), words
    elif program == "python" and arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), words


def parsed(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """An icekit command's name and the values of its options.

    Raises:
        click.UsageError: there is no such command or option, or a value is wrong.
    """
    installed().each("register_commands", cli=cli.of)
    cli.origin = None
    command: click.Command = cli
    context = cli.make_context("icekit", list(arguments))
    while isinstance(command, click.Group):
        if not (left := [*context._protected_args, *context.args]):
            break
        name, found, rest = command.resolve_command(context, left)
        assert found is not None and name is not None
        command, context = found, found.make_context(name, rest, parent=context)
    return context.command_path.partition(" ")[2], context.params


def check_names(command: str, values: dict[str, Any], found: Plugins) -> None:
    """Whether the components, attributes, presets and settings are there.

    Raises:
        InputError: they are not.
    """
    config = ROOT / values["config"] if values.get("config") else None
    if command == "run":
        components = {role: values[role] for role in ROLES if values[role]}
        options = {"preset": values["preset"], "attributes": values["attributes"], "components": components}
        given = {key: value for key, value in options.items() if value}
        # A model of the reader's is not here, and icekit would look into its folder.
        assignments = [one for one in values["assignments"] if not one.startswith("backbone.model=")]
        found.resolve(load_settings(config, assignments, given))
    elif command == "bench":
        check_bench(values, read_settings_file(config) if config else {}, found)
    elif command == "plugins show":
        assert any(values["name"] in found.offered(kind) for kind in KINDS), values["name"]


def check_bench(values: dict[str, Any], settings: dict[str, Any], found: Plugins) -> None:
    """Whether what a bench is of is there."""
    chosen: dict[str, Sequence[str]] = {role: values[f"{role}s"] for role in ("retriever", "segmentor", "learner")}
    chosen |= {"metric": values["metrics"], "dataset": [values["dataset"]]}
    chosen["backbone"] = [values["backbone"] or found.chosen(Settings(), values["dataset"]).backbone]
    for role, names in chosen.items():
        for name in names:
            found.component(role, name)
    for row in read_rows(settings.get("rows", {}), ()):
        found.resolve(validate(Settings, merge({"components": {"backbone": "tabletop"}}, row.overrides)))
    for assignment in values["assignments"]:
        [(role, given)] = parse_assignment(assignment).items()
        if isinstance(given, dict) and role in (*ROLES, "metric", "dataset"):
            for key, value in given.items():
                named = {key: value} if isinstance(value, dict) else {}
                keys = value.keys() if named else {key}
                names = [key] if named else [name for name in chosen.get(role, ()) if keys <= fields(found, role, name)]
                assert names and keys <= fields(found, role, names[0]), assignment


def fields(found: Plugins, role: str, name: str) -> set[str]:
    """The keys of a component's settings."""
    model = found.offered(role)[name].settings
    return set(model.model_fields) if model else set()
