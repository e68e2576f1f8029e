"""Vocabularies, settings files and values: byte-order marks, other encodings, and what looks like something else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from icekit import files
from icekit.bench import bench
from icekit.builtin.retrievers.clip import ClipRetriever
from icekit.builtin.retrievers.words import WordsRetriever
from icekit.plugins import PluginError, check_attribute
from icekit.protocols import Attribute, ComponentSettings, InputError
from icekit.settings import Preset, Settings, load_settings, merge, parse_assignment, read_settings_file, validate
from icekit.words import read_vocabulary

BOM = b"\xef\xbb\xbf"


class Model(ComponentSettings):
    """Settings of every kind."""

    text: str | None = None
    words: tuple[str, ...] = ()
    file: Path | None = None
    count: int = 1
    rate: float = 1.0
    shares: tuple[float, ...] = ()
    share: float | None = None
    on: bool = False


def assigned(key: str, text: str) -> Any:
    return getattr(validate(Model, parse_assignment(f"{key}={text}")), key)


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message


# --- Encodings -------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(BOM + b"bottle\r\ncone\r\n")
    assert read_vocabulary(str(tmp_path / "words.txt")) == ["bottle", "cone"]
    (tmp_path / "a.toml").write_bytes(BOM + b"# Mine\nseed = 7\n")
    assert load_settings(tmp_path / "a.toml").seed == 7
    preset = Preset.read("mine", tmp_path / "a.toml")
    assert (preset.summary, preset.values) == ("Mine", {"seed": 7})
    assert assigned("words", "\ufeff['cup']") == ("cup",)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_bytes('naming = "é"'.encode(encoding))
    with pytest.raises(InputError) as error:
        read_vocabulary(str(tmp_path / "a"))
    one_line(error, str(tmp_path / "a"), "save it as UTF-8", *["UTF-16"] * (encoding == "utf-16"))
    with pytest.raises(InputError) as error:
        load_settings(tmp_path / "a")
    one_line(error, str(tmp_path / "a"), "is not TOML", "save it as UTF-8")


def test_what_is_no_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NO_WRITER_S", 0.1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").write_bytes(b"\0" * 100)
    for path, why in (
        (tmp_path, "directory"),
        (tmp_path / "pipe", "nothing came through"),
        (tmp_path / "zeros", "NUL"),
        (Path("/dev/zero"), "device"),
        (Path("~nosuchuser/a"), "no user's home directory"),
    ):
        for read in (lambda: read_vocabulary(str(path)), lambda: load_settings(path)):  # noqa: B023
            with pytest.raises(InputError) as error:
                read()
            one_line(error, str(path), why)


def test_home_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("seed = 7")
    assert read_vocabulary("~/a.txt") == ["seed = 7"]
    assert read_settings_file(Path("~/a.txt")) == {"seed": 7}
    assert assigned("file", "~/a.txt") == tmp_path / "a.txt"
    with pytest.raises(InputError) as error:
        assigned("file", "~nosuchuser/a")
    one_line(error, "'file'", "~nosuchuser/a", "no such user")


# --- Text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["7up", "7", "1e3", "0x1F", "1_000", "+5", "007", "inf", "nan", "true", "2024-01-01", "12:30:00", "1.50", "-"],
)
def test_text_stays_as_it_was_typed(text: str) -> None:
    assert assigned("text", text) == text
    assert assigned("file", text) == Path(text)
    values = parse_assignment(f"retriever.words={text}")["retriever"]
    assert validate(WordsRetriever.Settings, values).words == (text,)
    assert validate(ClipRetriever.Settings, {"templates": values["words"]}).templates == (text,)


def test_text_in_lists_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("words = [7, 1e3, 2024-01-01, true, 'cup']\ntext = 5e-1\n")
    model = validate(Model, read_settings_file(tmp_path / "a.toml"))
    assert (model.words, model.text) == (("7", "1e3", "2024-01-01", "true", "cup"), "5e-1")


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("count", "true"),
        ("count", "false"),
        ("rate", "true"),
        ("share", "false"),
        ("shares", "[0.5, true]"),
        ("rate", "inf"),
        ("rate", "-inf"),
        ("rate", "nan"),
        ("rate", "'nan'"),
        ("rate", "1e300"),
        ("rate", "1e30"),
        ("rate", "1e-40"),
        ("rate", "'1e300'"),
        ("rate", "1e999"),
        ("share", "inf"),
        ("shares", "[1e300]"),
        ("count", "1" * 30),
        ("count", "1" * 5000),
        ("rate", "1" * 5000),
        ("count", "inf"),
        ("count", "[" * 10_000 + "]" * 10_000),
        ("count", "{a=" * 10_000 + "1" + "}" * 10_000),
        ("count", "x" * 10_000),
    ],
)
def test_what_is_no_number_is_one_line(key: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        assigned(key, text)
    one_line(error, key)


@pytest.mark.parametrize("assignment", ["samples=true", "guidance_scale=inf", "guidance_scale=1e300", "seed=false"])
def test_a_runs_own_numbers(assignment: str) -> None:
    with pytest.raises(InputError) as error:
        load_settings(None, [assignment])
    one_line(error, f"'{assignment.partition('=')[0]}'", "number")
    with pytest.raises(InputError, match="setting 'samples' cannot be True: it should be a number"):
        Settings(samples=True)


@pytest.mark.parametrize("text", ["400", "5e-4", "'5e-4'", "1e9", "1e-30", "0"])
def test_what_is_a_number(text: str) -> None:
    assert assigned("rate", text) == float(text.strip("'"))
    assert type(assigned("rate", text)) is float
    assert assigned("on", "true") is True


@pytest.mark.parametrize("key", ["components", "learner", "backbone"])
@pytest.mark.parametrize("value", ["5", "true", "[]", "text", "2024-01-01"])
def test_a_table_is_wanted(key: Any, value: str) -> None:
    names_a_component = key != "components" and value in ("text", "2024-01-01")
    if names_a_component:
        settings = load_settings(None, [f"{key}={value}", f"{key}.option=a"])
        assert (settings.name_of(key), settings.values_of(key)) == (value, {"option": "a"})
    for others in ([], [f"{key}.backbone=a"]) if not names_a_component else ():
        with pytest.raises(InputError) as error:
            load_settings(None, [f"{key}={value}", *others])
        one_line(error, f"'{key}'")


@pytest.mark.parametrize("table", ["components", "dataset", "metric", "rows", "bench", "learner"])
def test_a_bench_wants_tables(table: str, tmp_path: Path) -> None:
    for value in (5, True, "text", [1]):
        with pytest.raises(InputError) as error:
            bench("folder", tmp_path / "bench", settings=merge({"dataset": {"path": str(tmp_path)}}, {table: value}))
        one_line(error, f"'{table}'", "a table")
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed = " + "1" * 5000, "too many digits"),
        ("seed = " + "[" * 10_000 + "]" * 10_000, "nested"),
        (".".join(["a"] * 10_000) + " = 1", "nested"),
        ("[" + ".".join(["a"] * 10_000) + "]", "nested"),
        ("samples = true", "'samples'"),
        ("guidance_scale = nan", "finite"),
        ("components = 5", "'components'"),
    ],
)
def test_files_that_would_break_the_reader(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError) as error:
        load_settings(tmp_path / "a.toml")
    one_line(error, why)


def test_keys_that_would_break_the_reader() -> None:
    with pytest.raises(InputError) as error:
        parse_assignment(".".join(["a"] * 10_000) + "=1")
    one_line(error, "KEY=VALUE")


# --- Attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["object", "Object", "category", "instance", "two words"])
def test_names_that_an_attribute_cannot_have(name: str) -> None:
    with pytest.raises(PluginError, match="cannot be an attribute's name"):
        check_attribute(Attribute(name, "thing", ("red",)))
