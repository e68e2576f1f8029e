"""The command line: parses, calls the API, prints.

Results go to stdout, progress and messages to stderr. Exit status: 0 done, 1 the run failed, 2 the input or the
settings are wrong, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from icekit import plugins
from icekit.protocols import InputError, RunError
from icekit.settings import Preset, load_settings, merge, nearest, parse_assignment, read_settings_file

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.table import Table

    from icekit.run.directory import Extraction

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass
class Invocation:
    """What ``main`` wants to know of the command line, wherever in it it stands."""

    traceback: bool = False
    resume: str = ""
    """The command that goes on with the run, once there is one."""


def _note_traceback(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(context.find_root().obj, Invocation):
        context.find_root().obj.traceback = True


def _traceback_option() -> click.Option:
    return click.Option(
        ["--traceback"],
        is_flag=True,
        expose_value=False,
        callback=_note_traceback,
        help="Show where an error came from.",
    )


class CommandGroup(click.Group):
    """A group whose commands, a plugin's too, all take ``--traceback``."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, and the option to it."""
        if not any("--traceback" in parameter.opts for parameter in cmd.params):
            cmd.params.append(_traceback_option())
        super().add_command(cmd, name)


@click.group(cls=CommandGroup, params=[_traceback_option()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="icekit", message="icekit %(version)s")
def cli() -> None:
    """Find the concepts of one image and learn tokens for them and for their intrinsic attributes.

    `icekit run photo.jpg` finds the objects in the photo (a word and a mask each) and learns, from a pre-trained
    text-to-image model, tokens for each object and for its colour, its material, ...; `icekit compose` mixes them in
    prompts.
    """


def _component_option(role: str, what: str, default: str) -> Callable[[Any], Any]:
    return click.option(f"--{role}", metavar="NAME", help=f"{what} [default: {default}; `icekit plugins` lists them]")


class PresetOption(click.Option):
    """``--preset``, whose help names the presets that are installed."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        names = ", ".join(plugins.installed().offered("preset"))
        self.help = f"Named settings: {names} (`icekit plugins show NAME` prints them)"
        return super().get_help_record(ctx)


_preset_option = click.option("--preset", cls=PresetOption, metavar="NAME")


@cli.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run directory [default: runs/<image stem>]"
)
@_preset_option
@_component_option("backbone", "Text-to-image model", "sd21")
@_component_option("retriever", "What finds words for the image", "clip")
@_component_option("segmentor", "What finds a word's place in the image", "xattn")
@_component_option("learner", "What learns the tokens", "ice")
@click.option("--attribute", "attributes", multiple=True, metavar="NAME", help="Learn this attribute; give it once for "
              "each [default: colour and material]")  # fmt: skip
@click.option("--max-concepts", type=int, metavar="N", help="Stop looking after this many concepts [default: 10]")
@click.option("--seed", type=int, metavar="N", help="Every random choice follows from it [default: 0]")
@click.option("--device", metavar="auto|cpu|cuda|mps", help="Where the models run [default: auto]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE.toml", help="Settings file; the settings.toml "
              "of a run directory is one")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting, as in learner.steps=400; "
              "`icekit plugins show NAME` lists a component's")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the run in DIR where it was interrupted, with its settings.")
@click.option("--overwrite", is_flag=True, help="Replace the run in DIR. Files that are not icekit's stay.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.pass_context
def run(
    context: click.Context,
    image: Path,
    out: Path | None,
    preset: str | None,
    attributes: Sequence[str],
    max_concepts: int | None,
    seed: int | None,
    device: str | None,
    config: Path | None,
    assignments: Sequence[str],
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **components: str | None,
) -> None:
    """Extract the concepts of IMAGE into a run directory.

    Settings come in layers, later ones win: defaults, what the backbone suggests, --preset, --config, --set, the
    options above.
    An interrupted run keeps what it has done; --resume goes on with it.
    """
    chosen = {role: name for role, name in components.items() if name is not None}
    options: dict[str, Any] = {"preset": preset, "attributes": attributes, "max_concepts": max_concepts, "seed": seed}
    options |= {"device": device}
    given = {key: value for key, value in (options | {"components": chosen}).items() if value not in (None, (), {})}
    settings = load_settings(config, assignments, given)

    from icekit.cli.progress import Progress
    from icekit.run.orchestrator import extract

    if isinstance(context.find_root().obj, Invocation):
        folder = out or Path("runs") / image.stem
        context.find_root().obj.resume = shlex.join(["icekit", "run", str(image), "--out", str(folder), "--resume"])
    found = plugins.installed()
    progress = Progress([str(broken) for broken in found.broken])
    extraction = extract(
        image, out, settings, resume=resume, overwrite=overwrite, observers=[progress], installed=found
    )
    if as_json:
        click.echo(json.dumps(extraction.manifest, indent=1, ensure_ascii=False))
    else:
        _print_concepts(extraction)


@cli.command()
@click.argument("prompt")
@click.argument("concepts", nargs=-1, required=True, metavar="NAME=RUN_DIR[:CONCEPT]...")
@click.option("--n", default=4, show_default=True, metavar="N", help="Number of images.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Every random choice follows from it.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[default: a new folder in compositions/]")
@click.option("--device", metavar="auto|cpu|cuda|mps", help="Where the model runs [default: as the run's]")
@click.option("--overwrite", is_flag=True, help="Replace the composition in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def compose(
    prompt: str,
    concepts: Sequence[str],
    n: int,
    seed: int,
    out: Path | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Generate images from PROMPT, mixing concepts of earlier runs.

    Each NAME=RUN_DIR[:CONCEPT] binds a concept (by index or label; the first one if left out) to a name of the prompt:
    {a} is the object, {a.colour} its colour, {a.category} the kind of thing it is, {a.instance} what makes it this one.

    icekit compose "a cup, {b.material} {b.colour}" b=runs/photo:bowl
    """
    bindings = {}
    for concept in concepts:
        name, equals, reference = concept.partition("=")
        if not equals or not reference:
            raise InputError(f"{concept!r}: expected NAME=RUN_DIR[:CONCEPT], as in a=runs/photo:cup")
        if name in bindings:
            raise InputError(f"{concept!r}: the name {name!r} is given twice")
        bindings[name] = reference

    from icekit.run.compose import compose as compose_images

    made = compose_images(prompt, bindings, n=n, seed=seed, out=out, device=device, overwrite=overwrite)
    if as_json:
        click.echo((made.out / "prompt.json").read_text(encoding="utf-8").rstrip())
    else:
        for path in made.images:
            click.echo(path)


def _several(role: str, what: str) -> Callable[[Any], Any]:
    return click.option(f"--{role}", f"{role}s", multiple=True, metavar="NAME", help=what)


def _parse_part(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", value)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise click.BadParameter(f"{value!r} is no part: it is K/N with K from 1 to N, as in 1/2")
    return int(found[1]), int(found[2])


@cli.command("bench")
@click.argument("dataset", metavar="DATASET")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Bench directory")
@click.option(
    "--n", "count", type=click.IntRange(min=1), metavar="N", help="Number of images [default: the data set's]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Which "
              "images, where there is a choice, and every other random choice.")  # fmt: skip
@_preset_option
@_several("retriever", "Measure this retriever; give it once for each")
@_several("segmentor", "Measure this segmentor; give it once for each")
@_several("learner", "Measure this learner; give it once for each")
@_several("attribute", "Learn this attribute; give it once for each")
@_several("metric", "Measure this; give it once for each [default: all that suit the data set]")
@click.option("--backbone", metavar="NAME", help="Text-to-image model [default: the data set's, or sd21]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings file (TOML); a table "
              "[rows.NAME] in it is a row of its own, with settings over the others")  # fmt: skip
@click.option("--path", type=click.Path(path_type=Path), metavar="FOLDER", help="The pictures, for the data set folder")
@click.option("--device", metavar="auto|cpu|cuda|mps", help="Where the models run [default: auto]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting, as in learner.steps=400 "
              "(all learners that have it), learner.ice.steps=400 (one), bench.images=4")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the bench in DIR, with the same settings.")
@click.option("--overwrite", is_flag=True, help="Replace the bench in DIR.")
@click.option("--part", metavar="K/N", callback=_parse_part, default="1/1", help="Measure every N-th image alone, from "
              "the K-th on; the table is for a last call without this.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def run_bench(
    context: click.Context,
    dataset: str,
    out: Path,
    count: int | None,
    seed: int,
    preset: str | None,
    retrievers: Sequence[str],
    segmentors: Sequence[str],
    learners: Sequence[str],
    attributes: Sequence[str],
    metrics: Sequence[str],
    backbone: str | None,
    config: Path | None,
    path: Path | None,
    device: str | None,
    assignments: Sequence[str],
    resume: bool,
    overwrite: bool,
    part: tuple[int, int],
    as_json: bool,
) -> None:
    """Measure every combination of the components given on DATASET, a floor and a ceiling.

    Prints a table of means with their 95 % bootstrap intervals over images, and writes results.json, results.csv and
    bench.html into DIR. What was measured is kept: --resume goes on where a bench was interrupted, and measures
    learners, metrics or images that were added.

    icekit bench tabletop --n 8 --learner ice --learner textual-inversion --out runs/bench
    """
    settings = read_settings_file(config) if config is not None else {}
    for assignment in assignments:
        settings = merge(settings, parse_assignment(assignment))
    options = {"preset": preset, "attributes": list(attributes), "device": device}
    settings = merge(settings, {key: value for key, value in options.items() if value})
    if path is not None:
        settings = merge(settings, {"dataset": {"path": str(path)}})
    components = {"retriever": retrievers, "segmentor": segmentors, "learner": learners}
    components |= {"backbone": [backbone] if backbone else []}

    typed = shlex.join(["icekit", *sys.argv[1:]])
    if isinstance(context.find_root().obj, Invocation):
        again = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        context.find_root().obj.resume = shlex.join(["icekit", *again, "--resume"])
    from icekit.bench import bench
    from icekit.bench.results import cell, heading, notes
    from icekit.cli.progress import BenchProgress

    found = plugins.installed()
    with BenchProgress([str(broken) for broken in found.broken]) as progress:
        made = bench(
            dataset,
            out,
            count=count,
            seed=seed,
            components=components,
            metrics=metrics,
            settings=settings,
            resume=resume,
            overwrite=overwrite,
            part=part,
            command=typed,
            on_progress=progress.show,
            installed=found,
        )
    if as_json:
        click.echo(json.dumps(made, indent=1, ensure_ascii=False))
        return
    if part[1] > 1:
        click.echo(f"{out}: part {part[0]} of {part[1]} is measured ({made['n']} images)")
        return
    columns = list(made["columns"])
    at_once = max(1, (shutil.get_terminal_size().columns - 20) // 21) if sys.stdout.isatty() else len(columns)
    for start in range(0, len(columns), at_once):
        shown = columns[start : start + at_once]
        table = _table("", *(heading(column, made["columns"][column]) for column in shown))
        for row in made["rows"]:
            table.add_row(row["name"], *(cell(row["values"].get(column)) for column in shown))
        _print(table)
    for note in notes(made):
        click.echo(note)
    click.echo(f"{out} (page: {out / 'bench.html'})")


@cli.command("report")
@click.argument("run_dir", type=click.Path(path_type=Path))
def write_report(run_dir: Path) -> None:
    """Write the report of RUN_DIR anew, and print its path."""
    from icekit.report.page import write_report
    from icekit.run.directory import Extraction

    Extraction.open(run_dir)
    click.echo(write_report(run_dir))


@cli.group("plugins", cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def plugins_group(context: click.Context) -> None:
    """What is installed: components, attributes and presets by name, and plugins that are broken."""
    if context.invoked_subcommand is None:
        context.invoke(list_plugins, as_json=False)


@plugins_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_plugins(as_json: bool) -> None:
    """List components, attributes and presets by name, and plugins that are broken."""
    found = plugins.installed()
    everything = [one for role in plugins.KINDS for one in found.offered(role).values()]
    if as_json:
        listed = [
            {"kind": one.role, "name": one.name, "summary": one.summary, **vars(one.origin)} for one in everything
        ]
        broken = [{**vars(one.origin), "reason": one.reason} for one in found.broken]
        click.echo(json.dumps({"plugins": listed, "broken": broken}, indent=1))
        return
    table = _table("kind", "name", "what it is", "from")
    for one in everything:
        table.add_row(one.role, one.name, one.summary, f"{one.origin.distribution} {one.origin.version}")
    _print(table)
    for trouble in found.broken:
        click.echo(str(trouble))


@plugins_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show_plugin(name: str, as_json: bool) -> None:
    """Show what NAME is, and its settings: a component's with defaults and meaning, a preset's as they are."""
    found = plugins.installed()
    everything = [one for role in plugins.KINDS for one in found.offered(role).values()]
    matching = [one for one in everything if name in (one.name, *getattr(one.value, "aliases", ()))]
    if not matching:
        suspects = "".join(f"; {broken}" for broken in found.broken)
        raise InputError(f"nothing is called {name!r}: {nearest(name, {one.name for one in everything})}{suspects}")
    if as_json:
        click.echo(json.dumps([_describe(one) for one in matching], indent=1))
        return
    for one in matching:
        click.echo(f"{one.role} {one.name}: {one.summary}\n{one.origin}")
        if isinstance(one.value, Preset):
            click.echo(f"\n{one.value.text.rstrip()}")
        elif one.settings is None:
            click.echo(f"vocabulary: {', '.join(one.value.vocabulary)}")
        else:
            for row in _describe(one)["settings"]:
                click.echo(f"\n  {row['key']} = {json.dumps(row['default'], ensure_ascii=False)}  ({row['type']})")
                click.echo(f"      {row['meaning']}")


def _describe(one: plugins.Registered) -> dict[str, Any]:
    description: dict[str, Any] = {"kind": one.role, "name": one.name, "summary": one.summary, **vars(one.origin)}
    if isinstance(one.value, Preset):
        return description | {"settings": one.value.values}
    if one.settings is None:
        return description | {"anchor": one.value.anchor, "vocabulary": list(one.value.vocabulary)}
    properties = one.settings.model_json_schema()["properties"] if one.settings.model_fields else {}
    rows = [
        {
            "key": f"{one.role}.{key}",
            "type": _type_name(field),
            "default": None if field.is_required() else properties[key].get("default"),
            "meaning": field.description or "",
        }
        for key, field in one.settings.model_fields.items()
    ]
    return description | {"settings": rows}


def _type_name(field: FieldInfo) -> str:
    kind: Any = field.annotation
    name = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    return name.replace("typing.", "").replace("pathlib.", "")


def _print_concepts(extraction: Extraction) -> None:
    attributes = extraction.manifest["attributes"]
    table = _table("", "concept", "score", "area", *attributes, "tokens")
    for concept in extraction.concepts:
        words = [", ".join(concept.words.get(attribute, [])) or "–" for attribute in attributes]
        tokens = " ".join(concept.tokens.values())
        table.add_row(str(concept.index), concept.label, f"{concept.score:.2f}", f"{concept.area:.0%}", *words, tokens)
    _print(table)
    preset, steps = extraction.manifest.get("preset"), extraction.manifest.get("learning_steps")
    if steps is not None:
        click.echo(f"{steps} learning steps, {f'preset {preset}' if preset else 'no preset'}")
    click.echo(f"{extraction.run_dir} (report: {extraction.run_dir / 'report.html'})")


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # A file or a pipe has no width: a row stays a line.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000, markup=False).print(table)


def quieten() -> None:
    """Keep other libraries' warnings, logs and progress bars off stderr: it is for our own."""
    for name, value in {
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("icekit").setLevel(logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program ``icekit``: runs a command and leaves with its exit status."""
    invocation = Invocation()
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments), invocation))


def _run(arguments: Sequence[str], invocation: Invocation) -> int:
    try:
        if "--traceback" not in arguments:
            quieten()
        plugins.installed().each("register_commands", cli=cli)
        result = cli.main(args=list(arguments), prog_name="icekit", standalone_mode=False, obj=invocation)
        return result if isinstance(result, int) else DONE
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return DONE
    except click.ClickException as error:
        return _fail(error, error.format_message(), invocation, error.exit_code)
    except InputError as error:
        return _fail(error, str(error), invocation, WRONG_INPUT)
    except RunError as error:
        return _fail(error, str(error), invocation, FAILED)
    except (KeyboardInterrupt, click.Abort) as error:
        hint = f": `{invocation.resume}` goes on" if invocation.resume else ""
        return _fail(error, f"interrupted{hint}", invocation, INTERRUPTED)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return _fail(error, f"{message} (--traceback shows where)", invocation, FAILED)


def _fail(error: BaseException, message: str, invocation: Invocation, status: int) -> int:
    if invocation.traceback:
        traceback.print_exception(error)
    click.echo(f"icekit: {' '.join(message.split())}", err=True)
    return status
