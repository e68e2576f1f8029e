"""Where plugins come from and which are loaded: files, folders, data, entry points; what is wrong with them is said."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import plain_components as plain
import pytest
from icekit_process import ROOT, Call, icekit, with_what_is_installed
from PIL import Image
from plain_components import write_distribution

from icekit import attributes_from, hookimpl, hookspecs, plugins
from icekit.plugins import Choice, Origin, PluginError, Plugins, check_component
from icekit.protocols import VERSION, Attribute, InputError

GLOSS = """
from icekit import Attribute, hookimpl

@hookimpl
def register_attributes(register):
    register(Attribute("gloss", anchor="gloss", vocabulary=("matt", "satin", "glossy")))
"""
MOOD = '[attribute.mood]\nanchor = "mood"\nwords = ["sad", "gay"]\naliases = ["humour"]\n'
PLAIN = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nfrom plain_components import *\n"
QUICK = [*plain.OPTIONS, "--set", "retriever.ghosts=0", "--set", "samples=0", "--max-concepts", "1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files that are plugins, and a site folder on the module path."""
    (tmp_path / "gloss.py").write_text(GLOSS)
    (tmp_path / "mine.py").write_text(PLAIN)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png")
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ICEKIT_PLUGINS", "")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("icekit_file_", "of_test_"))]:
        del sys.modules[name]
    plugins.choose(Choice())


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``icekit`` with real sources, in this process, everything imported anew."""
    call = with_what_is_installed(place, monkeypatch, capsys)

    def fresh(*arguments: str | Path) -> tuple[int, str, str]:
        plugins.choose(Choice(without=("nobody",)))
        return call(*arguments)

    return fresh


def one_line(text: str) -> str:
    [line] = text.splitlines()
    assert "Traceback" not in line
    return line


def listed(run: Call, *options: str | Path) -> tuple[dict[tuple[str, str], str], dict[str, str], str]:
    """What `plugins list` says: (kind, name) -> distribution, broken plugin -> reason, stderr."""
    status, out, err = run("plugins", "list", "--json", *options)
    assert status == 0, err
    made = json.loads(out)
    return (
        {(one["kind"], one["name"]): one["distribution"] for one in made["plugins"]},
        {one["plugin"]: one["reason"] for one in made["broken"]},
        err,
    )


# --- One file --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_is_a_plugin_in_a_process_of_its_own(place: Path) -> None:
    done = icekit(
        ["--plugin-file", "gloss.py", "run", "photo.png", "--attribute", "gloss", *QUICK, "--plugin-file=mine.py"],
        place,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "runs" / "photo" / "manifest.json").read_text())
    assert manifest["attributes"] == ["gloss"] and manifest["concepts"][0]["words"]["gloss"]
    assert {"kind": "attribute", "name": "gloss", "plugin": "gloss", "distribution": str(place / "gloss.py"),
            "version": ""} in manifest["plugins"]  # fmt: skip


def test_a_run_whose_plugin_is_missing_names_it(run: Call, place: Path) -> None:
    given = ["--plugin-file", "gloss.py", "--plugin-file", "mine.py"]
    status, _, err = run("run", "photo.png", "--out", "run", *QUICK, "--attribute", "gloss", *given)
    assert status == 0, err
    file = re.escape(str(place / "mine.py"))
    missing = rf"icekit: the run in run was made with backbone 'plain' of plugin 'mine' \({file}\), which is not here: "
    for command in (["run", "photo.png", "--out", "run", "--resume"], ["compose", "a {a}", "a=run"]):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert re.fullmatch(rf"{missing}--plugin-file {file} brings it back", one_line(err))
    status, _, err = run("run", "photo.png", "--out", "run", "--resume", "--plugin-file", "mine.py")
    assert status == 2 and "was made with attribute 'gloss' of plugin 'gloss' (" in one_line(err)
    assert run("report", "run")[0] == 0  # which needs none of them
    status, _, err = run("compose", "a {a}", "a=run", "--n", "1", "--plugin-file", "mine.py")
    assert status == 0, err
    (place / "mine.py").write_text("1 / 0")
    status, _, err = run("run", "photo.png", "--out", "run", "--resume", *given)
    assert status == 2 and "which is broken: ZeroDivisionError: division by zero" in one_line(err)


def test_an_interrupted_run_says_how_it_goes_on_with_its_plugins(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icekit.run.orchestrator.locate", lambda *given, **named: signal.raise_signal(signal.SIGINT))
    status, _, err = run("run", "photo.png", "--out", "run", *QUICK, "--plugin-file", "mine.py")
    assert status == 130
    assert err.splitlines()[-1].endswith("`icekit run photo.png --out run --resume --plugin-file mine.py` goes on")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nope.py", "--plugin-file nope.py: no such file"),
        ("site", "--plugin-file site: it should be a .py file with hooks, or a .toml file of attributes"),
        ("photo.png", "--plugin-file photo.png: it should be a .py file with hooks"),
    ],
)
def test_a_file_that_is_no_plugin(run: Call, file: str, message: str) -> None:
    for arguments in (["plugins", "list", "--plugin-file", file], [f"--plugin-file={file}", "plugins", "list"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert message in one_line(err)


# --- A folder, and data ----------------------------------------------------------------------------------------------


def test_a_folder_of_plugins(run: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "plugins"
    folder.mkdir()
    (folder / "numpy.py").write_text(GLOSS)  # whatever it is called, it hides no other module
    (folder / "mood.toml").write_text(MOOD)
    (folder / "_private.py").write_text("1 / 0")
    (folder / "broken.toml").write_text("[attribute.x]\nanchor = 'x'\n")
    (folder / "notes.txt").write_text("none")
    monkeypatch.setenv("ICEKIT_PLUGINS_DIR", str(folder))
    monkeypatch.delenv("ICEKIT_PLUGINS")
    found, broken, err = listed(run)
    assert found["attribute", "gloss"] == str(folder / "numpy.py")
    assert found["attribute", "mood"] == str(folder / "mood.toml")
    assert broken == {"broken": f"{folder / 'broken.toml'}: setting 'attribute.x.words' is missing"}
    assert plugins.installed().attribute("humour").vocabulary == ("sad", "gay")
    assert err == "" and sys.modules["numpy"].__name__ == "numpy"


def test_a_folder_that_is_not_there_is_said(
    run: Call, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ICEKIT_PLUGINS_DIR", "nowhere")
    monkeypatch.setenv("ICEKIT_PLUGINS", "texture, glos")
    found, _, _ = listed(run)
    assert ("attribute", "texture") in found
    folder, name = caplog.messages
    assert folder == "ICEKIT_PLUGINS_DIR: nowhere: no such file or directory"
    assert name.startswith("ICEKIT_PLUGINS names 'glos', and no plugin is called so: ")


def test_a_distribution_without_code(run: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICEKIT_PLUGINS")
    package = place / "site" / "of_test_mood"
    package.mkdir()
    (package / "words.toml").write_text(MOOD)
    info = place / "site" / "icekit_mood-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: icekit-mood\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(
        "[icekit.attributes]\nmood = of_test_mood:words.toml\ngone = of_test_mood:gone.toml\n"
        "none = of_test_none:words.toml\nodd = of_test_mood\n"
    )
    found, broken, _ = listed(run)
    assert found["attribute", "mood"] == "icekit-mood"
    assert "no such file" in broken["gone"]
    assert broken["none"].startswith("there is no package 'of_test_none'")
    assert broken["odd"].endswith("it should be package:file.toml")


def test_a_file_of_attributes(tmp_path: Path) -> None:
    file = tmp_path / "words.toml"
    file.write_text(MOOD)
    assert attributes_from(file) == [Attribute("mood", "mood", ("sad", "gay"), ("humour",))]
    for text, message in {
        "": "has no attribute",
        "seed = 1": "has 'seed': a file of attributes has tables",
        '[attribute.mood]\nanchor="x"\nwords="sad"': "'attribute.mood.words' cannot be 'sad'",
        '[attribute.mood]\nanchor="x"\nwords=["sad"]\nwrods=[]': "did you mean 'attribute.mood.words'",
        '[attribute.object]\nanchor="x"\nwords=["sad"]': r"\[attribute.object\]: 'object' cannot be an attribute",
        "attribute = 5": "setting 'attribute' cannot be 5",
    }.items():
        file.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            attributes_from(file)
        assert str(file) in one_line(str(error.value))


# --- An attribute in the settings ------------------------------------------------------------------------------------


def test_an_attribute_in_the_settings_file(run: Call, place: Path) -> None:
    (place / "settings.toml").write_text('attributes = ["gloss", "colour"]\n' + MOOD.replace("mood", "gloss"))
    given = [*QUICK, "--plugin-file", "mine.py"]
    status, _, err = run("run", "photo.png", "--out", "run", *given, "--config", "settings.toml")
    assert status == 0, err
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert manifest["attributes"] == ["gloss", "colour"]
    assert set(manifest["concepts"][0]["words"]["gloss"]) == {"sad", "gay"}
    assert ("attribute", "gloss") not in {(one["kind"], one["name"]) for one in manifest["plugins"]}
    (place / "run" / "manifest.json").rename(place / "manifest.json")  # as if it had not been written
    again = ["run", "photo.png", "--plugin-file", "mine.py", "--config", "run/settings.toml", "--out"]
    for out, options in {"again": [], "one": ["--attribute", "gloss"]}.items():
        status, _, err = run(*again, out, *options)
        assert status == 0, err
    assert json.loads((place / "one" / "manifest.json").read_text())["attributes"] == ["gloss"]
    status, _, err = run("run", "photo.png", "--out", "one", "--resume", "--plugin-file", "mine.py")
    assert status == 0, err
    status, _, err = run(*again, "one", "--resume", "--set", 'attribute.gloss.words=["dull"]')
    assert status == 2 and "attribute.gloss.words was ['sad', 'gay'], now ['dull']" in one_line(err)
    status, out, err = run("compose", "a {a.gloss} thing", "a=one", "--n", "1", "--json", "--plugin-file", "mine.py")
    assert status == 0 and "<a-cup-0-gloss>" in out, err
    status, _, err = run(*again, "two", "--attribute", "glos")
    assert status == 2 and "no attribute 'glos': did you mean 'gloss'?" in one_line(err)
    status, _, err = run(*again, "two", "--set", "attribute.object.anchor=x", "--set", 'attribute.object.words=["y"]')
    assert status == 2 and "[attribute.object]: 'object' cannot be an attribute's name" in one_line(err)


def test_an_attribute_in_a_benchs_settings(run: Call, place: Path) -> None:
    plain.write_data_set(place / "data")
    (place / "bench.toml").write_text(
        MOOD + '[rows.mood]\nattributes = ["mood"]\n[rows.own]\nattributes = ["gloss"]\n'
        '[rows.own.attribute.gloss]\nanchor = "gloss"\nwords = ["matt"]\n'
    )
    given = ["bench", "folder", "--path", "data", "--out", "bench", *plain.OPTIONS, "--plugin-file", "mine.py"]
    given += ["--metric", "miou", "--set", "retriever.ghosts=0", "--config"]
    status, _, err = run(*given, "bench.toml")
    assert status == 0, err
    rows = {one["name"] for one in json.loads((place / "bench" / "results.json").read_text())["rows"]}
    assert {"mood", "own"} <= rows
    (place / "odd.toml").write_text(
        (place / "bench.toml").read_text()
        + '[rows.two]\nattributes = ["gloss"]\n[rows.two.attribute.gloss]\nanchor = "gloss"\nwords = ["shiny"]\n'
    )
    status, _, err = run(*given, "odd.toml", "--overwrite")
    assert status == 2 and "row 'two' has another attribute 'gloss' than others" in err.splitlines()[-1]


# --- Which are loaded ------------------------------------------------------------------------------------------------


def test_what_is_loaded_can_be_chosen(run: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        source = GLOSS.replace("gloss", name)
        write_distribution(place / "site", f"of_test_{name}", source, name=f"dist-{name}")
    attributes = [("attribute", "one"), ("attribute", "two")]

    def there(*options: str) -> list[bool]:
        found = listed(run, *options)[0]
        assert ("attribute", "colour") in found
        return [one in found for one in attributes]

    assert there() == [False, False]  # ICEKIT_PLUGINS is empty
    monkeypatch.setenv("ICEKIT_PLUGINS", "of_test_two")
    assert there() == [False, True]
    assert there("--no-plugin", "of_test_two") == [False, False]
    monkeypatch.delenv("ICEKIT_PLUGINS")
    assert there() == [True, True]
    assert there("--no-plugin", "of_test_two", "--no-plugin=of_test_one") == [False, False]
    status, out, err = run("--no-plugin", "of_test_tow", "plugins")
    assert (status, out) == (2, "")
    assert one_line(err) == "icekit: --no-plugin of_test_tow: no plugin is called so: did you mean 'of_test_two'?"
    assert "cannot be left out" in run("plugins", "--no-plugin", "builtin")[2]
    assert plugins.load(Choice(only=("of_test_one",))).attribute("one").name == "one"


# --- What is wrong with them -----------------------------------------------------------------------------------------

HOOK = "from icekit import hookimpl\n@hookimpl\ndef register_learners(register):\n    pass\n"
WRONG = {
    "unmarked": (
        "def register_learners(register):\n    pass\n",
        "its function register_learners is not marked as a hook: put @icekit.hookimpl above it",
    ),
    "nothing": ("x = 1\n", "it has no hook: none of its functions is marked with @icekit.hookimpl"),
    "argument": (
        "from icekit import hookimpl\n@hookimpl\ndef region_found(region, place):\n    pass\n",
        "hook region_found has the argument 'place': it can have region",
    ),
    "older": (
        f"{HOOK}icekit_protocol = 0\n",
        f"it was built for version 0 of icekit's protocols, and this icekit has version {VERSION}: update the plugin, ",
    ),
    "newer": (
        f"from icekit.protocols import Unheard\n{HOOK}icekit_protocol = 99\n",
        f"it was built for version 99 of icekit's protocols, and this icekit has version {VERSION}: update icekit, ",
    ),
    "odd": (f"{HOOK}icekit_protocol = 'new'\n", "icekit_protocol is 'new': it should be a number"),
    "raises": ("x = 1\n\n1 / 0\n", "ZeroDivisionError: division by zero"),
}


def test_what_is_wrong_is_said_of_each(run: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICEKIT_PLUGINS")
    for name, (source, _) in WRONG.items():
        write_distribution(place / "site", f"of_test_{name}", source, name=f"dist-{name}", version="0.7")
        (place / f"{name}.py").write_text(source)
    write_distribution(place / "site", "of_test_right", f"{HOOK}icekit_protocol = {VERSION}\n", name="right")
    files = [f"--plugin-file={name}.py" for name in WRONG]
    _, broken, _ = listed(run, *files)
    for name, (_, reason) in WRONG.items():
        assert broken[f"of_test_{name}"].startswith(reason)
        assert broken[name].startswith(reason)
    assert "of_test_right" not in broken

    status, _, err = run("plugins", "show", "bossa-nova")
    assert status == 2 and one_line(err).endswith("; 7 plugins are broken, see `icekit plugins list`")
    assert "dist-raises" not in err
    assert "plugin 'of_test_raises' (dist-raises 0.7) is broken: ZeroDiv" in one_line(
        run("plugins", "show", "raises")[2]
    )
    _, _, err = run("plugins", "list", "--traceback")
    assert re.search(r'File ".*of_test_raises.py", line 3', err)


def test_of_a_missing_name_only_those_are_named_that_might_have_it() -> None:
    class Learners:
        @hookimpl
        def register_learners(self, register: Callable[..., None]) -> None:
            raise ValueError("not today")

    found = plain.beside_builtins(plain=plain, mine=Learners())
    found.offered("learner")
    with pytest.raises(InputError, match=r"no learner 'x': .*; plugin 'mine' \(mine-plugin 1.0\) is broken: ValueErr"):
        found.component("learner", "x")
    with pytest.raises(InputError, match=r"no segmentor 'x': choose from [^;]*$"):
        found.component("segmentor", "x")


def test_two_plugins_of_one_name() -> None:
    class First:
        @hookimpl
        def register_learners(self, register: Callable[..., None]) -> None: ...

    found = Plugins()
    one = First()
    found.add(Origin("same", "dist-one", "1"), lambda: one)
    found.add(Origin("same", "dist-two", "2"), First)
    found.add(Origin("other", "dist-three", "3"), lambda: one)
    assert [str(broken) for broken in found.broken] == [
        "plugin 'same' (dist-two 2) is broken: there is another one of this name, plugin 'same' (dist-one 1): "
        "uninstall or rename one",
        "plugin 'other' (dist-three 3) is broken: its code is registered already, by plugin 'same' (dist-one 1): "
        "uninstall one of them",
    ]
    assert found.manager.get_plugin("same") is one


def test_a_constructor_that_cannot_be_called() -> None:
    def takes(*names: str) -> type:
        names_: dict[str, object] = {}
        exec(f"def __init__(self, {', '.join(names)}): ...", names_)
        return type("Odd", (plain.PlainSegmentor,), {"__init__": names_["__init__"]})

    for right in (("settings", "backbone"), ("settings", "backbone", "more=1"), ("*given",)):
        check_component("segmentor", "odd", takes(*right))
    for wrong in (("settings",), ("settings", "backbone", "more"), ("*", "settings", "backbone"), ()):
        with pytest.raises(PluginError, match=r"cannot be built as Odd\(settings, backbone\): "):
            check_component("segmentor", "odd", takes(*wrong))


def test_a_hook_that_is_deprecated_is_said_with_the_plugin(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark of a hook becomes one line, on stderr as all warnings, and the plugin works on."""

    def register_learners(register: object) -> None: ...

    said = DeprecationWarning("hook register_learners goes in icekit 9: use register_teachers")
    monkeypatch.setattr(hookspecs, "register_learners", hookspecs.hookspec(warn_on_impl=said)(register_learners))

    class Old:
        @hookimpl
        def register_learners(self, register: Callable[..., None]) -> None:
            register("old", plain.PlainLearner)

    found = Plugins()
    found.add(Origin("old", "old-plugin", "3.1"), Old)
    [line] = caplog.messages
    assert line.startswith(
        "plugin 'old' (old-plugin 3.1): hook register_learners goes in icekit 9: use register_teachers (test_plugin_"
    )
    assert found.component("learner", "old") is plain.PlainLearner and not found.broken


