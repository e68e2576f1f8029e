"""icekit from Python: names, settings, events, what notebooks show, and messages in Python's words."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
from PIL import Image

import icekit
from icekit import CallbackError, Event, Extraction, InputError, Settings, StopRun
from icekit.plugins import Plugins
from icekit.run import progress

ROOT = Path(__file__).resolve().parents[1]
EVENTS = ["run_started", "stage_started", "region_found", "step_done", "image_generated", "run_finished"]


@pytest.fixture
def found() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 50), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def small(**given: Any) -> Settings:
    return Settings(
        **(
            {
                "components": plain.NAMES,
                "samples": 1,
                "sample_steps": 1,
                "max_concepts": 2,
                "exporters": (),
                "learner": {"steps": 4},
            }
            | given
        )
    )


def a_run(found: Plugins, photo: Path, out: Path, **options: Any) -> Extraction:
    return icekit.extract(photo, out, small(), installed=found, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that nobody changes."""
    folder = tmp_path_factory.mktemp("made")
    Image.new("RGB", (60, 50), "red").save(folder / "photo.png")
    return a_run(plain.beside_builtins(), folder / "photo.png", folder / "<i>run").run_dir


# --- Names and settings ----------------------------------------------------------------------------------------------


def test_what_there_is_is_listed_and_quick_to_import() -> None:
    wanted = {"extract", "compose", "remake", "open", "export", "import_embeddings", "Settings", "Event", "StopRun"}
    assert wanted <= set(dir(icekit))
    code = "import sys, icekit; dir(icekit); icekit.Settings(backbone='tabletop'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_component_by_its_name() -> None:
    settings = Settings(backbone="tabletop", learner="words")
    assert (settings.name_of("backbone"), settings.name_of("learner")) == ("tabletop", "words")
    assert settings == Settings(components={"backbone": "tabletop", "learner": "words"})
    assert Settings(components={"learner": "words"}, backbone="tabletop") == settings
    with pytest.raises(InputError, match=r"^setting 'backbone' is 'sdxl', and 'components.backbone' is 'tabletop'$"):
        Settings(backbone="sdxl", components={"backbone": "tabletop"})
    assert icekit.load_settings(None, ["learner=words", "learner.steps=3"]).values_of("learner") == {"steps": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_concept": 3}, "unknown setting 'max_concept': did you mean 'max_concepts'?"),
        ({"samples": "many"}, "setting 'samples' cannot be 'many': it should be integer"),
        ({"learner": 3}, "setting 'learner' cannot be 3: it should be "),
    ],
)
def test_wrong_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Settings(**given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_messages_speak_python(found: Plugins, photo: Path, tmp_path: Path, made: Path) -> None:
    run = icekit.open(shutil.copytree(made, tmp_path / "run"))
    with pytest.raises(InputError, match=r"a complete run: overwrite=True replaces it, or choose another out$"):
        a_run(found, photo, tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot go on: seed was 0, now 1 \(overwrite=True starts it afresh\)"):
        icekit.extract(photo, tmp_path / "run", small(seed=1), resume=True, installed=found)
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r'not complete: `extract\(IMAGE, ".*run", resume=True\)` goes on'):
        icekit.open(run.run_dir)
    with pytest.raises(InputError, match=r"only a sweep \(sweep=True\) takes them"):
        icekit.compose("{a|b}", {"a": run, "b": run})


# --- Events ----------------------------------------------------------------------------------------------------------


def test_events(found: Plugins, photo: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    run = a_run(found, photo, tmp_path / "run", on_event=heard.append)
    assert list(dict.fromkeys(event.name for event in sorted(heard, key=lambda one: EVENTS.index(one.name)))) == EVENTS
    assert [one.stage for one in heard if one.name == "stage_started"][:4] == ["load", "localise", "learn", "generate"]
    assert [one.region.word for one in heard if one.region] == ["cup", "red bowl"]
    steps = [one.step for one in heard if one.step]
    assert (steps[-1].step, steps[-1].total, set(steps[-1].losses)) == (4, 4, {"total"})
    assert heard[-1].extraction == run


@pytest.mark.parametrize("name", ["stage_started", "step_done"])
def test_a_callback_that_fails_ends_the_run(name: str, found: Plugins, photo: Path, tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        if event.name == name:
            raise KeyError("epoch")

    with pytest.raises(CallbackError, match=rf"on_event failed in {name}: KeyError: 'epoch'$") as error:
        a_run(found, photo, tmp_path / "run", on_event=on_event)
    assert isinstance(error.value.__cause__, KeyError) and isinstance(error.value, icekit.RunError)
    assert len(a_run(found, photo, tmp_path / "run", resume=True).concepts) == 2


def test_a_callback_that_fails_at_the_end_is_reported(
    found: Plugins, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event) -> None:
        if event.name in ("run_finished", "run_failed"):
            raise KeyError("epoch")

    assert len(a_run(found, photo, tmp_path / "run", on_event=fail).concepts) == 2
    assert "fail' failed in run_finished and is ignored from here on: KeyError" in caplog.text
    with pytest.raises(InputError, match="already holds"):
        a_run(found, photo, tmp_path / "run", on_event=fail)


def test_a_run_is_ended_on_purpose(found: Plugins, photo: Path, tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        if event.step and event.step.step == 3:
            raise StopRun("enough")

    with pytest.raises(StopRun, match=r"^enough$"):
        a_run(found, photo, tmp_path / "run", on_event=on_event)


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_a_run_shows_itself(tmp_path: Path, made: Path) -> None:
    run = icekit.open(shutil.copytree(made, tmp_path / "<i>run"))
    assert repr(run) == f"<Extraction {tmp_path}/<i>run: 0 cup, 1 red-bowl>"
    page = run._repr_html_()
    assert "&lt;i&gt;run" in page and "<i>" not in page and "<cup" not in page
    assert '<code style="white-space:nowrap">&lt;red-bowl-1-colour&gt;</code>' in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 1 + 2 * (1 + 3)
    assert "http" not in page and "<script" not in page and len(page) < 60_000
    [cup, _] = run.concepts
    assert repr(cup).startswith("<Concept 0: cup (") and "\n" not in repr(cup)
    assert "&lt;cup-0-material&gt;" in cup._repr_html_() and "red-bowl" not in cup._repr_html_()
    both = icekit.ConceptLibrary(run.run_dir, run.run_dir)
    assert repr(both) == "<ConceptLibrary of 2 runs: 0 cup, 1 red-bowl, 0 cup, 1 red-bowl>"

    for path in [*run.run_dir.glob("samples/*"), cup.mask_file, run.run_dir / "image.png"]:
        path.unlink()
    assert "&lt;cup-0-material&gt;" in run._repr_html_()  # what is left is shown


def test_a_composition_shows_itself(found: Plugins, tmp_path: Path, made: Path) -> None:
    composed = icekit.compose("a cup<b> {a.colour}", {"a": made}, n=2, out=tmp_path / "made", installed=found)
    assert repr(composed) == f"<Composition {tmp_path}/made: 2 images of 'a cup<b> {{a.colour}}'>"
    page = composed._repr_html_()
    assert page.count("<img") == page.count("data:image/") == 1  # the sheet
    assert "cup&lt;b&gt;" in page and "cup<b>" not in page and len(page) < 60_000


def test_progress_in_notebooks(
    found: Plugins, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []

    class Handle:
        update: Callable[[Any], None] = shown.append

    def display(what: Any, display_id: bool) -> Handle:
        shown.append(what)
        return Handle()

    assert not progress.in_notebook()
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    run = a_run(found, photo, tmp_path / "run")
    said = [repr(one) for one in shown]
    assert "looking for concepts · cup" in said and "learning tokens · 4 of 4 · walk" in said
    assert said[-1].startswith(f"{tmp_path}/run: 2 concepts in ")
    assert '<progress style="width:12em;vertical-align:middle;margin-right:.7em" value="4" max="4">' in "".join(
        one._repr_html_() for one in shown
    )
    shown.clear()
    icekit.compose("a {a}", {"a": run}, n=2, out=tmp_path / "made", installed=found)
    assert [repr(one) for one in shown][-1] == "images · 2 of 2"
    shown.clear()
    a_run(found, photo, tmp_path / "run", overwrite=True, progress=False)
    assert not shown and capsys.readouterr().err == ""


def test_progress_in_a_script(found: Plugins, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(found, photo, tmp_path / "told", progress=True)
    assert "learning tokens" in capsys.readouterr().err


# --- The notebook ----------------------------------------------------------------------------------------------------

NOTEBOOK = ROOT / "examples" / "from-photo-to-recombination.ipynb"


def test_the_notebook_is_kept_without_output() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        compile(cell.source, "cell", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (tmp_path / "tabletop.png").write_bytes((ROOT / "examples" / "tabletop.png").read_bytes())
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum("<details" in page for page in pages) == 2  # the run, a concept
    assert sum("compositions/" in page and "<img" in page for page in pages) == 3
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert (tmp_path / "exported" / "diffusers").is_dir()
