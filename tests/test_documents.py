"""What the documents state is what was measured."""

import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import EntryPoint
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from icekit import hookspecs

ROOT = Path(__file__).parent.parent
LEARNING = ("learning-seed-4409", "learning-seed-5519")
TEXTURE = ("texture-seed-4409", "texture-seed-5519")
TABLE = ("table-seed-6607", "table-seed-7703")
DEPARTURES = ("departures-seed-6607",)
FREE_DEPARTURES = ("departures-free-seed-6607",)
SHORT = ("sim_i", "acc1", "words_*", "transfer_colour", "leak_colour_material")
PARTS = ("sim_i", "acc?", "words_*", "images_*", "transfer_colour", "leak_colour_material", "recompose")
LONG = ("miou", "recall", "word_accuracy", "sim_?", "acc?", "words_*", "transfer_*", "leak_*", "recompose")


def columns(patterns: tuple[str, ...]) -> list[str]:
    return [option for pattern in patterns for option in ("--column", pattern)]


@cache
def comparison() -> click.Command:
    """The program that makes the tables."""
    spec = spec_from_file_location("comparison", ROOT / "benchmarks" / "comparison.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("document", "results", "options"),
    [
        ("README.md", LEARNING, ["--across", *columns(SHORT)]),
        ("docs/bench.md", LEARNING, ["--against", "described"]),
        ("docs/bench.md", TEXTURE, ["--across", "--against", "described"]),
        ("docs/bench.md", TABLE, ["--across", *columns(PARTS), "--against", "described"]),
        ("docs/bench.md", ("ice-published-seed-6607",), ["--across", "--against", "described"]),
        ("docs/method.md", DEPARTURES, ["--across", "--against", "ice"]),
        ("docs/method.md", FREE_DEPARTURES, ["--across", "--against", "free-rows"]),
        ("docs/bench.md", ("tabletop-seed-7",), ["--across", *columns(LONG)]),
    ],
)
def test_tables_are_those_of_the_results(document: str, results: tuple[str, ...], options: list[str]) -> None:
    files = [str(ROOT / "benchmarks" / f"{name}.json") for name in results]
    done = CliRunner().invoke(comparison(), [*files, *options])
    assert done.exit_code == 0, done.output
    made = done.output
    tables = re.findall(r"(?:^\|.*\n)+", made, flags=re.MULTILINE)
    assert len(tables) == 1 + ("--against" in options)
    text = (ROOT / document).read_text(encoding="utf-8")
    for table in tables:
        assert table.count("\n") > 3
        assert table in text


def test_memory_that_was_counted_is_that_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "memory-by-shape.json").read_text())
    pairs = {row["family"]: (row, twice) for row, twice in zip(rows[::2], rows[1::2], strict=True)}
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for row, twice in pairs.values():
        assert (row["checkpointing"], twice["checkpointing"]) == (False, True)
        assert f"| {row['step']} | {twice['step']} | {row['texts']} | {row['drawing']} |\n" in text
    for family, component in (("sd3", "sd3:StableDiffusion3"), ("flux", "flux:Flux"), ("sana", "sana:Sana"),
                              ("z-image", "z_image:ZImage"), ("flux2-klein", "flux2_klein:Flux2Klein")):  # fmt: skip
        known = EntryPoint("", f"icekit_dit.{component}", "").load().measured
        row, twice = pairs[family]
        assert (known.learning, known.checkpointed) == (row["step_a_million_pixels"], twice["step_a_million_pixels"])


@pytest.mark.slow
def test_memory_counted_by_shapes_is_what_a_card_was_measured_to_take(tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "memory_by_shape.py", tmp_path / "counts.json"
    subprocess.run([sys.executable, str(script), "--only", "sd21", "--json", str(out)], check=True, cwd=tmp_path)
    counted = json.loads(out.read_text())
    assert counted == json.loads((ROOT / "benchmarks" / "memory-by-shape.json").read_text())[:2]
    assert counted[0]["step"] == pytest.approx(counted[0]["measured_step"], rel=0.05)


@pytest.mark.parametrize("settings", sorted(ROOT.glob("plugins/*/pyproject.toml")), ids=lambda path: path.parent.name)
def test_type_hints_of_each_plugin_are_shipped(settings: Path) -> None:
    packages = [folder for folder in settings.parent.iterdir() if (folder / "__init__.py").exists()]
    assert all((package / "py.typed").exists() for package in packages if package.name != "tests")


def test_every_hook_has_its_place_on_a_page() -> None:
    hooks = {name for name, value in vars(hookspecs).items() if hasattr(value, "icekit_spec")}
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "hooks").glob("*.md"))
    assert set(re.findall(r"^::: icekit\.hookspecs\.([a-z_]+)$", pages, flags=re.MULTILINE)) == hooks
