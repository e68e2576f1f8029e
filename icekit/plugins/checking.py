"""Whether what a plugin registers can be what it is registered as."""

from __future__ import annotations

import ast
import inspect
import re
import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from icekit import hookspecs, protocols
from icekit.protocols import Attribute, Capability, ComponentSettings, is_instance
from icekit.protocols.values import MAX_ATTRIBUTE_BYTES
from icekit.settings import ROLES, nearest


class PluginError(Exception):
    """A plugin breaks its contract. The message is one line."""


_PROTOCOLS: dict[str, type] = {
    "backbone": protocols.Backbone,
    "retriever": protocols.Retriever,
    "segmentor": protocols.Segmentor,
    "learner": protocols.Learner,
    "dataset": protocols.Dataset,
    "metric": protocols.Metric,
    "exporter": protocols.Exporter,
    "executor": protocols.Executor,
}
MAX_NAME_BYTES = 60
"""Of a registered name: folders of a bench are called by up to three."""
RESERVED_TOKENS = ("category", "instance", "object")
"""What a concept's parts and samples are called already: no attribute can have such a name."""
CAPABILITIES: dict[Capability, str] = {
    "attention": "maps of words over the picture",
    "similarity": "maps of places over places",
    "fine_tuning": "weights that can be trained",
    "posterior": "the autoencoder's spread",
    "concepts": "maps of concepts by what attention gives out",
}
"""What a component may need of its backbone, in words."""
METHODS: dict[Capability, str] = {"concepts": "concept_maps"}
"""Capabilities that few families have -> the method by which a backbone has it; the others need not say anything."""


BUILT_FOR = "icekit_protocol"
"""What a plugin's module calls the version of ``icekit.protocols`` that it was written for."""


def hook_names() -> list[str]:
    """All hooks that there are."""
    return [name for name, value in vars(hookspecs).items() if hasattr(value, "icekit_spec")]


def check_plugin(plugin: object) -> None:
    """Whether this can be a plugin: written for this version of the protocols, with hooks that can be called.

    Raises:
        PluginError: it cannot; the message says what is wrong, and what would be right.
    """
    check_version(getattr(plugin, BUILT_FOR, None))
    hooks, known = 0, {name: list(inspect.signature(getattr(hookspecs, name)).parameters) for name in hook_names()}
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        options = getattr(getattr(function, "__func__", function), "icekit_impl", None)
        if options is None:
            if name in known and inspect.isroutine(getattr(plugin, name, None)):
                raise PluginError(f"its function {name} is not marked as a hook: put @icekit.hookimpl above it")
            continue
        hooks, hook = hooks + 1, options["specname"] or name
        if hook not in known:
            raise PluginError(f"unknown hook {hook!r}: {nearest(hook, known)}")
        taken = list(inspect.signature(getattr(plugin, name)).parameters)
        if strange := [one for one in taken if one not in known[hook]]:
            raise PluginError(f"hook {hook} has the argument {strange[0]!r}: it can have {' and '.join(known[hook])}")
    if not hooks:
        raise PluginError("it has no hook: none of its functions is marked with @icekit.hookimpl")


def check_version(built_for: object) -> None:
    """Whether a plugin that says so was written for the protocols that this icekit has.

    Raises:
        PluginError: it was written for others.
    """
    if built_for is None or built_for == protocols.VERSION:
        return
    if not isinstance(built_for, int) or isinstance(built_for, bool):
        raise PluginError(
            f"{BUILT_FOR} is {built_for!r}: it should be a number, as in {BUILT_FOR} = {protocols.VERSION}"
        )
    older = built_for < protocols.VERSION
    raise PluginError(
        f"it was built for version {built_for} of icekit's protocols, and this icekit has version {protocols.VERSION}: "
        f"{'update the plugin, or install an older icekit' if older else 'update icekit, or install an older plugin'}"
    )


def version_in(file: Path) -> object:
    """What the source of a plugin that cannot be imported says it was built for; None where it does not say."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
            continue
        if BUILT_FOR in [one.id for one in node.targets if isinstance(one, ast.Name)]:
            return node.value.value
    return None


def needs_of(component: type, settings: ComponentSettings) -> Collection[Capability]:
    """What a component with these settings needs of its backbone: see ``protocols.Capability``."""
    depending: Callable[[ComponentSettings], Collection[Capability]] | None = getattr(component, "needs_with", None)
    needs: Collection[Capability] = getattr(component, "needs", ()) if depending is None else depending(settings)
    return needs


def lacks_of(backbone: type) -> set[Capability]:
    """What a backbone's family cannot do: see ``protocols.Capability``."""
    without = {one for one, method in METHODS.items() if not hasattr(backbone, method)}
    return {*getattr(backbone, "lacks", ()), *without}


