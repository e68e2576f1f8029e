"""What plugins have registered, where it is from, and what is wrong with it."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

from icekit.foreign import aside, guarded, is_out_of_memory, said
from icekit.plugins.checking import PluginError, check_component
from icekit.protocols import Attribute, ComponentSettings, InputError, RunError
from icekit.settings import Preset


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from: its name (the entry point's), its distribution and that one's version.

    Of a plugin that is one file the distribution is this file, and the version is empty.
    """

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({f'{self.distribution} {self.version}'.strip()})"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that is broken, or a part of it, and why (one line).

    hook: the hook that failed; None where the plugin could not come in at all. error: what was raised.
    """

    origin: Origin
    reason: str
    hook: str | None = None
    error: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.origin} is broken: {self.reason}"

    @property
    def warning(self) -> str:
        """The same, with what to do for who does not need it."""
        return f"{self} (--no-plugin {self.origin.plugin} leaves it out)"

    def mentions(self, name: str) -> bool:
        """Whether a name is said in the plugin's name, its distribution's or the reason."""
        said_of_it = f"{self.origin.plugin} {self.origin.distribution} {self.reason}"
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said_of_it) is not None


@dataclass(frozen=True)
class Declared:
    """A component that is imported when it is first used, for importing it takes seconds.

    place: ``"package.module:Class"``. settings: the class's ``Settings``. summary: what it is, one line.
    """

    place: str
    settings: type[ComponentSettings]
    summary: str

    def load(self) -> type:
        """Import the class.

        Raises:
            PluginError: it is not there, or has other settings than were declared.
        """
        module, _, name = self.place.partition(":")
        component = getattr(import_module(module), name, None)
        if component is None:
            raise PluginError(f"there is no {name!r} in {module}")
        if getattr(component, "Settings", None) is not self.settings:
            raise PluginError(f"{self.place} has not the Settings that were declared: {self.settings.__qualname__}")
        return component


@dataclass(frozen=True)
class Registered:
    """A component, an attribute or a preset, and the plugin that brought it."""

    role: str
    name: str
    given: Any
    """What was registered: a component's class or its declaration, an attribute, a preset."""
    origin: Origin

    @cached_property
    def value(self) -> Any:
        """A component's class, imported now if it was declared; an attribute, a preset.

        Raises:
            InputError: what was declared cannot be imported, or is no component of this kind.
        """
        if not isinstance(self.given, Declared):
            return self.given
        try:
            with aside(), guarded():
                component = self.given.load()
                check_component(self.role, self.name, component)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # no plugin is to blame for it
            why = str(error) if isinstance(error, PluginError | InputError) else said(error)
            raise InputError(f"{self.role} {self.name!r} of {self.origin} cannot be used: {why}") from error
        return component

    @property
    def summary(self) -> str:
        """First line of its docstring, or of a preset's file; what was declared; an attribute's anchor."""
        if isinstance(self.given, Preset | Declared):
            return self.given.summary
        if isinstance(self.given, Attribute):
            return f"anchor {self.given.anchor!r}, {len(self.given.vocabulary)} words"
        return (inspect.getdoc(self.given) or "").partition("\n")[0]

    @property
    def settings(self) -> type[ComponentSettings] | None:
        """The component's settings model; None for an attribute or a preset."""
        if isinstance(self.given, Declared):
            return self.given.settings
        return getattr(self.given, "Settings", None)


class ComponentError(RunError):
    """A component raised what is no error of icekit's, or tried to end the program."""


class BreachError(ComponentError):
    """A component returned what its protocol does not allow, or changed what it was handed.

    Raised where nobody knows the component's plugin; ``Plugins.naming`` adds it.

    role, name: the component. what: what it did, and what is right: the end of a sentence.
    """

    def __init__(self, role: str, name: str, what: str, origin: Origin | None = None) -> None:
        self.role, self.name, self.what, self.origin = role, name, what, origin
        super().__init__(f"{role} {name!r}{'' if origin is None else f' of {origin}'} {what}")
