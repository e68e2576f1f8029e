"""The plugin manager: built-ins and entry points come in by the same door, and a broken plugin stays outside.

A plugin that fails to import or has a hook with a wrong name or signature stays outside; of one whose hook raises or
registers what breaks its protocol, that hook counts for nothing. Both are in ``Plugins.broken``, with distribution and
reason, and commands that do not need them go on. ``sys.exit`` in a plugin is a failure like others. What plugins print
while they come in goes to stderr.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pluggy
from pydantic import ValidationError

from icekit import hookspecs
from icekit.foreign import aside, guarded, is_of_the_machine, is_out_of_memory, said, watched_interrupts
from icekit.plugins.checking import (
    CAPABILITIES,
    MAX_NAME_BYTES,
    PluginError,
    check_attribute,
    check_component,
    check_declaration,
    needs_of,
    spellings,
)
from icekit.plugins.observers import Observers
from icekit.plugins.registered import BrokenPlugin, ComponentError, Declared, Origin, Registered
from icekit.protocols import Attribute, Capability, ComponentSettings, InputError, RunError
from icekit.protocols.strict import as_stored, changes_no_result
from icekit.settings import BENCH_TABLES, ROLES, Components, Preset, Role, Settings, merge, nearest, shown, validate

GROUP = "icekit"
KINDS = (*ROLES, "attribute", "dataset", "metric", "preset")
"""All that plugins can register by name."""
OWN_ROOMS = tuple(f"icekit.{room}" for room in ("bench", "cli", "files", "report", "run"))
"""Modules that are no component's: what they raise no component has raised."""


