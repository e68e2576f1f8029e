"""The program ``icekit``: its commands, and what becomes of errors.

Results go to stdout, progress and messages to stderr. Exit status: 0 done, 1 the run failed, 2 the input or the
settings are wrong, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from icekit import plugins
from icekit.cli.batch import batch
from icekit.cli.bench import run_bench
from icekit.cli.common import CommandGroup, Invocation, choice_in, common_options
from icekit.cli.compose import compose
from icekit.cli.demo import demo
from icekit.cli.doctor import doctor
from icekit.cli.export import export
from icekit.cli.find import find
from icekit.cli.import_ import import_files
from icekit.cli.plugins import plugins_group
from icekit.cli.push import push
from icekit.cli.report import report
from icekit.cli.run import run
from icekit.cli.streams import ResultsLost, guarded_streams
from icekit.foreign import is_of_the_machine, is_out_of_memory, nothing_after_results, said
from icekit.plugins import ComponentError
from icekit.protocols import InputError, RunError, StopRun
from icekit.protocols.errors import one_line
from icekit.run.atomic import CannotWrite, why
from icekit.run.machine import OutOfMemory
from icekit.wording import command_line

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


@click.group(cls=CommandGroup, params=common_options(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="icekit", message="icekit %(version)s")
def cli() -> None:
    """Find the concepts of one image and learn tokens for them and for their intrinsic attributes.

    `icekit run photo.jpg` finds the objects in the photo (a word and a mask each) and learns, from a pre-trained
    text-to-image model, tokens for each object and for its colour, its material, ...; `icekit compose` mixes them in
    prompts.
    """


for command in (demo, run, batch, compose, run_bench, export, import_files, report, find, push, plugins_group, doctor):
    cli.add_command(command)


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
    with guarded_streams(), command_line():
        status = _run(sys.argv[1:] if arguments is None else list(arguments), Invocation())
    sys.exit(status)


def _run(arguments: Sequence[str], invocation: Invocation) -> int:
    try:
        if "--traceback" not in arguments:
            quieten()
        _check_working_directory()
        invocation.choice = choice_in(arguments)
        plugins.choose(invocation.choice)
        plugins.installed().each("register_commands", cli=cli.of)
        cli.origin = None
        result = cli.main(args=list(arguments), prog_name="icekit", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
        return result if isinstance(result, int) else DONE
    except ResultsLost as error:
        return _fail(error, f"the results cannot be written to standard output: {why(error)}", invocation, FAILED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return DONE
    except click.ClickException as error:
        return _fail(error, error.format_message(), invocation, error.exit_code)
    except InputError as error:
        return _fail(error, str(error), invocation, WRONG_INPUT)
    except (CannotWrite, OutOfMemory) as error:
        passing = getattr(error, "passing", True)
        return _fail(error, f"{error}{_goes_on(invocation) if passing else ''}", invocation, FAILED)
    except StopRun as error:
        hint = f": `{invocation.resume}` goes on" if invocation.resume else ""
        return _fail(error, f"{error}{hint}", invocation, FAILED)
    except RunError as error:
        foreign = isinstance(error, ComponentError) and error.__cause__ is not None and not invocation.traceback
        return _fail(error, f"{error} (--traceback shows where)" if foreign else str(error), invocation, FAILED)
    except (KeyboardInterrupt, click.Abort) as error:
        hint = f": `{invocation.resume}` goes on" if invocation.resume else ""
        return _fail(error, f"interrupted{hint}", invocation, INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and is_of_the_machine(error):
            place = f"{error.filename}: " if error.filename else ""
            return _fail(error, f"{place}{why(error)}{_goes_on(invocation)}", invocation, FAILED)
        if is_out_of_memory(error):
            return _fail(error, f"out of memory: {said(error)}{_goes_on(invocation)}", invocation, FAILED)
        return _fail(error, f"{said(error)} (--traceback shows where)", invocation, FAILED)
    finally:
        if invocation.traceback:
            _show_broken_plugins()
        nothing_after_results()


def _show_broken_plugins() -> None:
    """Where each plugin broke, with file and line."""
    with contextlib.suppress(InputError):  # which plugins there are to be cannot be
        for broken in plugins.installed().broken:
            click.echo(f"{broken}:", err=True)
            if broken.error is not None:
                traceback.print_exception(broken.error)


def _check_working_directory() -> None:
    """Refuse to work where paths lead nowhere."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError("the working directory is not there any more: change to another one, as in `cd`") from error


def _goes_on(invocation: Invocation) -> str:
    return f"; `{invocation.resume}` goes on when there is more room" if invocation.resume else ""


def _fail(error: BaseException, message: str, invocation: Invocation, status: int) -> int:
    if invocation.traceback:
        traceback.print_exception(error)
    click.echo(f"icekit: {one_line(message)}", err=True)
    return status
