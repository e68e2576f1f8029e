"""Every setting of every settings model, given what it cannot be: one line that names the key, in every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import tomli_w
from icekit_process import in_this_process
from PIL import Image
from pydantic import BaseModel, Field

from icekit.bench import bench
from icekit.bench.benchmark import BenchSettings
from icekit.plugins import KINDS, Plugins, installed
from icekit.protocols import ComponentSettings, InputError
from icekit.protocols.strict import LARGEST, SMALLEST, leaves
from icekit.settings import (
    ROLES,
    Components,
    Preset,
    Settings,
    flatten,
    load_settings,
    parse_assignment,
    read_settings_file,
    validate,
)

Run = Callable[..., tuple[int, str, str]]

NO_NUMBERS = (
    "true",
    "false",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "-1e300",
    "1e999",
    "1" * 30,
    "text",
    "[]",
    "{}",
    "{a = 1}",
)
"""What a number cannot be, as TOML or as it is typed."""
NO_WHOLE_NUMBERS = ("1.5", "1e-3", "0.1")
NO_TRUTH = ("5", "-1", "nan", "1e300", "text", "[]", "{}", "[true]")
NO_TEXT = ("[[1]]", "{a = 1}", "[{a = 1}]", '"a\\u0000b"')
NO_CHOICE = (*NO_TEXT, "5", "true", "nonsense", "''", "[]")
EVERYTHING = (*NO_NUMBERS, *NO_WHOLE_NUMBERS, *NO_TRUTH, *NO_TEXT, *NO_CHOICE, "-1", "0", "1e-40", "none", "[nan, inf]")


def settings_models() -> dict[str, tuple[str, type[BaseModel]]]:
    """All settings models of this environment: name -> (prefix of the keys, model)."""
    models: dict[str, tuple[str, type[BaseModel]]] = {
        "run": ("", Settings),
        "components": ("components.", Components),
        "bench": ("bench.", BenchSettings),
    }
    for kind in KINDS:
        for name, one in installed().offered(kind).items():
            if one.settings is not None:
                models[f"{kind} {name}"] = (f"{kind}.", one.settings)
    return models


def fields() -> Iterator[tuple[str, type[BaseModel], str]]:
    """(prefix, model, key) of every setting, each once."""
    seen = set()
    for prefix, model in settings_models().values():
        for key, field in model.model_fields.items():
            what = (prefix, key, str(field), model.model_validate if key == "words" else None)
            if what not in seen:
                seen.add(what)
                yield prefix, model, key


def refused(prefix: str, model: type[BaseModel], key: str, text: str) -> str | None:
    """Why a setting cannot be this; None if it can."""
    try:
        value = parse_assignment(f"{prefix}{key}={text}")
        for part in f"{prefix}{key}".split("."):
            value = value[part]
        made = validate(model, {key: value}, prefix)
    except InputError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600, (key, text)
        assert f"{prefix}{key}" in message or (f"{prefix[:-1]} settings: " in message and key in message), (
            key,
            message,
        )
        return message
    for number in numbers(getattr(made, key)):
        assert math.isfinite(number) and (number == 0 or SMALLEST <= abs(number) <= max(LARGEST, 2**63)), (key, text)
    return None


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from numbers(one)


def test_every_setting_of_every_model() -> None:
    """What cannot be is refused, and what is taken is finite. None of it is another error than one line."""
    assert not installed().broken
    count = 0
    for prefix, model, key in fields():
        kinds = leaves(model.model_fields[key].annotation) - {type(None)}
        wrong: tuple[str, ...] = ()
        if kinds <= {int, float} and kinds:
            wrong = NO_NUMBERS + (NO_WHOLE_NUMBERS if kinds == {int} else ())
        elif kinds == {bool}:
            wrong = NO_TRUTH
        elif kinds == {str} or kinds == {Path}:
            wrong = NO_TEXT
        elif any(getattr(kind, "_name", kind) == "Literal" for kind in kinds) and not kinds & {float}:
            wrong = NO_CHOICE
        for text in dict.fromkeys((*wrong, *EVERYTHING)):
            why = refused(prefix, model, key, text)
            count += 1
            if text in wrong and not (text == "{a = 1}" and key == "words" and prefix == "learner."):
                list_of_text = kinds == {str} and text in ("[{a = 1}]",) and key == "words" and prefix == "learner."
                assert why is not None or list_of_text, f"{prefix}{key} was taken as {text}"
    assert count > 5000


def test_from_python() -> None:
    """The same in ``Settings(...)`` of the Python API, for each number of a run."""
    for value in (True, math.nan, math.inf, 1e300, 10**5000, -(10**30), "text", [], {}, None, object()):
        for key in ("max_concepts", "samples", "seed", "min_visible", "min_area"):
            with pytest.raises(InputError, match=key):
                Settings(**{key: value})  # type: ignore[arg-type]
    deep: Any = 1
    for _ in range(10_000):
        deep = {"a": deep}
    with pytest.raises(InputError, match="nested at most"):
        Settings(learner=deep)


def test_bounds_are_the_fields_own_where_it_has_some() -> None:
    class Model(ComponentSettings):
        """Settings of a plugin."""

        seed: int = Field(0, ge=0, lt=2**63)
        far: float = Field(0, le=1e20)
        rate: float = 1
        pair: tuple[float, ...] = ()

    assert validate(Model, {"seed": 2**62, "far": 1e19}).seed == 2**62
    for key, value in {"seed": 2**63, "far": 1e21, "rate": 1e10, "pair": [1.0, 1e10]}.items():
        with pytest.raises(InputError, match=key):
            validate(Model, {key: value})
    assert validate(Model, {"rate": -LARGEST, "pair": [SMALLEST, 0]}).pair == (SMALLEST, 0)


def test_text_that_no_file_can_hold() -> None:
    class Model(ComponentSettings):
        """Settings of a plugin."""

        text: str = ""
        path: Path | None = None

    for key in ("text", "path"):
        for value in ("a\0b", "caf\udce9"):
            with pytest.raises(InputError, match=f"'{key}'"):
                validate(Model, {key: value})
    with pytest.raises(InputError, match="'path' cannot be '': it should be a path, not empty text"):
        validate(Model, {"path": ""})


def test_many_wrong_values_are_few_words() -> None:
    with pytest.raises(InputError) as error:
        validate(Settings, {f"wrong{number}": 1 for number in range(1000)})
    assert len(str(error.value)) < 900 and "and 997 more" in str(error.value)


# --- Layers ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a boolean": ({"samples": True}, "'samples'"),
    "infinite": ({"guidance_scale": math.inf}, "'guidance_scale'"),
    "too large": ({"guidance_scale": 1e300}, "'guidance_scale'"),
    "too many": ({"samples": 10**9}, "'samples'"),
    "a number for a table": ({"components": 5}, "'components'"),
    "a number for a component's table": ({"learner": 5}, "'learner'"),
    "a number for a component's own table": ({"learner": {"plain": 5}}, "'learner.plain'"),
    "an unknown learner": ({"components": {"learner": "plane"}}, "no learner 'plane': did you mean 'plain'?"),
    "an unknown role": ({"components": {"lerner": "plain"}}, "did you mean 'components.learner'"),
    "a component's unknown setting": ({"learner": {"stepz": 4}}, "did you mean 'learner.steps'"),
    "a component's boolean": ({"learner": {"steps": True}}, "'learner.steps'"),
    "a component's infinity": ({"learner": {"rate": math.inf}}, "'learner.rate'"),
    "a component's huge number": ({"learner": {"plain": {"rate": 1e300}}}, "'learner.rate'"),
    "an unknown key": ({"sample": 4}, "did you mean 'samples'"),
}
"""What a run's settings cannot be, nested, and what the line names."""
OF_A_BENCH: dict[str, tuple[dict[str, Any], str]] = {
    "data set": ({"dataset": 5}, "'dataset'"),
    "data set's path": ({"dataset": {"path": [5]}}, "'dataset.path'"),
    "data set's unknown": ({"dataset": {"pth": "x"}}, "'dataset.path'"),
    "metric": ({"metric": 5}, "'metric'"),
    "metric's own table": ({"metric": {"seen": 5}}, "'metric.seen'"),
    "metric's unknown": ({"metric": {"sen": {"a": 1}}}, "'metric.sen'"),
    "metric's own unknown": ({"metric": {"seen": {"a": 1}}}, "'metric.a'"),
    "bench": ({"bench": True}, "'bench'"),
    "bench's boolean": ({"bench": {"images": True}}, "'bench.images'"),
    "bench's huge": ({"bench": {"images": 10**12}}, "'bench.images'"),
    "rows": ({"rows": [1]}, "'rows'"),
    "a row": ({"rows": {"mine": 5}}, "'rows.mine'"),
}