# --- The list, and the trace -----------------------------------------------------------------------------------------


def test_the_list_fits_100_columns(run: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICEKIT_PLUGINS")
    long = GLOSS.replace('"gloss", anchor', f'"{"g" * 38}", anchor')
    write_distribution(place / "site", "of_test_long", long, name="a-distribution-of-a-rather-long-name", version="1.0")
    status, out, err = run("plugins")
    assert status == 0, err
    assert max(len(line) for line in out.splitlines()) <= 100
    assert any(re.match(r"segmentor +xattn +A word's mask from .*… +icekit \S+ *$", line) for line in out.splitlines())
    out = run("plugins", "list", "--json")[1]
    assert any(one["name"] == "xattn" and one["summary"].endswith("training.") for one in json.loads(out)["plugins"])


def test_every_call_of_a_hook_is_traced(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICEKIT_TRACE", "1")
    status, _, err = run("run", "photo.png", *QUICK, "--plugin-file", "mine.py", "--set", "learner.steps=3")
    assert status == 0, err
    traced = [re.fullmatch(r"trace: (\w+) of (.+): \d+\.\d\d ms", line) for line in err.splitlines()]
    calls = [(one[1], one[2]) for one in traced if one]
    assert any(hook == "register_learners" and whose.startswith("plugin 'mine' (") for hook, whose in calls)
    assert ("step_done", "Progress") in calls and calls.count(("step_done", "Progress")) == 3
    monkeypatch.setenv("ICEKIT_TRACE", "0")
    assert "trace:" not in run("plugins", "list", "--plugin-file", "mine.py")[2]
