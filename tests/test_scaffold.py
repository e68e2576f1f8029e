"""``icekit plugins new``: what it writes is a plugin that works as it stands, of every kind, and it overwrites nothing.

Plugins are built and installed as users do it, with uv, into a folder for the module path; nothing is downloaded for
it. ``test_in_a_fresh_environment`` alone makes an environment of its own, from wheels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from icekit_process import ROOT, environment, icekit, in_this_process
from PIL import Image

from icekit import Extraction, InputError
from icekit.scaffold import KINDS, render_plugin, write_plugin
from icekit.testing import run_checks

NAMES = {kind: f"my{kind}" if kind == "attribute" else f"my-{kind}" for kind in KINDS}
"""A name for a plugin of each kind, so that all can be installed at once."""
UV = Path(sys.executable).with_name("uv")
TABLETOP = ROOT / "examples" / "tabletop.png"
WITHOUT_LEARNING = ["--backbone", "tabletop", "--learner", "words", "--set", "samples=0"]


def call(command: list[str | Path], cwd: Path, *folders: Path) -> str:
    """Run a program to its end; what it printed. It must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(*folders), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A new plugin of each kind, by kind."""
    place = tmp_path_factory.mktemp("plugins")
    made = {kind: place / f"icekit-{name}" for kind, name in NAMES.items()}
    for kind, folder in made.items():
        write_plugin(NAMES[kind], kind, folder)
    return made


@pytest.fixture(scope="module")
def site(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, built as wheels and installed."""
    place = tmp_path_factory.mktemp("site")
    install = [UV, "pip", "install", "--quiet", "--offline", "--no-build-isolation", "--no-deps"]
    call([*install, "--python", sys.executable, "--target", place, *folders.values()], place)
    return place


# --- What is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_complete(kind: str) -> None:
    name = NAMES[kind]
    texts = render_plugin(name, kind)
    module = f"icekit_{name.replace('-', '_')}"
    tests = f"tests/test_{name.replace('-', '_')}.py"
    modules = [f"{module}/{file}" for file in ("__init__.py", "settings.py", f"{kind}.py", "py.typed")]
    assert set(texts) - {f"{module}.py", *modules} == {
        "pyproject.toml", "README.md", ".gitignore", ".github/workflows/test.yml", tests,
    }  # fmt: skip
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    made = tomllib.loads(texts["pyproject.toml"])
    assert made["project"]["name"] == f"icekit-{name}"
    assert made["project"]["requires-python"] == own["project"]["requires-python"]
    assert made["build-system"] == own["build-system"]
    assert made["project"]["entry-points"]["icekit"] == {name: module}
    assert made["project"]["dependencies"][0] == "icekit"
    assert set(made["project"]["dependencies"][1:]) <= set(own["project"]["dependencies"]) | {"pillow"}
    for path, text in texts.items():
        assert not text or (text.endswith("\n") and not text.endswith("\n\n")), path
        assert "{%" not in text and "jinja" not in text, path
    if kind not in ("command", "observer"):
        assert "@parametrize_with_checks" in texts[tests]
    assert f"icekit-{name}" in texts["README.md"] and "python -m pytest" in texts["README.md"]


def test_they_are_as_clean_as_icekit_itself(tmp_path: Path) -> None:
    # The shortest names and the longest: lines must neither become too long nor short enough to be one.
    for kind in KINDS:
        for name in ("gloss", "x2", "wordsofolddutchmasters" if kind == "attribute" else "words-of-old-dutch-paint"):
            write_plugin(name, kind, tmp_path / f"{kind}-{name}")
    for folder in tmp_path.iterdir():
        for check in (["check"], ["format", "--diff"]):
            call([UV.with_name("ruff"), *check, "--no-cache", "--config", ROOT / "pyproject.toml", "."], folder)


