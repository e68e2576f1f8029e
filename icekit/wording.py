"""How messages name what a user can give: as an option to those who type a command, as an argument to a program.

The same errors are raised for both. What they advise is put into words where they are raised, by these functions, so
that ``--overwrite`` is not told to somebody who called ``icekit.extract``. Words in capitals (``FOLDER``) stand for
what is to be given.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_typed: ContextVar[bool] = ContextVar("typed", default=False)


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Within the block messages are for somebody who typed a command."""
    before = _typed.set(True)
    try:
        yield
    finally:
        _typed.reset(before)


def is_typed() -> bool:
    """Whether messages are for somebody who typed a command."""
    return _typed.get()


def option(name: str, value: str = "") -> str:
    """``--out DIR``, or ``out=DIR``; without a value ``--overwrite``, or ``overwrite=True``."""
    if is_typed():
        return f"--{name} {value}".strip()
    return f"{name.replace('-', '_')}={value or 'True'}"


def named(name: str) -> str:
    """An option that takes a value, by its name alone: ``--out``, or ``out``."""
    return f"--{name}" if is_typed() else name.replace("-", "_")


def settings(values: Mapping[str, Any]) -> str:
    """``--set backbone.dtype=float32``, or ``Settings(backbone={"dtype": "float32"})``.

    values: nested by role. A role's name for itself is a component: ``--retriever clip``.
    """
    if not is_typed():
        return f"Settings({', '.join(f'{key}={_in_python(value)}' for key, value in values.items())})"
    words = []
    for key, value in values.items():
        if isinstance(value, str):
            words.append(f"--{key} {value}")
        elif isinstance(value, Mapping):
            lowered = {"low_memory": "--low-memory"} if key == "backbone" else {}
            words += [lowered.get(name) or f"--set {key}.{name}={_on_a_line(one)}" for name, one in value.items()]
        else:
            words.append(f"--set {key}={_on_a_line(value)}")
    return " ".join(words)


def run_into(folder: str | Path, flag: str = "") -> str:
    """A run: `` `icekit run IMAGE --out DIR --resume` ``, or `` `extract(IMAGE, "DIR", resume=True)` ``."""
    if is_typed():
        return f"`{' '.join(['icekit run IMAGE --out', str(folder), *([f'--{flag}'] if flag else [])])}`"
    return f"`extract({', '.join(['IMAGE', _in_python(str(folder)), *([f'{flag}=True'] if flag else [])])})`"


def export_of(folder: str | Path, exporter: str) -> str:
    """An export: `` `icekit export DIR --format report` ``, or `` `export("DIR", "report")` ``."""
    if is_typed():
        return f"`{shlex.join(['icekit', 'export', str(folder), '--format', exporter])}`"
    return f"`export({_in_python(str(folder))}, {_in_python(exporter)})`"


def _on_a_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _in_python(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{key}": {_in_python(one)}' for key, one in value.items()) + "}"
    if isinstance(value, str):
        return value if value.isupper() else json.dumps(value, ensure_ascii=False)
    return repr(value)
