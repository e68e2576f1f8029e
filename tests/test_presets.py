"""Presets: what the shipped ones say, line by line, and where they stand among the layers of settings."""

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import plain_components as plain
import pytest
from icekit_process import icekit, in_this_process
from PIL import Image
from pydantic import BaseModel

from icekit import builtin, hookimpl
from icekit.bench.benchmark import BenchSettings
from icekit.builtin.datasets import folder as builtin_folder
from icekit.plugins import Origin, Plugins, installed
from icekit.protocols import ComponentSettings, InputError
from icekit.settings import BENCH_TABLES, ROLES, Components, ImageSettings, Settings, flatten, load_settings, validate

SHIPPED = sorted((Path(builtin.__file__).parents[1] / "presets").glob("*.toml"))
STATED = "as by default"
"""In the comment of a line that repeats icekit's default, for a backbone's own preset may say something else."""


NOT_THE_METHODS = {
    "which model and which words: the backbone's world": (
        "retriever.model", "retriever.pretrained", "retriever.vocabulary", "retriever.image_mean",
        "retriever.rerank_model", "retriever.rerank_pretrained",
    ),
    "how the work is divided, with equal result": ("learner.max_batch", "learner.checkpoint_every"),
    "without effect beside crop = false": ("retriever.crop_below",),
    "without effect beside noise = false": ("segmentor.draws",),
    "without effect beside one_piece = false": (
        "segmentor.dip", "segmentor.join", "segmentor.join_alike", "segmentor.alike",
    ),
    "without effect beside refinement = false": (
        "segmentor.foreground", "segmentor.background", "segmentor.colour_weight", "segmentor.map_weight",
        "segmentor.smoothness",
    ),
    "without effect beside refine_weights = \"all\"": ("learner.refine_rank",),
    "without effect beside word_steps = 0": (
        "learner.instance_start", "learner.word_draws", "learner.word_rate", "learner.word_sharpness",
        "learner.word_timestep_range", "learner.word_trust",
    ),
    "without effect beside close_ups = 0": ("learner.close_up_zoom",),
    "how the model samples": ("learner.prior_steps", "learner.prior_guidance"),
    "without effect beside attribute_rows = \"free\"": ("learner.word_learning_rate",),
}  # fmt: skip
"""Settings of its components that ``published`` need not state, by reason."""


def builtins() -> Plugins:
    found = Plugins()
    found.add(Origin("builtin", "icekit", "0"), lambda: builtin)
    return found


@dataclass(frozen=True)
class Line:
    """One setting of a preset's file: the table that it is in, its key, its value, its comment."""

    place: str
    key: str
    value: Any
    comment: str


def lines(file: Path) -> list[Line]:
    """The settings of a preset, each with the comment on its line, or the lines right above it."""
    text, values = file.read_text(encoding="utf-8"), tomllib.loads(file.read_text(encoding="utf-8"))
    found, place, above = [], "", ""
    for line in text.splitlines():
        if header := re.match(r"\[([\w.-]+)\]", line):
            place = header[1]
        elif setting := re.match(r"([\w.-]+) = [^#]*(?:# (.*))?$", line):
            *tables, key = [*filter(None, place.split(".")), *setting[1].split(".")]
            table: Any = values
            for part in tables:
                table = table[part]
            found.append(Line(".".join(tables), key, table[key], setting[2] or above))
        above = f"{above} {line[2:]}".strip() if line.startswith("# ") else ""
    return found


def model_of(place: str, plugins: Plugins) -> type[BaseModel]:
    """The settings model that a table of a preset is for."""
    role, *component = place.split(".")
    if role in (*ROLES, "metric"):
        [name] = component  # a preset's line names its component
        return plugins.component(role, name).Settings  # type: ignore[attr-defined,no-any-return]
    return {"": Settings, "components": Components, "image": ImageSettings, "bench": BenchSettings}[place]