def check_component(role: str, name: str, component: object) -> None:
    """Whether this can be a component: a class, a nested ``Settings``, every method of the protocol.

    Raises:
        PluginError: it cannot; the message says what is missing.
    """
    protocol = _PROTOCOLS[role]
    if role == "segmentor" and hasattr(component, "propose"):
        protocol = protocols.Proposer
    if not isinstance(component, type):
        raise PluginError(f"{role} {name!r} is not a class but {component!r}")
    where = f"{role} {name!r} ({component.__module__}.{component.__qualname__})"
    settings = getattr(component, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, ComponentSettings)):
        raise PluginError(f"{where} has no nested class Settings(icekit.ComponentSettings)")
    _check_settings_base(role, settings, where)
    methods = [key for key, value in vars(protocol).items() if not key.startswith("_") and inspect.isfunction(value)]
    missing = [method for method in methods if not callable(getattr(component, method, None))]
    missing += [name for name in ("columns", "needs") if role == "metric" and not hasattr(component, name)]
    if missing:
        raise PluginError(f"{where} lacks {', '.join(missing)}; see icekit.protocols.{protocol.__name__}")
    _check_constructor(role, component, where)
    for method in methods:
        _check_signature(getattr(component, method), getattr(protocol, method), where)
    preset = getattr(component, "preset", None)
    if role in ("backbone", "dataset") and not isinstance(preset, str | None):
        raise PluginError(f"{where} has the preset {preset!r}: it should be a preset's name")
    said = "lacks" if role == "backbone" else "needs"
    for capability in getattr(component, said, ()) if role in ROLES else ():
        if capability not in CAPABILITIES:
            raise PluginError(f"{where} {said} {capability!r}: {nearest(capability, CAPABILITIES)}")


def check_declaration(role: str, name: str, place: str, settings: object, summary: str) -> None:
    """Whether a component can be declared so, without its being imported.

    Raises:
        PluginError: it cannot; the message says what is missing.
    """
    where = f"{role} {name!r} ({place})"
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", place):
        raise PluginError(f"{role} {name!r} is declared as {place!r:.100}: it should be package.module:Class")
    if not (isinstance(settings, type) and issubclass(settings, ComponentSettings)):
        raise PluginError(f"{where} is declared without settings=..., its subclass of icekit.ComponentSettings")
    _check_settings_base(role, settings, where)
    if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
        raise PluginError(f"{where} is declared without summary=..., one line that says what it is")


def _check_settings_base(role: str, settings: type[ComponentSettings], where: str) -> None:
    """Whether an executor can be told what every executor can."""
    if role == "executor" and not issubclass(settings, protocols.ExecutorSettings):
        raise PluginError(f"{where} has Settings that are no subclass of icekit.protocols.ExecutorSettings")


def _check_constructor(role: str, component: type, where: str) -> None:
    """Whether a component can be built with what it is built with."""
    settings_alone = dict.fromkeys(("dataset", "exporter", "executor"), ("settings",))
    handed = {"backbone": ("settings", "device"), **settings_alone}.get(role, ("settings", "backbone"))
    try:
        taken = inspect.signature(component)
    except (TypeError, ValueError):  # not written in Python
        return
    try:
        taken.bind(*handed)
    except TypeError as error:
        raise PluginError(f"{where} cannot be built as {component.__name__}({', '.join(handed)}): {error}") from error


def _check_signature(method: Any, promised: Any, where: str) -> None:
    """Whether a method takes what it will be called with."""
    wanted = inspect.signature(promised)
    named = [one.name for one in wanted.parameters.values() if one.kind is inspect.Parameter.KEYWORD_ONLY]
    try:
        taken = inspect.signature(method)
    except (TypeError, ValueError):  # not written in Python
        return
    try:
        taken.bind(*([None] * (len(wanted.parameters) - len(named))), **dict.fromkeys(named))
    except TypeError as error:
        raise PluginError(
            f"{where}: {promised.__name__}{taken} cannot be called as {promised.__name__}{wanted}: {error}"
        ) from error


def spellings(attribute: Attribute) -> set[str]:
    """An attribute's name and aliases, as they are the same for a file system that knows no case."""
    return {_spelling(name) for name in (attribute.name, *attribute.aliases)}


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def check_attribute(attribute: object) -> None:
    """Whether this can be an attribute.

    Raises:
        PluginError: it is no ``Attribute``, or its name cannot be part of a token.
    """
    if not isinstance(attribute, Attribute):
        raise PluginError(f"register_attributes was given {attribute!r}, not an icekit.Attribute")
    if (
        not isinstance(attribute.name, str)
        or not attribute.name.isidentifier()
        or (_spelling(attribute.name) in RESERVED_TOKENS or is_instance(_spelling(attribute.name)))
    ):
        raise PluginError(f"{attribute.name!r} cannot be an attribute's name: one word, none of {RESERVED_TOKENS}")
    if len(attribute.name.encode()) > MAX_ATTRIBUTE_BYTES:
        raise PluginError(f"attribute {attribute.name!r:.100} has too long a name: {MAX_ATTRIBUTE_BYTES} bytes at most")
    texts = {"anchor": (attribute.anchor,), "vocabulary": attribute.vocabulary, "aliases": attribute.aliases}
    for key, values in texts.items():
        if not isinstance(values, tuple | list) or not all(isinstance(one, str) and one.strip() for one in values):
            given = values if key != "anchor" else attribute.anchor
            raise PluginError(f"attribute {attribute.name!r} has the {key} {given!r}: it should be text, not empty")
