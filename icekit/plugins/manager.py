"""The plugin manager: built-ins and entry points come in by the same door, and a broken plugin stays outside.

A plugin that fails to import or has a hook with a wrong name or signature stays outside; of one whose hook raises or
registers what breaks its protocol, that hook counts for nothing. Both are in ``Plugins.broken``, with distribution and
reason, and commands that do not need them go on. ``sys.exit`` in a plugin is a failure like others. What plugins print
while they come in goes to stderr.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
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
    check_plugin,
    hook_names,
    lacks_of,
    needs_of,
    spellings,
)
from icekit.plugins.data import attributes_of
from icekit.plugins.observers import Observers
from icekit.plugins.registered import BreachError, BrokenPlugin, ComponentError, Declared, Origin, Registered
from icekit.plugins.tracing import trace
from icekit.protocols import Attribute, Capability, ComponentSettings, InputError, RunError
from icekit.protocols.strict import as_stored, changes_no_result
from icekit.settings import (
    BENCH_TABLES,
    ROLES,
    Components,
    Preset,
    Role,
    Settings,
    flatten,
    merge,
    nearest,
    shown,
    validate,
)

log = logging.getLogger(__name__)
GROUP = "icekit"
KINDS = (*ROLES, "attribute", "dataset", "metric", "exporter", "executor", "preset")
"""All that plugins can register by name."""
OWN_ROOMS = tuple(f"icekit.{room}" for room in ("batch", "bench", "cli", "files", "report", "run"))
"""Modules that are no component's: what they raise no component has raised."""