@pytest.mark.parametrize("name", list(installed().offered("preset")))
def test_every_preset_of_this_repository(name: str) -> None:
    """Every key exists in the component that it names, its value validates, and it has a summary."""
    plugins = installed()
    plugins.check_preset(name)
    registered = plugins.offered("preset")[name]
    assert registered.summary
    for role in ("backbone", "dataset"):
        for one in plugins.offered(role).values():
            assert getattr(one.value, "preset", None) in (None, *plugins.offered("preset"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_line_of_a_shipped_preset(file: Path) -> None:
    """Its key is a setting, its value fits, its comment says where it is from, and it changes something."""
    plugins = builtins()
    assert file.stem in plugins.offered("preset")
    said = lines(file)
    assert {f"{line.place}.{line.key}".lstrip(".") for line in said} == flatten(tomllib.loads(file.read_text())).keys()
    values = tomllib.loads(file.read_text())
    below = flatten(plugins.preset(values["preset"]).values) if "preset" in values else {}
    for line in said:
        where = f"{file.name}: {line.place}.{line.key}"
        assert line.comment, f"{where} does not say where it comes from"
        if (line.place, line.key) == ("", "preset"):
            continue
        model = model_of(line.place, plugins)
        assert line.key in model.model_fields, f"{where} is no setting of anything"
        given = getattr(validate(model, {line.key: line.value}, f"{line.place}."), line.key)
        default = model.model_fields[line.key].default
        assert (given == default) == (STATED in line.comment) or below, f"{where}: is it {STATED}?"
        if line.place == "components":
            plugins.component(line.key, line.value)
        key = f"{line.place}.{line.key}".lstrip(".")
        assert key not in below or below[key] != line.value, f"{where} says what {values['preset']} says already"


def test_published_states_every_number_of_its_components() -> None:
    """A setting that it is silent about would be icekit's own choice, or the backbone's preset's."""
    plugins = builtins()
    values = plugins.preset("published").values
    silent = {
        f"{role}.{key}"
        for role in ("retriever", "segmentor", "learner")
        for name in [values["components"][role]]
        for key in plugins.component(role, name).Settings.model_fields.keys() - values[role][name].keys()  # type: ignore[attr-defined]
    }
    assert silent - {key for keys in NOT_THE_METHODS.values() for key in keys} == set()


def test_a_wrong_line_of_a_preset_would_be_found(tmp_path: Path) -> None:
    """The test above must be able to fail."""
    published = next(file for file in SHIPPED if file.stem == "published").read_text()
    for wrong in ("anchors = 16", "anchrs = 16  # DiffSeg", 'anchors = "many"  # DiffSeg', "anchors = 16  # DiffSeg"):
        file = tmp_path / "published.toml"
        file.write_text(re.sub(r"^anchors = 16 .*$", wrong, published, flags=re.MULTILINE))
        with pytest.raises((AssertionError, InputError)):
            test_every_line_of_a_shipped_preset(file)


# --- Layers ----------------------------------------------------------------------------------------------------------


class Learner:
    """A learner of a test."""

    class Settings(ComponentSettings):
        steps: int = 1
        rate: float = 0.1
        own_rate: float | None = 0.3

    def __init__(self, settings: object, backbone: object) -> None: ...

    def learn(self, *given: object, **named: object) -> None: ...


class Other(Learner):
    """Another one."""

    class Settings(ComponentSettings):
        steps: int = 2


def with_presets(folder: Path, **presets: str) -> Plugins:
    """The plain components, two learners, and presets of these texts."""

    class Plugin:
        @hookimpl
        def register_learners(self, register: Any) -> None:
            register("first", Learner)
            register("other", Other)

        @hookimpl
        def register_backbones(self, register: Any) -> None:
            register("own", type("Own", (plain.PlainBackbone,), {"preset": "own"}))

        @hookimpl
        def register_datasets(self, register: Any) -> None:
            register("data", type("Data", (builtin_folder.FolderDataset,), {"preset": "data"}))

        @hookimpl
        def register_presets(self, register: Any) -> None:
            for name, text in presets.items():
                (folder / f"{name}.toml").write_text(text)
                register(name, folder / f"{name}.toml")

    found = builtins()
    found.add(Origin("plain", "plain-plugin", "1"), lambda: plain)
    found.add(Origin("presets", "presets", "1"), Plugin)
    assert found.broken == []
    return found


PRESET = """# A short one
min_visible = 0.2
samples = 7
[components]
backbone = "plain"
retriever = "plain"
segmentor = "plain"
learner = "first"
[learner.first]
steps = 30
rate = 0.5
own_rate = "none"
[learner]
other.steps = 31
[metric]
sim_i.prompt = "attributes"
"""
OWN = """# The backbone's own
min_visible = 0.4
max_concepts = 3
[learner.first]
own_rate = 0.9
steps = 5
"""
OF_THE_DATA = """# The data set's
max_concepts = 4
sample_steps = 12
[components]
backbone = "own"
learner = "other"
"""


def test_a_preset_lies_between_the_backbones_own_and_what_was_given(tmp_path: Path) -> None:
    found = with_presets(tmp_path, short=PRESET, own=OWN, data=OF_THE_DATA)
    options = {"components": {"backbone": "own"}}
    full = found.resolve(load_settings(None, ["preset=short", "samples=1"], options))
    assert (full.preset, full.min_visible, full.max_concepts, full.samples) == ("short", 0.2, 3, 1)
    assert full.learner == {"steps": 30, "rate": 0.5, "own_rate": None}
    assert full.components.learner == "first"
    # The complete settings, read again, are the same, whatever presets say.
    (tmp_path / "settings.toml").write_text(full.to_toml())
    assert found.resolve(load_settings(tmp_path / "settings.toml")) == full


def test_the_preset_of_a_data_set_lies_above_the_backbones(tmp_path: Path) -> None:
    found = with_presets(tmp_path, short=PRESET, own=OWN, data=OF_THE_DATA)
    plain_parts = {"retriever": "plain", "segmentor": "plain"}
    given = load_settings(None, [], {"components": plain_parts})
    assert [preset.name for preset in found.presets_of(given, "data")] == ["own", "data"]
    full = found.resolve(given, "data")
    assert (full.components.backbone, full.components.learner) == ("own", "other")
    assert (full.min_visible, full.max_concepts, full.sample_steps) == (0.4, 4, 12)
    chosen = load_settings(None, ["preset=short", "max_concepts=5"], {"components": plain_parts})
    assert [preset.name for preset in found.presets_of(chosen, "data")] == ["plain", "data", "short"]
    full = found.resolve(chosen, "data")
    assert found.chosen(chosen, "data") == full.components
    assert (full.components.backbone, full.components.learner) == ("plain", "first")
    assert (full.min_visible, full.max_concepts, full.sample_steps) == (0.2, 5, 12)


def test_settings_for_a_component_that_was_replaced_are_passed_over(tmp_path: Path) -> None:
    found = with_presets(tmp_path, short=PRESET)
    full = found.resolve(load_settings(None, ["preset=short"], {"components": {"learner": "other"}}))
    assert (full.components.learner, full.learner) == ("other", {"steps": 31})
    with pytest.raises(InputError, match=r"unknown setting 'learner.rate'"):  # given, it is still refused
        found.resolve(load_settings(None, ["preset=short", "learner.rate=1"], {"components": {"learner": "other"}}))


def test_a_preset_does_not_reach_a_component_that_it_does_not_name(tmp_path: Path) -> None:
    """Somebody's own component has settings of these names, and they mean something else there."""

    class Plugin:
        @hookimpl
        def register_retrievers(self, register: Any) -> None:
            register("mine", Mine)

    class Mine:
        class Settings(ComponentSettings):
            model: Literal["mine"] = "mine"
            vocabulary: int = 7
            steps: int = 3

        def __init__(self, settings: object, backbone: object) -> None: ...

        def retrieve(self, *given: object, **named: object) -> None: ...

    found = installed_with(Plugin)
    for preset in found.offered("preset"):
        given = {"components": {"retriever": "mine"}} | ({"preset": preset} if preset != "tabletop-bench" else {})
        for dataset in (None, "tabletop"):
            full = found.resolve(load_settings(options=given), dataset)
            assert full.retriever == {"model": "mine", "vocabulary": 7, "steps": 3}
    assert full.components.backbone == "tabletop"


def installed_with(plugin: type) -> Plugins:
    """What is installed here, and one more plugin."""
    found = Plugins()
    for other, origin in installed()._origins.items():
        found.add(origin, lambda other=other: other)
    found.add(Origin("mine", "mine", "1"), plugin)
    assert found.broken == []
    return found


def test_a_preset_built_on_another(tmp_path: Path) -> None:
    round_trip = {"a": '# a\npreset = "b"\n', "b": '# b\npreset = "a"\n'}
    longer = '# A longer one\npreset = "short"\nmin_visible = 0.3\n[learner.first]\nrate = 0.6\n'
    found = with_presets(tmp_path, short=PRESET, longer=longer, **round_trip)
    full = found.resolve(Settings(preset="longer"))
    assert (full.preset, full.min_visible, full.samples, full.learner["rate"]) == ("longer", 0.3, 7, 0.6)
    with pytest.raises(InputError, match="preset 'a' is built on itself: a on b on a"):
        found.resolve(Settings(preset="a"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("min_visble = 0.3", "did you mean 'min_visible'?"),
        (
            "[learner]\nsteps = 3",
            "preset 'odd' does not say which learner its setting 'learner.steps' is for: put it under [learner.NAME]",
        ),
        ("[metric]\nprompt = 'a'", "setting 'metric.prompt' is for: put it under [metric.NAME]"),
        ("metric = 3", "setting 'metric.' is for: put it under [metric.NAME]"),
        ("describe = true", "there is no setting 'describe' any more: set naming to"),
    ],
)
def test_a_broken_preset_is_named_and_left_out(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "odd.toml").write_text(f"{text}\n")

    class Plugin:
        @hookimpl
        def register_presets(self, register: Any) -> None:
            register("odd", tmp_path / "odd.toml")

    found = builtins()
    found.add(Origin("odd", "odd", "1"), Plugin)
    assert list(found.offered("preset")) == ["published", "paper", "weighed", "uce"]
    assert reason in str(found.broken[0])


# --- As a user meets them --------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.effect_noise((128, 128), 80).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path


@pytest.mark.slow
def test_the_published_preset_runs(photo: Path, sd_folder: Path, clip_folder: Path) -> None:
    few = {
        "backbone.model": str(sd_folder),
        "retriever.model": f"local-dir:{clip_folder}",
        "retriever.rerank_model": f"local-dir:{clip_folder}",
        "retriever.vocabulary": '["cup", "ball", "bowl"]',
        "retriever.l1_penalty": 1e-3,
        "retriever.background": "[]",
        "segmentor.prompt": "{word}",  # without rivals: these weights are random
        "segmentor.erase_with": "[]",
        "learner.steps": 4,
        "learner.refine_steps": 2,
        "learner.prior_images": 1,
        "min_area": 0,
        "max_concepts": 1,
        "samples": 1,
        "sample_steps": 1,
    }
    arguments = [part for key, value in few.items() for part in ("--set", f"{key}={value}")]
    done = icekit(["run", "photo.png", "--preset", "published", *arguments, "--out", "run", "--json"], photo)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["presets"] == ["published"]
    assert list(manifest["components"].values()) == ["sd21", "splice", "diffseg", "ice"]
    settings = tomllib.loads((photo / "run" / "settings.toml").read_text())
    assert (settings["preset"], settings["erase"], settings["learner"]["steps"]) == ("published", "black", 4)
    assert "published" in (photo / "run" / "report.html").read_text()


def test_a_run_goes_on_with_its_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_this_process(tmp_path, monkeypatch, capsys)
    Image.new("RGB", (60, 50), "red").save(tmp_path / "photo.png")
    arguments = ["run", "photo.png", "--out", "run", *plain.OPTIONS, "--set", "samples=0", "--preset", "published"]
    assert run(*arguments, "--set", "learner.fail_at=7")[0] == 1
    status, _, err = run("run", "photo.png", "--out", "run", "--resume", "--preset", "paper")
    assert (status, "preset was published, now paper" in err) == (2, True), err
    assert run(*arguments, "--overwrite")[0] == 0
    status, out, err = run("run", "photo.png", "--out", "run", "--resume", "--json")
    assert status == 0, err
    assert json.loads(out)["presets"] == ["plain", "published"]
    assert 'preset = "published"' in (tmp_path / "run" / "settings.toml").read_text()


def test_presets_are_named_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_this_process(tmp_path, monkeypatch, capsys)
    for command in ("run", "bench"):
        assert "published, paper" in " ".join(run(command, "--help")[1].split())
    status, out, _ = run("plugins", "show", "published")
    assert status == 0
    assert SHIPPED[[file.stem for file in SHIPPED].index("published")].read_text().strip() in out
    assert json.loads(run("plugins", "show", "paper", "--json")[1])[0]["settings"]["preset"] == "published"
    assert "preset" in run("plugins", "list")[1]
    Image.new("RGB", (60, 50), "red").save(tmp_path / "photo.png")
    status, out, err = run("run", "photo.png", "--preset", "publishd")
    assert (status, out, err) == (2, "", "icekit: no preset 'publishd': did you mean 'published'?\n")


def test_a_bench_takes_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clip_folder: Path
) -> None:
    run = in_this_process(tmp_path, monkeypatch, capsys)
    (tmp_path / "data").mkdir()
    Image.new("RGB", (plain.SIDE, plain.SIDE), "red").save(tmp_path / "data" / "one.png")
    arguments = ["bench", "folder", "--path", "data", *plain.OPTIONS, "--metric", "sim_i", "--preset", "published"]
    arguments += ["--set", f"metric.clip=local-dir:{clip_folder}", "--set", "bench.images=1", "--out", "bench"]
    status, _, err = run(*arguments, "--set", "sample_steps=3", "--set", "learner.steps=2")
    assert status == 0, err
    settings = json.loads((tmp_path / "bench" / "bench.json").read_text())["settings"]
    assert (settings["run"]["preset"], settings["run"]["erase"]) == ("published", "black")
    assert (settings["run"]["sample_steps"], settings["learner"]["plain"]["steps"]) == (3, 2)
    assert settings["metric"]["sim_i"]["prompt"] == "attributes"
    assert set(BENCH_TABLES) == {"metric", "bench"}
    assert run(*arguments[:-1], "other", "--preset", "paer")[0] == 2
