"""Named rows of a bench: configurations that differ in more than the names of their components.

    [rows.ice]

    [rows.ice-of-the-words-found]
    naming = "retrieved"

    [rows.textual-inversion]
    components.learner = "textual-inversion"
    learner.steps = 400

Each is a table of settings as in a settings file, put over those that all rows share. Rows whose settings of stage one
are equal share its result, so that they learn from the same masks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from icekit.protocols import InputError
from icekit.settings import BENCH_TABLES, Settings, shown, validate

SHARED = ("seed", "device", "backbone", "dataset", *BENCH_TABLES)
"""What no row may have for itself: the rows could not be compared."""
STAGE_TWO = {"learner", "samples", "words_alone", "sample_steps", "guidance_scale", "device", "preset"}
"""Settings of a run that stage one does not depend on."""


@dataclass(frozen=True)
class Row:
    """A named row; overrides: its settings, nested."""

    name: str
    overrides: Mapping[str, Any]


def read_rows(table: Mapping[str, Any], taken: Collection[str]) -> list[Row]:
    """The rows of the table ``rows`` of a bench's settings.

    taken: names that no row may have.

    Raises:
        InputError: a name that cannot name a folder, or is taken; no table; a setting that is unknown or shared.
    """
    rows = []
    for name, overrides in table.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name) or name in taken:
            why = "another row is called so" if name in taken else "use letters, digits, - and _, at most 100"
            raise InputError(f"row {name!r:.160} cannot have this name: {why}")
        if not isinstance(overrides, Mapping):
            raise InputError(f"setting 'rows.{name}' cannot be {shown(overrides)}: it should be a table of settings")
        components = overrides.get("components", {})
        shared = [key for key in overrides if key in SHARED]
        shared += ["components.backbone"] if isinstance(components, Mapping) and "backbone" in components else []
        if shared:
            raise InputError(f"row {name!r} cannot have its own {shared[0]}: all rows share it")
        try:
            validate(Settings, overrides)
        except InputError as error:
            raise InputError(f"row {name!r}: {error}") from None
        rows.append(Row(name, overrides))
    return rows


def stage_one_key(settings: Settings) -> str:
    """What the masks of a run depend on, as text: runs with the same one find the same.

    Whether regions are described, too, is not among it: that adds words to them and changes no mask.
    """
    values = settings.model_dump(mode="json", exclude=STAGE_TWO | {"naming", "components"})
    names = [settings.name_of("retriever"), settings.name_of("segmentor"), settings.naming == "retrieved"]
    return json.dumps([names, values], sort_keys=True)


def stage_one_name(settings: Settings, plain: Settings) -> str:
    """A name for what stage one finds with these settings: the components' names, if they are the ``plain`` ones.

    plain: the settings of the same components without any row's own.
    """
    name = f"{settings.name_of('retriever')}-{settings.name_of('segmentor')}"
    own, usual = ((stage_one_key(one), one.naming) for one in (settings, plain))
    return name if own == usual else f"{name}-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]}"