class Plugins:
    """What is installed: ``manager`` calls the hooks, ``broken`` says what does not work."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.broken: list[BrokenPlugin] = []
        self._origins: dict[object, Origin] = {}
        self._offers: dict[str, dict[str, Registered]] = {}

    # --- Coming in ---------------------------------------------------------------------------------------------------

    def add(self, origin: Origin, load: Callable[[], object]) -> None:
        """Import and register one plugin, or note why it cannot be."""
        plugin: object | None = None
        try:
            with aside(), guarded():
                plugin = load()
                hash(plugin)
                self.manager.register(plugin, origin.plugin)
                self._refuse_unknown_hooks(plugin)
        except Exception as error:  # whatever a plugin's code does wrong, the others must not suffer
            if plugin is not None and self.manager.get_plugin(origin.plugin) is plugin:
                self.manager.unregister(plugin)
            self._note_broken(origin, error)
        else:
            self._origins[plugin] = origin

    def _refuse_unknown_hooks(self, plugin: object) -> None:
        for caller in self.manager.get_hookcallers(plugin) or []:
            if not caller.has_spec():
                known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "icekit_spec")]
                raise PluginError(f"unknown hook {caller.name!r}: {nearest(caller.name, known)}")

    def _note_broken(self, origin: Origin, error: BaseException) -> None:
        if is_out_of_memory(error):
            raise error  # no plugin is to blame for it
        reason = " ".join(str(error).split()) if isinstance(error, PluginError | InputError) else said(error)
        self.broken.append(BrokenPlugin(origin, reason))

    def _call_one(self, hook: str, plugin: object, **arguments: Any) -> None:
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        with aside(), guarded():
            self.manager.subset_hook_caller(hook, others)(**arguments)

    def each(self, hook: str, **arguments: Callable[[Origin], Any]) -> None:
        """Call a hook plugin by plugin; note those that raise.

        arguments: by name, each made for the plugin that it is for.
        """
        for plugin, origin in self._origins.items():
            try:
                self._call_one(hook, plugin, **{name: made_for(origin) for name, made_for in arguments.items()})
            except Exception as error:
                self._note_broken(origin, error)

    # --- What they offer ---------------------------------------------------------------------------------------------

    def offered(self, role: str) -> dict[str, Registered]:
        """Everything registered of one of ``KINDS``, by name."""
        if role not in self._offers:
            offers: dict[str, Registered] = {}
            for plugin, origin in self._origins.items():
                try:
                    offers |= self._offers_of(plugin, origin, role, offers)
                except Exception as error:
                    self._note_broken(origin, error)
            self._offers[role] = offers
        return self._offers[role]

    def _offers_of(
        self, plugin: object, origin: Origin, role: str, earlier: Mapping[str, Registered]
    ) -> dict[str, Registered]:
        offers: dict[str, Registered] = {}

        def add(name: str, value: Any) -> None:
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name) or len(name.encode()) > MAX_NAME_BYTES:
                raise PluginError(
                    f"{name!r:.200} cannot be a {role}'s name: use letters, digits, - and _, at most "
                    f"{MAX_NAME_BYTES} bytes"
                )
            if taken := earlier.get(name) or offers.get(name):
                raise PluginError(f"{role} {name!r} is already registered by {taken.origin}")
            offers[name] = Registered(role, name, value, origin)

        def register_component(
            name: str, component: type | str, *, settings: type[ComponentSettings] | None = None, summary: str = ""
        ) -> None:
            if isinstance(component, str):
                check_declaration(role, name, component, settings, summary)
                assert settings is not None
                add(name, Declared(component, settings, summary))
            else:
                check_component(role, name, component)
                add(name, component)

        def register_attribute(attribute: Attribute) -> None:
            check_attribute(attribute)
            for other in ({**earlier, **offers}).values():
                same = spellings(attribute) & spellings(other.value)
                if attribute.name != other.name and same:
                    raise PluginError(
                        f"attribute {attribute.name!r} would be called as {other.name!r} of {other.origin} is, "
                        f"{min(same)!r}: its name and aliases must differ in more than case"
                    )
            add(attribute.name, attribute)

        def register_preset(name: str, file: Path) -> None:
            add(name, Preset.read(name, Path(file)))

        registers: dict[str, Callable[..., None]] = {"attribute": register_attribute, "preset": register_preset}
        register = registers.get(role, register_component)
        self._call_one(f"register_{role}s", plugin, register=register)
        return offers

    def observers(self) -> list[tuple[Origin, str]]:
        """The plugins that watch runs, and what each says of itself, in one line."""
        hooks = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "icekit_spec")]
        watching = {
            implementation.plugin_name
            for name in hooks
            if not name.startswith("register_")
            for implementation in getattr(self.manager.hook, name).get_hookimpls()
        }
        return [
            (origin, (inspect.getdoc(plugin) or "").partition("\n")[0])
            for plugin, origin in self._origins.items()
            if origin.plugin in watching
        ]

    def component(self, role: str, name: str) -> type:
        """The class registered under this name for one of ``ROLES``, or as a ``"dataset"`` or ``"metric"``.

        Raises:
            InputError: there is none; the message names the nearest one and broken plugins that might have brought it.
        """
        return self._find(role, name).value

    def attribute(self, name: str) -> Attribute:
        """The attribute of this name or alias.

        Raises:
            InputError: there is none.
        """
        for registered in self.offered("attribute").values():
            if name in registered.value.aliases:
                name = registered.name
        return self._find("attribute", name).value

    def preset(self, name: str) -> Preset:
        """The preset of this name, complete: what it is built on is among its values.

        Raises:
            InputError: there is none, or it is built on itself.
        """
        preset: Preset = self._find("preset", name).value
        values, seen = preset.values, [name]
        while "preset" in values:
            base = str(values["preset"])
            if base in seen:
                raise InputError(f"preset {name!r} is built on itself: {' on '.join([*seen, base])}")
            seen.append(base)
            own = {key: value for key, value in values.items() if key != "preset"}
            values = merge(self._find("preset", base).value.values, own)
        return replace(preset, values=values)

    def _find(self, role: str, name: str) -> Registered:
        offers = self.offered(role)
        if name not in offers:
            suspects = "".join(f"; {broken}" for broken in self.broken)
            raise InputError(f"no {role} {name!r}: {nearest(name, offers)}{suspects}")
        return offers[name]

    def component_settings(self, role: str, name: str, values: Mapping[str, Any]) -> ComponentSettings:
        """A component's settings, checked.

        Raises:
            InputError: no such component, an unknown key or a wrong value.
        """
        with self.naming("settings", [(role, name)], by=(role, name)):
            return validate(self._settings_model(role, name), values, prefix=f"{role}.")

    @contextmanager
    def naming(
        self,
        stage: str | Callable[[], str],
        components: Iterable[tuple[str, str]] | Callable[[], Iterable[tuple[str, str]]],
        by: tuple[str, str] | None = None,
    ) -> Iterator[None]:
        """What components raise within the block becomes an error that names component, plugin and stage.

        Of several that called one another the innermost is named. What a component says itself, as an InputError or a
        RunError, stays as it is; so do a Ctrl-C, a full disk and the like, and what our own code raises.

        Args:
            stage: what is being done.
            components: which are at work, (role, name) each.
            by: the one that the block calls, if it is one alone.

        Raises:
            ComponentError: a component raised something, or tried to end the program.
        """
        with watched_interrupts() as interrupted:
            try:
                yield
            except (InputError, RunError):
                raise
            except BaseException as error:
                if (isinstance(error, KeyboardInterrupt) and interrupted()) or is_of_the_machine(error):
                    raise
                culprit = self._culprit(error, components() if callable(components) else components, by)
                if culprit is None:
                    raise
                raise ComponentError(
                    f"{culprit.role} {culprit.name!r} of {culprit.origin} failed in stage "
                    f"{stage() if callable(stage) else stage}: {said(error)}"
                ) from error

    def _culprit(
        self, error: BaseException, components: Iterable[tuple[str, str]], by: tuple[str, str] | None
    ) -> Registered | None:
        """The component in whose methods something was raised; None where our own code raised it, called back."""
        ours = False
        known = [self.offered(role)[name] for role, name in components if name in self.offered(role)]
        frames, place = [], error.__traceback__
        while place is not None:
            frames.append(place.tb_frame)
            place = place.tb_next
        for frame in reversed(frames):
            first = _first_argument(frame)
            for one in known:
                if type(first) is one.value or first is one.value:
                    return None if ours else one
            ours = ours or str(frame.f_globals.get("__name__", "")).startswith(OWN_ROOMS)
        return None if by is None else self._find(*by)

    def resolve(self, settings: Settings, dataset: str | None = None) -> Settings:
        """Complete settings: presets put below what was given, aliases of attributes replaced, every component's
        settings checked and filled in. No model is loaded for it.

        What was given for a role is for the component that is chosen, whichever it is; a table of its name
        (``segmentor.diffseg.prompt``) is for that one alone, and is put over the rest. What a preset says of components
        that are not chosen is passed over.

        Args:
            settings: what was given.
            dataset: name of the data set that a bench runs on: its preset counts, too.

        Raises:
            InputError: a preset, component, attribute, key or value is wrong, a given key names a component that is not
                chosen, or a component needs what the backbone lacks.
        """
        presets = self.presets_of(settings, dataset)
        components = self._components(settings, presets)
        chosen = settings.model_copy(update={"components": components})
        runs_own = [{key: one for key, one in layer.values.items() if key not in BENCH_TABLES} for layer in presets]
        values = merge(*runs_own, settings.given()) | {"components": components.model_dump()}
        own: dict[Role, ComponentSettings] = {}
        for role in ROLES:
            tables = [self._table(layer, role, chosen.name_of(role)) for layer in presets]
            merged = merge(*tables, self._of_the_chosen(role, chosen))
            own[role] = self.component_settings(role, chosen.name_of(role), merged)
            values[role] = own[role].model_dump(mode="json")
        full = validate(Settings, values)
        self._check_needs(components, own)
        attributes = tuple(dict.fromkeys(self.attribute(name).name for name in full.attributes))
        return validate(Settings, full.model_dump() | {"attributes": attributes})

    def stored(self, settings: Settings) -> Settings:
        """Complete settings as a run's files keep them: with paths that hold in any working directory."""
        values = settings.model_dump(mode="json")
        for role in ROLES:
            values[role] = as_stored(self.component_settings(role, settings.name_of(role), settings.values_of(role)))
        return validate(Settings, values)

    def changes_no_result(self, settings: Settings) -> set[str]:
        """The settings of a run, by key, that change nothing of what comes out: see ``strict.CHANGES_NO_RESULT``."""
        keys = set(changes_no_result(Settings))
        for role in ROLES:
            keys |= {f"{role}.{key}" for key in changes_no_result(self._settings_model(role, settings.name_of(role)))}
        return keys

    def presets_of(self, settings: Settings, dataset: str | None = None) -> list[Preset]:
        """The presets below what was given, the lowest first: the backbone's own, the data set's, the one chosen.

        Raises:
            InputError: there is no such preset, backbone or data set.
        """
        upper = [] if dataset is None else self._preset_of("dataset", dataset)
        upper += [self.preset(settings.preset)] if settings.preset else []
        return [*self._preset_of("backbone", self._components(settings, upper).backbone), *upper]

    def chosen(self, settings: Settings, dataset: str | None = None) -> Components:
        """Which components a run with these settings has; see ``resolve``.

        Raises:
            InputError: there is no such preset, backbone or data set.
        """
        return self._components(settings, self.presets_of(settings, dataset))

    def _components(self, settings: Settings, presets: Sequence[Preset]) -> Components:
        layers = [*(layer.values for layer in presets), settings.given()]
        return validate(Components, merge(*(one.get("components", {}) for one in layers)))

    def _preset_of(self, role: str, name: str) -> list[Preset]:
        """The preset that a backbone or a data set works best with; of most there is none."""
        preset: str | None = getattr(self.component(role, name), "preset", None)
        try:
            return [] if preset is None else [self.preset(preset)]
        except InputError as error:
            raise InputError(f"{role} {name!r} comes with a preset that is not there: {error}") from None

    def _table(self, preset: Preset, role: str, name: str) -> dict[str, Any]:
        """What a preset says of one component.

        Raises:
            InputError: an unknown key or a wrong value.
        """
        table: dict[str, Any] = preset.values.get(role, {}).get(name, {})
        try:
            with self.naming("settings", [(role, name)], by=(role, name)):
                validate(self._settings_model(role, name), table, prefix=f"{role}.{name}.")
        except InputError as error:
            raise InputError(f"preset {preset.name!r}: {error}") from error
        return table

    def check_preset(self, name: str) -> None:
        """Whether every setting of a preset is one of the component that it names, all of which must be installed.

        A run looks at the tables of the components that it has alone.

        Raises:
            InputError: no such preset or component, an unknown key or a wrong value.
        """
        preset = self.preset(name)
        for role, component in preset.values.get("components", {}).items():
            self.component(role, component)
        for role in (*ROLES, "metric"):
            for component in preset.values.get(role, {}):
                self._table(preset, role, component)

    def _of_the_chosen(self, role: Role, settings: Settings) -> dict[str, Any]:
        """What was given for a role, with the table of the chosen component taken out and put over the rest."""
        values, chosen = settings.values_of(role), settings.name_of(role)
        known = self._settings_model(role, chosen)
        own: Any = {}
        for name in values.keys() & self.offered(role) - known.model_fields.keys():
            if name != chosen:
                raise InputError(f"setting '{role}.{name}' is for {role} {name!r}, and {chosen!r} is chosen")
            own = values.pop(name)
            if not isinstance(own, Mapping):
                raise InputError(f"setting '{role}.{name}' cannot be {shown(own)}: it should be a table of settings")
        return merge(values, own)

    def _settings_model(self, role: str, name: str) -> type[ComponentSettings]:
        model = self._find(role, name).settings
        assert model is not None, f"{role}s have settings"
        return model

    def _check_needs(self, components: Components, settings: Mapping[Role, ComponentSettings]) -> None:
        """Whether the backbone can do what each component needs.

        Raises:
            InputError: it cannot; the message names what is missing, and components that do without.
        """
        lacks: Collection[Capability] = getattr(self.component("backbone", components.backbone), "lacks", ())
        for role in ROLES[1:]:
            name: str = getattr(components, role)
            missing = [one for one in needs_of(self.component(role, name), settings[role]) if one in lacks]
            if not missing:
                continue
            instead = [other for other in self.offered(role) if not set(self._usual_needs(role, other)) & set(lacks)]
            others = ", ".join(other for other in instead if other != name)
            ways = ["set it otherwise"] * (name in instead) + [f"choose {others}"] * bool(others)
            needed = " and ".join(f"{one} ({CAPABILITIES[one]})" for one in missing)
            raise InputError(
                f"{role} {name!r} needs {needed}, which backbone {components.backbone!r} does not have: "
                f"{' or '.join([*ways, 'take another backbone'])}"
            )

    def _usual_needs(self, role: Role, name: str) -> Collection[Capability]:
        """What a component needs with its settings as they are by default; all there is where that cannot be said."""
        try:
            return needs_of(self.component(role, name), self._settings_model(role, name)())
        except (ValidationError, InputError):
            return tuple(CAPABILITIES)

    # --- Observers ---------------------------------------------------------------------------------------------------

    @contextmanager
    def observed_by(self, observers: Sequence[object]) -> Iterator[Observers]:
        """Register observers for the length of the block; yields what tells all observers what happens."""
        for observer in observers:
            self.manager.register(observer)
        try:
            yield Observers(self.manager)
        finally:
            for observer in observers:
                if self.manager.is_registered(observer):
                    self.manager.unregister(observer)


def _first_argument(frame: FrameType) -> object:
    """What a function was called with first: of a method ``self``, however it is called."""
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if code.co_flags & inspect.CO_VARARGS:
        return next(iter(frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount], ())), None)
    return None