@pytest.mark.slow
def test_they_are_typed(folders: dict[str, Path], tmp_path: Path) -> None:
    modules: list[str | Path] = []
    for kind, name in NAMES.items():
        modules += ["-p" if KINDS[kind].is_heavy else "-m", f"icekit_{name.replace('-', '_')}"]
    mypy = [UV.with_name("mypy"), "--strict", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path]
    # mypy takes the paths in its settings from where it is started.
    place, path = folders["attribute"], os.pathsep.join(map(str, [*folders.values(), ROOT]))
    done = subprocess.run(
        [str(part) for part in [*mypy, *modules]],
        cwd=place, env=os.environ | {"MYPYPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    # With --strict it looks at icekit, too, which has not promised as much.
    own = [line for line in done.stdout.splitlines() if re.search(r"icekit_my", line)]
    assert own == [] and ("Success" in done.stdout or "error:" in done.stdout), done.stdout + done.stderr


def test_icekit_starts_without_what_they_need(folders: dict[str, Path], tmp_path: Path) -> None:
    modules = ", ".join(f"icekit_{name.replace('-', '_')}" for name in NAMES.values())
    heavy = ("torch", "numpy", "PIL", "skimage", "diffusers")
    code = f"import sys, {modules}; print([one for one in {heavy} if one in sys.modules])"
    assert call([sys.executable, "-c", code], tmp_path, *folders.values()) == "[]\n"


def test_icekits_wheel_has_all_templates(tmp_path: Path) -> None:
    call(
        [UV, "build", "--quiet", "--offline", "--wheel", "--no-build-isolation", "--python", sys.executable,
         "--out-dir", tmp_path, ROOT], tmp_path,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    templates = ROOT / "icekit" / "scaffold" / "templates"
    here = {f"icekit/scaffold/templates/{one.relative_to(templates)}" for one in templates.rglob("*.jinja")}
    with zipfile.ZipFile(wheel) as packed:
        assert here and here <= set(packed.namelist())


def test_the_tutorial_shows_what_is_written() -> None:
    page = (ROOT / "docs" / "writing-plugins.md").read_text(encoding="utf-8")
    section = page.partition("## Start: `icekit plugins new`")[2].partition("\n## ")[0]
    _, shown = re.findall(r"```\w+\n(.*?)```", section, flags=re.DOTALL)
    assert shown.split() == sorted(render_plugin("gloss", "attribute"))
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(KINDS)


# --- What it does -----------------------------------------------------------------------------------------------------


def test_icekit_lists_every_kind(site: Path, tmp_path: Path) -> None:
    listed = json.loads(icekit(["plugins", "list", "--json"], tmp_path, site).stdout)
    found = {(one["kind"], one["name"]): one for one in listed["plugins"]}
    for kind, name in NAMES.items():
        assert found[kind, name]["distribution"] == f"icekit-{name}"
        assert found[kind, name]["summary"], kind
    assert listed["broken"] == []


@pytest.mark.parametrize("kind", ["attribute", "segmentor", "metric", "exporter"])
def test_icekits_checks_hold(kind: str, folders: dict[str, Path]) -> None:
    name = f"icekit_{NAMES[kind].replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, folders[kind] / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    subject = (
        module.MYATTRIBUTE if kind == "attribute" else getattr(module, f"My{kind.capitalize()}{kind.capitalize()}")
    )
    results = run_checks(subject)
    assert [one for one in results if one.outcome == "failed"] == []
    assert len([one for one in results if one.outcome == "passed"]) >= 5


@pytest.mark.parametrize(
    "kind", [kind if kind == "observer" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_their_own_tests_pass(kind: str, folders: dict[str, Path], site: Path) -> None:
    said = call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], folders[kind], site)
    assert re.search(r"\d+ passed", said)


RUNS: dict[str, list[str | Path]] = {
    "attribute": [*WITHOUT_LEARNING, "--attribute", NAMES["attribute"]],
    "retriever": [*WITHOUT_LEARNING, "--retriever", NAMES["retriever"]],
    "segmentor": [*WITHOUT_LEARNING, "--segmentor", NAMES["segmentor"]],
    "learner": [
        "--backbone", "tabletop", "--learner", NAMES["learner"], "--set", "learner.steps=3", "--set", "samples=0",
    ],
    "backbone": [
        "--backbone", NAMES["backbone"], "--set", "backbone.model=package:icekit_tabletop/models/stable-diffusion",
        "--retriever", "words", "--set", "retriever.words=bottle", "--learner", "words", "--set", "samples=0",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_uses_it(kind: str, site: Path, tmp_path: Path) -> None:
    done = icekit(["run", TABLETOP, "--out", "out", *RUNS[kind]], tmp_path, site)
    assert done.returncode == 0, done.stderr
    found = Extraction.open(tmp_path / "out")
    if kind == "attribute":
        assert found.record.attributes == [NAMES[kind]]
        for concept in found.concepts:
            assert concept.tokens[NAMES[kind]] == f"<{concept.label}-{concept.index}-{NAMES[kind]}>"
            assert concept.words[NAMES[kind]]
    else:
        assert found.settings().name_of(kind) == NAMES[kind]  # type: ignore[arg-type]
    assert "learning" not in done.stderr or [
        name for name in ("load", "learn") if f"\n{name} " in done.stderr
    ]  # observer
    assert found.concepts
    told = icekit([NAMES["command"], "out"], tmp_path, site)
    assert [line.split("\t")[0] for line in told.stdout.splitlines()] == [one.label for one in found.concepts]


@pytest.mark.slow
def test_a_run_is_exported_with_it(site: Path, tmp_path: Path) -> None:
    name = NAMES["exporter"]
    settings = [*WITHOUT_LEARNING, "--max-concepts", "1", "--set", f'exporters=["report","{name}"]']
    done = icekit(["run", TABLETOP, "--out", "out", *settings], tmp_path, site)
    assert done.returncode == 0, done.stderr
    [concept] = Extraction.open(tmp_path / "out").concepts
    file = f"{name}/{concept.index}-{concept.label}.png"
    assert (tmp_path / "out" / file).is_file() and (tmp_path / "out" / "report.html").is_file()
    typed = ["export", "out", "--format", name, "--out", "pictures", "--set", "margin=8"]
    done = icekit(typed, tmp_path, site)
    assert (done.returncode, done.stdout) == (0, f"pictures/{file}\n"), done.stderr
    small, large = (Image.open(tmp_path / folder / file) for folder in ("out", "pictures"))
    assert large.size == (small.width + 16, small.height + 16)


@pytest.mark.slow
def test_a_bench_uses_data_set_and_metric(site: Path, tmp_path: Path) -> None:
    Image.open(TABLETOP).save(tmp_path / "scene.png")
    mask = Image.new("L", Image.open(TABLETOP).size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    mask.save(tmp_path / "mask.png")
    (tmp_path / "table.csv").write_text("picture,mask,word\nscene.png,mask.png,bottle\n")
    command = ["bench", NAMES["dataset"], "--path", "table.csv", "--metric", NAMES["metric"], "--out", "out"]
    done = icekit([*command, "--backbone", "tabletop", "--learner", "words", "--set", "bench.images=1"], tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert "my_metric" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_a_fresh_environment(tmp_path: Path) -> None:
    """From wheels, in a folder of one's own: written, installed, listed, tested, used."""
    wheels, place, bin_ = tmp_path / "wheels", tmp_path / "place", tmp_path / "fresh" / "bin"
    place.mkdir()
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def do(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=place, env=clean | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout

    for source in (ROOT, ROOT / "plugins" / "icekit-tabletop"):
        do(UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", wheels, source)
    do(UV, "venv", "--python", sys.executable, tmp_path / "fresh")
    install = [UV, "pip", "install", "--python", bin_ / "python", "-c", ROOT / "constraints.txt"]
    do(*install, *sorted(wheels.glob("*.whl")))
    do(bin_ / "icekit", "plugins", "new", "gloss", "--kind", "attribute")
    do(*install, "--editable", "icekit-gloss[dev]")
    assert re.search(
        r"^attribute +gloss +.* icekit-gloss 0\.1\.0", do(bin_ / "icekit", "plugins", "list"), re.MULTILINE
    )
    assert "passed" in do(bin_ / "python", "-m", "pytest", "-q", "icekit-gloss")
    do(bin_ / "icekit", "run", TABLETOP, "--out", "out", *WITHOUT_LEARNING, "--attribute", "gloss")
    assert all(concept.words["gloss"] for concept in Extraction.open(place / "out").concepts)


# --- What it refuses --------------------------------------------------------------------------------------------------


REFUSED: list[tuple[str, str, str]] = [
    ("gloss", "atribute", "no kind of plugin is called 'atribute': choose from attribute, retriever"),
    ("Gloss", "metric", "'Gloss' cannot be the name of a metric: use lower-case letters and digits"),
    ("2x", "metric", "'2x' cannot be the name of a metric"),
    ("old_words", "metric", "'old_words' cannot be the name of a metric"),
    ("../gloss", "metric", "'../gloss' cannot be the name of a metric"),
    ("", "metric", "'' cannot be the name of a metric"),
    ("g" * 25, "metric", "at most 24"),
    ("old-words", "attribute", "'old-words' cannot be the name of an attribute: use lower-case letters and digits, a "),
    ("class", "observer", "'class' cannot be the name of an observer: it means something else in Python"),
    ("none", "backbone", "'none' cannot be the name of a backbone: it means something else in Python or in settings"),
    ("category", "attribute", "'category' cannot be an attribute's name"),
    ("colour", "attribute", "attribute 'colour' is already registered by plugin 'builtin'"),
    ("color", "attribute", "attribute 'color' is already registered by plugin 'builtin'"),
    ("clip", "retriever", "retriever 'clip' is already registered by plugin 'builtin'"),
    ("named", "metric", "metric 'seen' of plugin 'plain' (plain-plugin 1.0) has a column 'named'"),
    ("run", "command", "there is a command 'run' already"),
    ("texture", "learner", "icekit-texture 0.1.0 is installed already"),
    ("plain", "observer", "there is a plugin 'plain' already"),
]


def test_wrong_names_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_icekit = in_this_process(tmp_path, monkeypatch, capsys)
    for name, kind, message in REFUSED:
        status, out, err = call_icekit("plugins", "new", name, "--kind", kind)
        assert (status, out, err.count("\n")) == (2, "", 1), (name, kind, err)
        assert message in err
        assert list(tmp_path.iterdir()) == []


def test_it_says_what_it_wrote_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_icekit = in_this_process(tmp_path, monkeypatch, capsys)
    status, out, err = call_icekit("plugins", "new", "gloss", "--kind", "attribute")
    assert status == 0
    written = sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file())
    assert sorted(out.splitlines()) == written
    assert "icekit-gloss/icekit_gloss.py" in written
    assert 'cd icekit-gloss && pip install --editable ".[dev]"' in err
    assert [one.name for one in tmp_path.iterdir()] == ["icekit-gloss"]

    before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    status, out, err = call_icekit("plugins", "new", "gloss", "--kind", "metric")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "icekit-gloss is there already, and no empty folder: choose another one with --out" in err
    assert {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()} == before

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # an empty folder is taken as it is, the working directory too
    status, out, err = call_icekit("plugins", "new", "gloss", "--kind", "command", "--out", ".")
    assert status == 0, err
    assert "icekit_gloss.py" in out.splitlines() and Path("icekit_gloss.py").is_file()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in ("file", "file/below", "link"):
        with pytest.raises(InputError, match=r"is there already, and no empty folder|cannot write to"):
            write_plugin("gloss", "attribute", tmp_path / folder)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "link"]


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def until_full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", until_full)
    (tmp_path / "empty").mkdir()
    for folder in ("absent", "empty"):
        with pytest.raises(InputError, match=r"cannot write to .*: no space left on device"):
            write_plugin("gloss", "attribute", tmp_path / folder)
    assert [one.name for one in tmp_path.rglob("*")] == ["empty"]
