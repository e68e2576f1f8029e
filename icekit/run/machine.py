"""A machine's memory: what a run will need of it, said before it starts, and what becomes of one that needs more."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from icekit import wording
from icekit.foreign import is_out_of_memory, said
from icekit.plugins import Plugins
from icekit.protocols import InputError, MemoryNeed, RunError
from icekit.protocols.strict import least_memory
from icekit.settings import ROLES, Settings

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class OutOfMemory(RunError):
    """There is not enough memory, the machine's or a device's."""


@contextlib.contextmanager
def enough_memory(stage: str | Callable[[], str], found: Plugins, settings: Callable[[], Settings]) -> Iterator[None]:
    """Name what needed more memory than there is, and the settings with which it needs less.

    stage: what is being done. settings: those that it is done with.

    Raises:
        OutOfMemory: Python, the system or a device has no more of it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = stage if isinstance(stage, str) else stage()
        first = said(error).partition(". ")[0].partition(" (")[0][:160]
        raise OutOfMemory(f"out of memory in stage {where} ({first}): {_ways_out(found, settings())}") from error


def _ways_out(found: Plugins, settings: Settings) -> str:
    """The settings that can be lower, as options to type."""
    ways = []
    for role in ROLES:
        with contextlib.suppress(InputError):  # settings that are not checked yet
            name = settings.name_of(role)
            values = found.component_settings(role, name, settings.values_of(role))
            for key, least in least_memory(type(values)).items():
                if getattr(values, key) != least:
                    ways.append(f"{wording.settings({role: {key: least}})} (now {_typed(getattr(values, key))})")
    others = f"close other programs, or take a smaller model, another {wording.named('device')} or a larger machine"
    return f"less is needed with {' or '.join(ways)}; or else {others}" if ways else others


def _typed(value: Any) -> str:
    """A value as it is typed in a setting."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- Before it starts ------------------------------------------------------------------------------------------------

SAVING: tuple[dict[str, dict[str, Any]], ...] = (
    {"backbone": {"gradient_checkpointing": True}},
    {"backbone": {"low_memory": "on"}},
    {"backbone": {"low_memory": "on"}, "learner": {"max_batch": 1}},
)
"""Settings with which a run needs less memory, from the quickest to the slowest."""


def free_memory(device: torch.device) -> int:
    """The bytes that a device has free; of one that shares the machine's memory, what the machine has."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free)


def memory_needed(
    found: Plugins, settings: Settings, device: torch.device, more: dict[str, dict[str, Any]] | None = None
) -> MemoryNeed | None:
    """What the settings' backbone says that it will need, see ``protocols.Backbone``; None where it does not say it.

    more: settings over these, by role. One that a component does not have makes it None.
    """
    more = more or {}
    name = settings.name_of("backbone")
    says = getattr(found.component("backbone", name), "memory_needed", None)
    if says is None:
        return None
    try:
        values = {
            role: found.component_settings(role, settings.name_of(role), settings.values_of(role) | more.get(role, {}))
            for role in ("backbone", "learner")
        }
        pictures = min(int(getattr(values["learner"], "max_batch", 1)), settings.max_concepts)
        need: MemoryNeed | None = says(values["backbone"], device, pictures)
    except InputError:  # whoever loads the model says what is wrong
        return None
    return need


def check_memory(found: Plugins, settings: Settings, device: torch.device, *, learns: bool = True) -> None:
    """Say before a model is loaded that it will not fit, and with which setting it would.

    learns: whether tokens are learned with it, or pictures drawn alone.

    Raises:
        InputError: not even its weights fit.
    """

    def whole(need: MemoryNeed) -> int:
        return max(need.learning, need.drawing) if learns else need.drawing

    need, free = memory_needed(found, settings, device), free_memory(device)
    if need is None or whole(need) <= free:
        return
    saved = [(wording.settings(more), memory_needed(found, settings, device, more)) for more in SAVING]
    ways = [(way, whole(one)) for way, one in saved if one is not None and whole(one) < whole(need)]
    fitting = next((one for one in ways if one[1] <= free), min(ways, key=lambda one: one[1], default=None))
    if fitting is None:
        advice = f"take a smaller model or picture (backbone.image_size), or another {wording.named('device')}"
    else:
        way, less = fitting
        advice = f"{way} needs about {_gib(less)}"
        advice += (
            ""
            if less <= free
            else f", which is too much as well: take a smaller model, or another {wording.named('device')}"
        )
    model = settings.values_of("backbone").get("model")
    what = f"backbone {settings.name_of('backbone')!r}" + (f" with backbone.model = {model!r}" if model else "")
    if need.weights > free:
        raise InputError(
            f"{what}: its weights alone take {_gib(need.weights)}, and {device.type} has {_gib(free)} free: {advice}"
        )
    work = "learning takes" if learns else "drawing takes"
    log.warning(
        "warning: %s: %s about %s, and %s has %s free: %s",
        what,
        work,
        _gib(whole(need)),
        device.type,
        _gib(free),
        advice,
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
