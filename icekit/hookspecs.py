"""Every hook of icekit. The docstring of a hook is its reference.

A plugin is a module (or object) with functions of these names, marked with ``icekit.hookimpl`` and found through the
entry-point group ``icekit``. Names and argument names are checked when it comes in.

A hook that is to go is marked ``@hookspec(warn_on_impl=DeprecationWarning("hook x goes in icekit 2: use y"))``, one of
its arguments with ``warn_on_impl_args``. It works until then, and whoever has a plugin that implements it reads this on
stderr, with the plugin, its distribution, file and line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    import click

    from icekit.protocols import Attribute, ComponentSettings, Region, Step
    from icekit.run.extraction import Extraction
    from icekit.settings import Settings

hookspec = pluggy.HookspecMarker("icekit")
hookimpl = pluggy.HookimplMarker("icekit")


class Register(Protocol):
    """What a hook is handed to register components with."""

    def __call__(
        self, name: str, component: type | str, *, settings: type[ComponentSettings] | None = None, summary: str = ""
    ) -> None:
        """Register a component under the name that people type.

        icekit imports every plugin whenever it starts, and torch takes seconds to import. So a component whose module
        imports it, or anything else that is heavy, is named by its place, and imported when it is used::

            register("clip", "my_package.clip:ClipRetriever", settings=ClipSettings, summary="Ranks words by CLIP.")

        Args:
            name: letters, digits, - and _.
            component: the class, or its place ``"package.module:Class"``.
            settings: of a place: the class's ``Settings``, from a module that is quick to import.
            summary: of a place: what it is, one line. Of a class it is the first line of its docstring.

        Raises:
            PluginError: the name or the component cannot be; the plugin is then listed as broken.
        """
        ...


@hookspec
def register_backbones(register: Register) -> None:
    """Offer text-to-image models: ``register("sd21", StableDiffusion)``; see ``protocols.Backbone``."""


@hookspec
def register_retrievers(register: Register) -> None:
    """Offer retrievers, image -> words: ``register("clip", ClipRetriever)``; see ``protocols.Retriever``."""


@hookspec
def register_segmentors(register: Register) -> None:
    """Offer segmentors, image and word -> mask: ``register("xattn", CrossAttention)``; see ``protocols.Segmentor``."""


@hookspec
def register_learners(register: Register) -> None:
    """Offer learners, image and regions -> tokens: ``register("ice", IceLearner)``; see ``protocols.Learner``."""


@hookspec
def register_attributes(register: Callable[[Attribute], None]) -> None:
    """Offer intrinsic attributes: ``register(Attribute("texture", anchor="texture", vocabulary=("plain", ...)))``."""


@hookspec
def register_presets(register: Callable[[str, Path], None]) -> None:
    """Offer named sets of settings, TOML files: ``register("thorough", Path(__file__).parent / "thorough.toml")``.

    As a settings file (``icekit.settings``), but that the settings of components and metrics are in tables of their
    names (``[learner.ice]``, ``[metric.sim_i]``). The first line, a comment, is its summary. The class of a backbone or
    a data set can name one that it works best with: ``preset = "thorough"``.
    """


@hookspec
def register_datasets(register: Register) -> None:
    """Offer data sets for ``icekit bench``: ``register("folder", FolderDataset)``; see ``protocols.Dataset``."""


@hookspec
def register_metrics(register: Register) -> None:
    """Offer what ``icekit bench`` measures: ``register("miou", MeanIou)``; see ``protocols.Metric``."""


@hookspec
def register_exporters(register: Register) -> None:
    """Offer what writes files from a complete run: ``register("report", Report)``; see ``protocols.Exporter``."""


@hookspec
def register_executors(register: Register) -> None:
    """Offer what does work in several processes or on several machines: ``register("local", LocalExecutor)``; see
    ``protocols.Executor``.
    """


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add sub-commands to ``icekit``: ``@cli.command() ...``."""


@hookspec
def run_started(run_dir: Path, settings: Settings) -> None:
    """A run begins (or goes on): its directory and its complete settings."""


@hookspec
def stage_started(name: str, total: int | None) -> None:
    """A stage begins: ``load``, ``localise``, ``learn``, ``generate`` or ``export``, with its number of steps where
    known.
    """


@hookspec
def region_found(region: Region) -> None:
    """Stage one found a concept, or at its end gave one that it had found another word (same ``index``)."""


@hookspec
def step_done(step: Step) -> None:
    """A learning step is done. Called very often: be quick."""


@hookspec
def image_generated(done: int, total: int) -> None:
    """A sample was generated."""


@hookspec
def run_finished(extraction: Extraction) -> None:
    """The run is complete: its manifest is on disk."""


@hookspec
def run_failed(error: BaseException) -> None:
    """The run ended early, by an error or by the user. What it had done is kept for ``--resume``."""
