"""Types of the options that are paths and whole numbers, for commands of ours and of plugins."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from icekit.paths import user_path
from icekit.protocols import InputError

LARGEST_SEED = 2**63 - 1
_SHOWN = 40


class UserPath(click.ParamType[Any]):
    """A path as people type it: ``~`` is a home directory, and a name that no file can have is refused. A ``Path``."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; it need not exist."""
        try:
            return user_path(value)
        except InputError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Left to the shell."""
        return [CompletionItem(incomplete, type="file")]


class Whole(click.IntRange):
    """A whole number within bounds, in messages of one short line however many digits were typed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        text = str(value) if isinstance(value, str) else ""
        if len(text) > _SHOWN:
            kind = f"a number of {len(text)} digits" if text.isdecimal() else f"{text[: _SHOWN - 3]}..."
            self.fail(f"it should be {self._describe_range()}, and is {kind}", param, ctx)
        return super().convert(value, param, ctx)


SEED = Whole(min=0, max=LARGEST_SEED)
COUNT = Whole(min=1, max=10_000)
"""How many images: more than anybody waits for, and no more than memory holds."""