class Plugins:
    """What is installed: ``manager`` calls the hooks, ``broken`` says what does not work."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.broken: list[BrokenPlugin] = []
        self._origins: dict[object, Origin] = {}
        self._offers: dict[str, dict[str, Registered]] = {}
        self._families: dict[tuple[str, str | None, bool], str | None] = {}

    def trace(self) -> None:
        """Print every call of a hook on stderr from now on."""
        trace(self.manager, self._origins)

    # --- Coming in ---------------------------------------------------------------------------------------------------

    def add(self, origin: Origin, load: Callable[[], object]) -> None:
        """Import and register one plugin, or note why it cannot be."""
        try:
            with aside(), guarded():
                self._admit(origin, load())
        except Exception as error:  # whatever a plugin's code does wrong, the others must not suffer
            self._note_broken(origin, error)

    def _admit(self, origin: Origin, plugin: object) -> None:
        """Register a plugin, or raise and leave nothing behind."""
        hash(plugin)
        check_plugin(plugin)
        if (there := self.manager.get_plugin(origin.plugin)) is not None:
            raise PluginError(f"there is another one of this name, {self._origins[there]}: uninstall or rename one")
        if self.manager.is_registered(plugin):
            raise PluginError(f"its code is registered already, by {self._origins[plugin]}: uninstall one of them")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                self.manager.register(plugin, origin.plugin)
            except Exception:
                self.manager.unregister(plugin)
                raise
        self._origins[plugin] = origin
        for one in warned:  # of a hook that is deprecated: see hookspecs
            log.warning("%s: %s (%s, line %d)", origin, one.message, Path(one.filename).name, one.lineno)

    def _note_broken(self, origin: Origin, error: BaseException, hook: str | None = None) -> None:
        if is_out_of_memory(error):
            raise error  # no plugin is to blame for it
        reason = " ".join(str(error).split()) if isinstance(error, PluginError | InputError) else said(error)
        self.broken.append(BrokenPlugin(origin, reason, hook, error))

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
                self._note_broken(origin, error, hook)

    # --- What they offer ---------------------------------------------------------------------------------------------

    def offered(self, role: str) -> dict[str, Registered]:
        """Everything registered of one of ``KINDS``, by name."""
        if role not in self._offers:
            offers: dict[str, Registered] = {}
            for plugin, origin in self._origins.items():
                try:
                    offers |= self._offers_of(plugin, origin, role, offers)
                except Exception as error:
                    self._note_broken(origin, error, f"register_{role}s")
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
                raise PluginError(
                    f"{role} {name!r} is already registered by {taken.origin}: --no-plugin leaves one of the two out"
                )
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
        watching = {
            implementation.plugin_name
            for name in hook_names()
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

    def attribute(self, name: str, own: Collection[Attribute] = ()) -> Attribute:
        """The attribute of this name or alias; own: attributes that are in nobody's plugin, and come first.

        Raises:
            InputError: there is none.
        """
        for one in (*own, *(registered.given for registered in self.offered("attribute").values())):
            if name == one.name or name in one.aliases:
                return one
        raise self._missing("attribute", name, [*(one.name for one in own), *self.offered("attribute")])

    def attributes(self, settings: Settings) -> list[Attribute]:
        """The attributes that a run with these settings learns: from their own tables, or else registered ones.

        Raises:
            InputError: there is no such attribute, or one of the settings' own cannot be.
        """
        own = attributes_of(settings.attribute)
        chosen = list(dict.fromkeys(self.attribute(name, own) for name in settings.attributes))
        names: dict[str, str] = {}
        for one in chosen:
            if (other := names.setdefault(one.name.casefold(), one.name)) != one.name:
                raise InputError(
                    f"attributes {other!r} and {one.name!r} differ in case alone: files are called by them"
                )
        return chosen

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
            raise self._missing(role, name, offers)
        return offers[name]

    def _missing(self, role: str, name: str, known: Iterable[str]) -> InputError:
        return InputError(f"no {role} {name!r}: {nearest(name, known)}{self.suspects(name, role)}")

    def suspects(self, name: str, role: str | None = None) -> str:
        """The end of a message: which broken plugins may have brought what is not there. Unrelated ones are not named.

        role: what it is; None: of any of ``KINDS``.
        """
        hooks = [None, *(f"register_{one}s" for one in ([role] if role else KINDS))]
        might = [one for one in self.broken if one.hook in hooks]
        if named := [one for one in might if one.mentions(name) or (role and one.hook)]:
            return "".join(f"; {one}" for one in named)
        if not might:
            return ""
        several = f"{len(might)} plugins are" if len(might) > 1 else "one plugin is"
        return f"; {several} broken, see `icekit plugins list`"

    def component_settings(self, role: str, name: str, values: Mapping[str, Any]) -> ComponentSettings:
        """A component's settings, checked.

        Raises:
            InputError: no such component, an unknown key or a wrong value.
        """
        with self.naming("settings", [(role, name)], by=(role, name)):
            # A run may have several exporters.
            prefix = f"{role}.{name}." if role == "exporter" else f"{role}."
            return validate(self._settings_model(role, name), values, prefix=prefix)

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
            except BreachError as error:
                known = self.offered(error.role)
                if error.origin is not None or error.name not in known:
                    raise
                raise BreachError(error.role, error.name, error.what, known[error.name].origin) from None
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
        aside = (*BENCH_TABLES, "exporter")
        runs_own = [{key: one for key, one in layer.values.items() if key not in aside} for layer in presets]
        values = merge(*runs_own, settings.given()) | {"components": components.model_dump()}
        own: dict[Role, ComponentSettings] = {}
        for role in ROLES:
            tables = [self._table(layer, role, chosen.name_of(role)) for layer in presets]
            merged = merge(*tables, self._of_the_chosen(role, chosen))
            own[role] = self.component_settings(role, chosen.name_of(role), merged)
            values[role] = own[role].model_dump(mode="json")
        full = validate(Settings, values)
        self._check_needs(components, own)
        attributes = tuple(one.name for one in self.attributes(full))
        exporters = dict.fromkeys(full.exporters)
        if "exporters" not in values:  # of those that nobody asked for, whichever are here
            exporters = {name: None for name in exporters if name in self.offered("exporter")}
        full = full.model_copy(update={"exporters": tuple(exporters)})
        of_exporters = self._of_exporters(presets, full)
        return validate(Settings, full.model_dump() | {"attributes": attributes, "exporter": of_exporters})

    def check_within_reach(self, settings: Settings) -> None:
        """Whether the backbone's model is on this machine or can be fetched, as far as it says so without being loaded.

        Its settings say so, by a method of this name. Nothing heavy is imported for it: no preset of the backbone's own
        is looked at, and settings that are wrong are left to ``resolve``.

        Raises:
            InputError: it is not, or there is no such preset.
        """
        presets = [self.preset(settings.preset)] if settings.preset else []
        chosen = settings.model_copy(update={"components": self._components(settings, presets)})
        own: dict[Role, ComponentSettings] = {}
        try:
            for role in ROLES:
                tables = [self._table(layer, role, chosen.name_of(role)) for layer in presets]
                merged = merge(*tables, self._of_the_chosen(role, chosen))
                own[role] = self.component_settings(role, chosen.name_of(role), merged)
            self.attributes(settings)
        except InputError:
            return  # unless the backbone's preset makes it right; ``resolve`` says it
        check = getattr(own["backbone"], "check_within_reach", None)
        if check is not None:
            name = chosen.name_of("backbone")
            with self.naming("settings", [("backbone", name)], by=("backbone", name)):
                check()

    def _of_exporters(self, presets: Sequence[Preset], settings: Settings) -> dict[str, dict[str, Any]]:
        """The settings of the exporters that are chosen, a table each; those of others are passed over.

        Raises:
            InputError: there is no such exporter, an unknown key or a wrong value.
        """
        given = settings.exporter
        for name in given.keys() - {*settings.exporters}:
            self.component_settings("exporter", name, given[name])
        tables = {}
        for name in settings.exporters:
            self.component("exporter", name)  # what cannot be imported is known before the run
            merged = merge(*(self._table(layer, "exporter", name) for layer in presets), given.get(name, {}))
            tables[name] = self.component_settings("exporter", name, merged).model_dump(mode="json")
        return tables

    def stored(self, settings: Settings) -> Settings:
        """Complete settings as a run's files keep them: with paths that hold in any working directory."""
        values = settings.model_dump(mode="json")
        for role in ROLES:
            values[role] = as_stored(self.component_settings(role, settings.name_of(role), settings.values_of(role)))
        for name, table in settings.exporter.items():
            values["exporter"][name] = as_stored(self.component_settings("exporter", name, table))
        return validate(Settings, values)

    def changes_no_result(self, settings: Settings) -> set[str]:
        """The settings of a run, by key, that change nothing of what comes out: see ``strict.CHANGES_NO_RESULT``."""
        keys = set(changes_no_result(Settings))
        for role in ROLES:
            keys |= {f"{role}.{key}" for key in changes_no_result(self._settings_model(role, settings.name_of(role)))}
        return keys | set(flatten({"exporter": settings.exporter}))

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
        chosen = merge(*(one.get("components", {}) for one in layers))
        if "backbone" not in chosen and isinstance(settings.backbone.get("model"), str):
            chosen |= self._in_its_place(self._backbone_of(settings.backbone), chosen.get("learner"))
        return validate(Components, chosen)

    def _in_its_place(self, found: Mapping[str, str], learner: object) -> dict[str, str]:
        """The backbone that was found for a model, or the one that the learner works on in its place.

        A learner says in its settings, ``backbones``, which: name of a backbone -> of another for the same models.
        """
        known = self.offered("learner")
        others = getattr(known[learner].settings, "backbones", {}) if learner in known else {}
        return {role: others.get(name, name) for role, name in found.items()}

    def _backbone_of(self, given: Mapping[str, Any]) -> dict[str, str]:
        """The backbone of the family that the model is of, where that can be told: ``{"backbone": name}``.

        A backbone says in its settings, ``pipelines``, which diffusers pipelines' models it takes, and in ``layouts``
        how those in one file look (``icekit.backbones.file_layouts``).

        Raises:
            InputError: none of the backbones takes such models.
        """
        from icekit.backbones.families import pipeline_of, plugin_for

        model, revision = given["model"], given.get("revision")
        asked = (model, revision if isinstance(revision, str) else None, given.get("local_files_only") is True)
        offered = self.offered("backbone")
        if asked not in self._families:
            layouts = dict.fromkeys(place for one in offered.values() for place in getattr(one.settings, "layouts", ()))
            self._families[asked] = pipeline_of(*asked, layouts=tuple(layouts))
        kind = self._families[asked]
        if kind is None:
            return {}
        takes = {name: getattr(one.settings, "pipelines", ()) for name, one in offered.items()}
        for name, pipelines in takes.items():
            if kind in pipelines:
                return {"backbone": name}
        known = ", ".join(f"{pipeline} (backbone {name})" for name, all_ in takes.items() for pipeline in all_)
        plugin = plugin_for(kind)
        way = f"`pip install {plugin}` brings one" if plugin else "a plugin may bring one (`icekit plugins` lists them)"
        raise InputError(
            f"backbone.model = {model!r}: it is made for {kind}, and there are backbones for {known}; {way}"
        )

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
        for role in (*ROLES, "metric", "exporter"):
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
        lacks = lacks_of(self.component("backbone", components.backbone))
        for role in ROLES[1:]:
            name: str = getattr(components, role)
            with self.naming("settings", [(role, name)], by=(role, name)):
                missing = [one for one in needs_of(self.component(role, name), settings[role]) if one in lacks]
            if not missing:
                continue
            instead = [other for other in self.offered(role) if not set(self._usual_needs(role, other)) & lacks]
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
            yield Observers(self.manager, {origin.plugin: str(origin) for origin in self._origins.values()})
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
