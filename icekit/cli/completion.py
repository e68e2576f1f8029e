"""What the shell completes: names of what is installed, and settings' keys. click asks, in a process of its own.

``eval "$(_ICEKIT_COMPLETE=bash_source icekit)"`` in ``~/.bashrc`` turns it on; ``zsh_source`` and ``fish_source`` are
for the other shells.
"""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from icekit import plugins
from icekit.settings import ROLES, Settings

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names(*kinds: str) -> Complete:
    """Completes the names of what is registered of these kinds, each with what it is."""

    def complete(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        found = plugins.installed()
        offers = {name: one.summary for kind in kinds for name, one in found.offered(kind).items()}
        return [CompletionItem(name, help=what) for name, what in offers.items() if name.startswith(typed)]

    return complete


def one_of(*words: str) -> Complete:
    """Completes one of these words."""

    def complete(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in words if word.startswith(typed)]

    return complete


DEVICES = one_of("auto", "cpu", "cuda", "mps")


def complete_setting(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes the key of KEY=VALUE: a run's settings, and those of all components by role."""
    if "=" in typed:
        return []
    found, keys = plugins.installed(), dict[str, str]()
    for name, field in Settings.model_fields.items():
        if name not in (*ROLES, "attribute", "components", "exporter"):
            keys[name] = field.description or ""
    for role in ROLES:
        for one in found.offered(role).values():
            fields = one.settings.model_fields if one.settings is not None else {}
            keys |= {f"{role}.{key}": field.description or "" for key, field in fields.items()}
    for name, one in found.offered("exporter").items():
        fields = one.settings.model_fields if one.settings is not None else {}
        keys |= {f"exporter.{name}.{key}": field.description or "" for key, field in fields.items()}
    return [CompletionItem(f"{key}=", help=what) for key, what in keys.items() if key.startswith(typed)]
