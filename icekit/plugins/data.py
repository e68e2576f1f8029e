"""Attributes as data: tables ``[attribute.NAME]`` of a settings file, or of a TOML file that a distribution ships.

Both have the same form, so that a table can be moved from one to the other::

    [attribute.gloss]
    anchor = "gloss"
    words = ["matt", "satin", "glossy"]

A distribution that has nothing but such a file needs no code: it names the file, inside of a package of its own, in the
entry-point group ``icekit.attributes``. This group is apart from ``icekit``, for there an entry is an object to import,
which pluggy registers, and here a file to read::

    [project.entry-points."icekit.attributes"]
    gloss = "icekit_gloss:attributes.toml"

One that has code as well may register what ``attributes_from`` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from icekit.hookspecs import hookimpl
from icekit.plugins.checking import PluginError, check_attribute
from icekit.protocols import Attribute, InputError
from icekit.settings import AttributeSettings, Settings, read_settings_file, validate


def attributes_of(tables: Mapping[str, AttributeSettings]) -> list[Attribute]:
    """The attributes of a settings file's tables, by name.

    Raises:
        InputError: one of them cannot be an attribute.
    """
    made = [Attribute(name, one.anchor, one.words, one.aliases) for name, one in tables.items()]
    for one in made:
        try:
            check_attribute(one)
        except PluginError as error:
            raise InputError(f"[attribute.{one.name}]: {error}") from None
    return made


def attributes_from(file: str | Path) -> list[Attribute]:
    """The attributes of a TOML file that has tables ``[attribute.NAME]`` and nothing else.

    Raises:
        InputError: it cannot be read, has something else in it, or no attribute.
    """
    values = read_settings_file(Path(file))
    if strange := sorted(values.keys() - {"attribute"}):
        raise InputError(f"{file} has {strange[0]!r}: a file of attributes has tables [attribute.NAME] alone")
    try:
        made = attributes_of(validate(Settings, values).attribute)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if not made:
        raise InputError(f"{file} has no attribute: write a table [attribute.NAME] with anchor and words")
    return made


class AttributeFile:
    """The plugin that a file of attributes is."""

    def __init__(self, file: Path) -> None:
        self.attributes = attributes_from(file)

    @hookimpl
    def register_attributes(self, register: Callable[[Attribute], None]) -> None:
        """Offer those of the file."""
        for one in self.attributes:
            register(one)