@pytest.fixture
def found() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    return tmp_path


def assignments(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The same as ``--set`` takes it."""
    typed = []
    for key, value in values.items():
        if isinstance(value, dict):
            typed += assignments(value, f"{prefix}{key}.")
        else:
            text = str(value).lower() if isinstance(value, bool | float) else str(value)
            typed += ["--set", f"{prefix}{key}={text}"]
    return typed


@pytest.mark.parametrize("layer", ["--set", "--config", "preset", "python"])
def test_a_run_in_every_layer(
    layer: str, found: Plugins, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_this_process(place, monkeypatch, capsys)
    roles = {role: "plain" for role in ROLES}
    for name, (values, message) in WRONG.items():
        if layer == "preset" and (("component's" in name and "own" not in name) or "table" in name):
            continue  # there a component's settings are in tables of its name
        if layer in ("--set", "--config"):
            options = plain.OPTIONS if "components" not in values else []
            typed = assignments(values)
            if layer == "--config":
                (place / "wrong.toml").write_text(tomli_w.dumps(values))
                typed = ["--config", str(place / "wrong.toml")]
            if name == "an unknown learner":
                options = plain.OPTIONS[:3]
            status, out, err = run("run", "photo.png", "--out", "run", *options, *typed)
            assert (status, out, err.count("\n")) == (2, "", 1), (name, err)
            assert err.startswith("icekit: ") and message in err, (name, err)
        elif layer == "preset":
            (place / "wrong.toml").write_text(tomli_w.dumps(values))
            with pytest.raises(InputError) as error:
                Preset.read("wrong", place / "wrong.toml")
                found.component("learner", values["components"]["learner"])
            assert message in str(error.value) or "does not say which learner" in str(error.value), name
        else:
            with pytest.raises(InputError) as python_error:
                chosen = roles | values["components"] if isinstance(values.get("components"), dict) else roles
                found.resolve(Settings(**({"components": chosen} | values | _components(values, roles))))
            [key] = flatten(values)
            assert key.rpartition(".")[2] in str(python_error.value), name
        assert not (place / "run").exists()


def _components(values: dict[str, Any], roles: dict[str, str]) -> dict[str, Any]:
    given = values.get("components", {})
    return {"components": roles | given if isinstance(given, dict) else given}


@pytest.mark.parametrize(
    ("name", "layer"), [*((name, "row") for name in WRONG), *((name, "all") for name in [*WRONG, *OF_A_BENCH])]
)
def test_a_bench(name: str, layer: str, found: Plugins, place: Path) -> None:
    values, message = (WRONG | OF_A_BENCH)[name]
    mine = {"rows": {"mine": values}} if layer == "row" else values
    given = {"dataset": {"path": str(place)}} | mine
    with pytest.raises(InputError) as error:
        bench(
            "folder",
            place / "bench",
            components={role: ["plain"] for role in ROLES},
            metrics=["seen"],
            settings=given,
            installed=found,
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert layer == "all" or "'mine'" in str(error.value)
    assert not (place / "bench").exists()


def test_files_of_wrong_shapes(place: Path) -> None:
    for text, message in {
        "seed = " + "1" * 5000: "too many digits",
        "a = " + "[" * 10_000 + "]" * 10_000: "nested",
        "a = " + "{b=" * 10_000 + "1" + "}" * 10_000: "nested",
        "samples = 1\nsamples = 2": "not TOML",
        "[components]\nlearner = 5\n[components.learner]\na = 1": "not TOML",
    }.items():
        (place / "wrong.toml").write_text(text)
        for read in (read_settings_file, load_settings):
            with pytest.raises(InputError, match=message) as error:
                read(place / "wrong.toml")
            assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_commands_of_numbers(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of their own, which are no settings."""
    run = in_this_process(place, monkeypatch, capsys)
    bad = ("true", "nan", "inf", "1e300", "-1", "1.5", "x", "1" * 5000)
    for text in bad:
        for command in (
            ["run", "photo.png", "--max-concepts", text],
            ["run", "photo.png", "--seed", text],
            ["run", "photo.png", "--device", text],
            ["compose", "{a}", "a=run", "--n", text],
            ["bench", "folder", "--path", ".", "--out", "bench", "--n", text],
            ["bench", "folder", "--path", ".", "--out", "bench", "--seed", text],
            ["bench", "folder", "--path", ".", "--out", "bench", "--part", text],
        ):
            status, out, err = run(*command)
            assert (status, out) == (2, ""), (command[:4], text[:10], err)
            assert err.count("\n") == 1 and len(err) < 6000 and "Traceback" not in err
    assert sorted(one.name for one in place.iterdir()) == ["photo.png"]
