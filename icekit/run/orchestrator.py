"""The orchestrator: an image goes in, a complete run directory comes out.

Stage one finds regions (``locate``), stage two learns tokens for them (``learn``); then they are named and shown
(``show``). Here is their order, what is kept of each, and how a run goes on: what is done is on disk at once, and after
any interruption it ends with the same tokens.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from icekit import plugins
from icekit.foreign import is_of_the_machine, said
from icekit.paths import user_path
from icekit.pixels import to_tensor
from icekit.plugins import ComponentError, Observers, Plugins
from icekit.protocols import (
    Backbone,
    Embedder,
    InputError,
    Learned,
    Region,
    Retriever,
    RunError,
    Step,
    World,
)
from icekit.randomness import seeded_generator
from icekit.run import directory, images
from icekit.run.atomic import CannotWrite
from icekit.run.card import model_card
from icekit.run.counting import counted
from icekit.run.directory import Located, RunDirectory
from icekit.run.evaluations import Counter
from icekit.run.events import Event, Told
from icekit.run.exporting import ExportError, write_export
from icekit.run.extraction import Extraction
from icekit.run.familiarity import denoising_error, unlike
from icekit.run.learning import learn, tokens_of
from icekit.run.locating import UNNAMED, embedded, locate
from icekit.run.log import read_log
from icekit.run.machine import enough_memory
from icekit.run.models import (
    build_component,
    check_picture,
    in_shape_of,
    load_backbone,
    pipeline_facts,
    reproducible,
    resolve_device,
)
from icekit.run.naming import check_words, name_attribute
from icekit.run.origins import check_origins, origins_of
from icekit.run.ownership import refuse_if_busy, writing_into
from icekit.run.progress import observers_of
from icekit.run.records import Started
from icekit.run.showing import Sample, likeliest, planned_samples, prompts_of, show, words_alone
from icekit.settings import ROLES, Role, Settings, flatten, merge, of_run_before, validate
from icekit.wording import export_of, named, option

log = logging.getLogger(__name__)

ATTENTION_SIDE = 128
"""Shorter side of the saved attention maps, pixels."""
HINTS_KEPT = 3
"""Of the words that fit an attribute before any learning, in the manifest."""


def extract(
    image: str | Path | Image.Image | images.SourceImage,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Event], object] | None = None,
    progress: bool | None = None,
    observers: Sequence[object] = (),
    installed: Plugins | None = None,
    backbone: Backbone | None = None,
    located: Located | None = None,
) -> Extraction:
    """Find the concepts of an image, learn their tokens, and keep everything in a run directory.

    Args:
        image: a file in any common format, a PIL image, or one that was read before. All of it is used where the
            backbone can work in its proportions (setting ``image.fit``), else its middle, in the backbone's.
        out: the run directory; ``runs/<stem of the image>`` if None.
        settings: ``icekit.Settings``; the defaults if None.
        resume: go on with the run in ``out`` if there is one, with its settings; a complete one is returned as it is.
        overwrite: replace the run in ``out``.
        on_event: called with an ``Event`` whenever something happens: a stage begins, a region is found, a step
            is done. What it raises ends the run.
        progress: show how far the run is: a bar on a terminal, a line of a notebook's output; None: in notebooks alone.
        observers: objects with observer hooks (``icekit.hookspecs``), for this run.
        installed: the plugins to use; those of this Python environment if None.
        backbone: the settings' backbone, loaded before; loaded here if None.
        located: stage one's result, when it is known; the retriever and the segmentor are then not asked. With
            ``resume`` it takes the place of what the run had found; if that was something else, what was learned of it
            goes.

    Raises:
        InputError: the image, the settings or ``out`` are wrong.
        RunError: the run failed. What it had done is kept in ``out`` for ``resume``.
        StopRun: an observer raised it, or (``CallbackError``) ``on_event`` failed; so is it then.
        ExportError: the run is complete, but an exporter failed.
    """
    found = installed or plugins.installed()
    source = image if isinstance(image, images.SourceImage) else images.load_image(image)
    run = RunDirectory(user_path(out, "out") if out is not None else Path("runs") / source.stem)
    everyone = [*observers_of(progress), *([Told(on_event)] if on_event is not None else []), *observers]
    with found.observed_by(everyone) as tell, reproducible():
        try:
            this_run = _Run(found, tell, run, source, settings or Settings(), backbone, located)
            with (
                enough_memory(lambda: this_run.stage, found, lambda: this_run.settings),
                found.naming(lambda: this_run.stage, this_run.components),
            ):
                return this_run.to_the_end(resume=resume, overwrite=overwrite)
        except ExportError:
            raise
        except BaseException as error:
            tell.tell("run_failed", error=error)
            raise


class _Run:
    """One run on its way: the settings, the models and the directory, stage by stage."""

    def __init__(
        self,
        found: Plugins,
        observers: Observers,
        run: RunDirectory,
        source: images.SourceImage,
        settings: Settings,
        backbone: Backbone | None,
        located: Located | None,
    ) -> None:
        self.plugins = found
        self.observers = observers
        self.home = self.run = run
        self.begun = False
        self.source = source
        self.settings = settings
        self.loaded = backbone
        self.located = located
        self.timings: dict[str, float] = {}
        self.counter = Counter()
        self.stage = "settings"
        self.warnings: list[str] = []

    def components(self) -> list[tuple[str, str]]:
        """Those that are at work, (role, name) each."""
        return [(role, self.settings.name_of(role)) for role in ROLES]

    def to_the_end(self, *, resume: bool, overwrite: bool) -> Extraction:
        refuse_if_busy(self.home.path)
        self.home.check_usable(resume=resume, overwrite=overwrite)
        if resume and self.home.is_settled and (started := self._started()):
            self._take_up(started)
            return Extraction.open(self.home.path)
        with writing_into(self.home.path):
            self.home.finish_exchange(writing=True)
            self.home.check_usable(resume=resume, overwrite=overwrite)  # another process may have been here
            return self._to_the_end(resume=resume, overwrite=overwrite)

    def _to_the_end(self, *, resume: bool, overwrite: bool) -> Extraction:
        self.home.clear_leftovers()
        if (resume and self.home.next.holds_run) or (overwrite and self.home.holds_run):
            self.run = self.home.next  # the old run stays until the new one is complete
            self.run.check_usable(resume=resume, overwrite=overwrite)
        goes_on = False
        if resume and (started := self._started()):
            self._take_up(started)
            if self.run.is_complete:
                self._settle()
                return Extraction.open(self.home.path)
            goes_on = self.begun = True
        self.settings = self.plugins.resolve(self.settings)  # before a model takes minutes to load
        self.attributes = self.plugins.attributes(self.settings)
        if self.loaded is None:
            self.plugins.check_within_reach(self.settings)
        device = resolve_device(self.settings.device)
        if not goes_on and self.located is None:
            self._check_picture()

        self.timings = self.run.load_timings() if goes_on else {}
        self.counter = Counter(self.run.load_evaluations() if goes_on else {})
        with self._stage("load"):
            self.backbone = self.loaded or load_backbone(self.plugins, self.settings, device)
            if self.settings.image.fit == "whole" and self.located is None:
                self.backbone = in_shape_of(self.source.picture.size, self.plugins, self.settings, self.backbone)
            name = self.settings.name_of("backbone")
            check_words(name, self.backbone, self.attributes)
            own = self.plugins.component_settings("backbone", name, self.settings.values_of("backbone"))
            self.backbone = counted(self.backbone, self.counter, own)
        if not goes_on:
            picture = self.source.fitted(self.backbone.image_size)
            if self.run is self.home:
                self.home.discard_next()
            stored, origins = self.plugins.stored(self.settings), origins_of(self.plugins, self.settings)
            self.run.begin(stored, self.source.source, self.source.sha256, picture, origins)
            self.begun = True
        self.run.clear_leftovers()
        if goes_on:
            self.run.update_settings(self.plugins.stored(self.settings))
        self.size = self.backbone.image_size[::-1]
        self.image = to_tensor(self.run.load_image(self.size))
        self.observers.tell("run_started", run_dir=self.home.path, settings=self.settings)
        self._look_at_picture()

        with self._stage("localise", self.settings.max_concepts):
            regions = self._locate()
            self._check_prompts(regions)
        with self._stage("learn"):
            learned = self._learn(regions)
        samples = planned_samples(regions, learned.tokens, self.settings, self.attributes)
        with self._stage("generate", len(samples)):
            words = self._name(regions, learned)
            self._show(regions, learned, samples)
        failed = self._finish(regions, words)
        self._settle()
        extraction = Extraction.open(self.home.path)
        self.observers.tell("run_finished", extraction=extraction)
        if failed:
            raise ExportError("; ".join(self._of_exporter(*one) for one in failed.items()), extraction) from next(
                iter(failed.values())
            )
        return extraction

    def _settle(self) -> None:
        """Put a run that is complete into its place."""
        if self.run is self.home:
            self.home.discard_next()
        else:
            self.home.replace()

    def _check_picture(self) -> None:
        """Whether the segmentor's files are of this picture, where it has some: see ``protocols.Segmentor``."""
        check_picture(self.plugins, self.settings, self.source.source, self.source.picture.size)

    # --- Going on ----------------------------------------------------------------------------------------------------

    def _started(self) -> Started | None:
        if not self.run.is_complete:
            return self.run.started()
        extraction = Extraction.open(self.run.path)
        image = extraction.record.image
        return Started(
            sha256=image.sha256,
            source=image.source,
            settings=extraction.settings().model_dump(mode="json"),
            schema_version=extraction.schema_version,
            plugins=extraction.record.plugins,
        )

    def _take_up(self, started: Started) -> None:
        """Take the settings of the run that is to go on; refuse if other ones, or another image, were given.

        Raises:
            InputError: names what changed.
        """
        if started.schema_version != directory.SCHEMA_VERSION:
            raise InputError(
                f"the run in {self.home.path} was made by another version of icekit (schema version "
                f"{started.schema_version}) and cannot go on: {option('overwrite')} starts it afresh"
            )
        started = started.model_copy(update={"settings": of_run_before(started.settings)})
        check_origins(self.plugins, started.plugins, f"the run in {self.home.path}")
        changes = []
        if started.sha256 != self.source.sha256:
            changes.append(f"the image was {started.source}, now {self.source.source} (other content)")
        given = self.settings.given()
        earlier = self._settings_of(started)
        before = flatten(self.plugins.stored(self.plugins.resolve(earlier)).model_dump(mode="json"))
        names = flatten({"components": given.get("components", {})})
        asked = earlier
        if all(before[key] == name for key, name in names.items()):
            # As checked and filled in, so that "steps = '400'" is no change from 400.
            asked = self.plugins.resolve(validate(Settings, merge(started.settings, given)))
            now = flatten(self.plugins.stored(asked).model_dump(mode="json"))
        else:
            now = names
        free = self.plugins.changes_no_result(asked)
        for key, value in now.items():
            if key not in free and value != before.get(key):
                changes.append(f"{key} was {before.get(key)}, now {value}")
        if changes:
            raise InputError(
                f"the run in {self.home.path} cannot go on: {'; '.join(changes)} "
                f"({option('overwrite')} starts it afresh)"
            )
        self.settings = asked

    def _settings_of(self, started: Started) -> Settings:
        """The settings that a run began with. Raises InputError where they are none: they are damaged."""
        try:
            return validate(Settings, started.settings)
        except InputError as error:
            raise self.run.files.damaged("checkpoint/run.json", str(error)) from error

    @contextlib.contextmanager
    def _stage(self, name: str, total: int | None = None) -> Iterator[None]:
        self.stage = name
        self.observers.tell("stage_started", name=name, total=total)
        begun = time.monotonic()
        failed = True
        try:
            yield
            failed = False
        finally:
            self.counter.book(name)  # what no callback has told of
            key = f"{name}_s"
            self.timings[key] = round(self.timings.get(key, 0) + time.monotonic() - begun, 3)
            if self.begun:
                with contextlib.suppress(*[CannotWrite] * failed):  # what it failed for is what is told
                    self.run.save_timings(self.timings)
                    self.run.save_evaluations(self.counter.booked)

    def _look_at_picture(self) -> None:
        """Say that the picture is not of the world that the model knows, if that is a small one."""
        world: World | None = getattr(self.backbone, "world", None)
        if world is None:
            return
        name = self.settings.name_of("backbone")
        generator = seeded_generator(self.settings.seed, "familiarity")
        with self.plugins.naming("load", [("backbone", name)], by=("backbone", name)):
            error = denoising_error(self.backbone, self.image, world.share, generator)
        self.counter.forget("familiarity")
        self.counter.book("familiarity")
        if (problem := unlike(name, world, error, self.source.source)) is not None:
            self.warnings.append(problem)
            log.warning("warning: %s", problem)

    # --- Stages ------------------------------------------------------------------------------------------------------

    def _build(self, role: Role) -> Any:
        return build_component(self.plugins, self.settings, role, self.backbone)

    def _locate(self) -> tuple[Region, ...]:
        located = self.run.load_located(self.size)
        if self.located is not None and not located.is_as(self.located):
            if located.finished:
                self.run.forget_learned()
            located = self.located
            self.run.forget_vectors()
            self.run.save_located(located)
        told: dict[int, str] = {}

        def tell(located: Located) -> None:
            for region in located.regions:
                if told.get(region.index) != region.word:  # new, or named anew at the end
                    told[region.index] = region.word
                    self.observers.tell("region_found", region=region)

        def keep(located: Located) -> None:
            self.counter.book("localise")
            if located.finished:  # first: what is finished is not looked at again
                self._keep_vectors(located.regions, retriever)
            self.run.save_located(located)
            tell(located)

        tell(located)
        if not located.finished:
            retriever = self._build("retriever")
            located = locate(
                self.image,
                retriever,
                self._build("segmentor"),
                self.settings,
                attributes=self.attributes,
                located=located,
                on_change=keep,
            )
        if not located.regions:
            words = ", ".join(located.refused)
            tried = f"none of the words tried has a place in it ({words})" if words else "no word was found for it"
            raise RunError(
                f"no concept found in {self.source.source}: {tried}; try another {named('retriever')} or min_area"
            )
        return located.regions

    def _keep_vectors(self, regions: Sequence[Region], retriever: Retriever) -> None:
        """Keep where the retriever's CLIP places each region, if it has one."""
        if not isinstance(retriever, Embedder) or not regions:
            return
        vectors = embedded(self.image, regions, retriever, self.settings.name_of("retriever"))
        self.run.save_vectors(retriever.space, vectors)

    def _check_prompts(self, regions: Sequence[Region]) -> None:
        """Whether all that will be drawn fits into a prompt: to be known before anything is learned.

        Raises:
            InputError: names the concept whose word is too long for the model.
        """
        row = self.backbone.word_rows(UNNAMED)
        for region in regions:
            tokens = dict.fromkeys(self._tokens(region).values(), row)
            for prompt in prompts_of(region, tokens, self.settings, self.attributes):
                try:
                    self.backbone.token_positions(prompt, [], tokens)
                except InputError as error:
                    raise InputError(
                        f"concept {region.index} ({region.word[:80]!r}) cannot be drawn: {error}; give it a shorter "
                        f"word or learn fewer attributes ({option('overwrite')} starts the run afresh)"
                    ) from error

    def _learn(self, regions: Sequence[Region]) -> Learned:
        expected = [token for region in regions for token in self._tokens(region).values()]
        tokens = self.run.load_tokens(self.backbone.rows, expected)
        if tokens is not None:
            return Learned(tokens, self.run.load_tuning())
        with self.run.open_log() as steps:

            def on_step(step: Step) -> None:
                self.counter.book(f"learn {step.phase}")
                steps.write(step)
                self.observers.tell("step_done", step=step)

            learned = learn(
                self.image,
                regions,
                self._build("learner"),
                self.backbone,
                self.settings,
                attributes=self.attributes,
                checkpoint=self.run.checkpoint,
                on_step=on_step,
            )
        self.run.save_learned(learned)
        return learned

    def _name(self, regions: Sequence[Region], learned: Learned) -> dict[int, dict[str, list[str]]]:
        words: dict[int, dict[str, list[str]]] = {}
        for region in regions:
            names = self._tokens(region)
            words[region.index] = {
                one.name: name_attribute(self.backbone, one, names[one.name], learned.tokens, region.word)
                for one in self.attributes
                if one.name in names
            }
        return words

    def _show(self, regions: Sequence[Region], learned: Learned, samples: Sequence[Sample]) -> None:
        there = [one for one in samples if self.run.has_sample(*_place(one), words_alone=one.words_alone)]
        done = len(there)
        self.counter.forget("attention maps")

        def keep_attention(index: int, part: str, weights: Tensor) -> None:
            self.counter.book("attention maps")
            grey = (weights / weights.max().clamp_min(1e-12) * 255).round().byte().numpy()
            larger = max(1, round(ATTENTION_SIDE / min(grey.shape)))
            size = (grey.shape[1] * larger, grey.shape[0] * larger)
            self.run.save_attention(index, part, Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC))

        def keep_sample(sample: Sample, picture: Image.Image) -> None:
            nonlocal done
            self.counter.book("samples of the words alone" if sample.words_alone else "samples")
            self.run.save_sample(*_place(sample), picture, words_alone=sample.words_alone)
            done += 1
            self.observers.tell("image_generated", done=done, total=len(samples))

        show(
            self.image,
            regions,
            learned,
            self.backbone,
            self.settings,
            attributes=self.attributes,
            skip=there,
            attention=self._shows_attention(),
            on_attention=keep_attention,
            on_sample=keep_sample,
        )

    def _shows_attention(self) -> bool:
        """Whether one of the run's exporters shows where tokens look."""
        names = self.settings.exporters
        return any(getattr(self.plugins.component("exporter", name), "shows_attention", False) for name in names)

    def _tokens(self, region: Region) -> dict[str, str]:
        """A concept's tokens by part: those that the learner learns."""
        learner = self.plugins.component("learner", self.settings.name_of("learner"))
        return tokens_of(region, self.attributes, learner)

    def _finish(self, regions: Sequence[Region], words: dict[int, dict[str, list[str]]]) -> dict[str, Exception]:
        """Complete the run; the exporters that failed, and why."""
        height, width = self.backbone.image_size
        for region in regions:
            mask = self.source.mask_of(region.mask.numpy(), (height, width))
            self.run.save_picture(directory.original_mask_name(region), mask)
        manifest: dict[str, Any] = {
            "schema_version": directory.SCHEMA_VERSION,
            "icekit_version": plugins.own_version(),
            "image": {
                "source": self.source.source,
                "sha256": self.source.sha256,
                "width": width,
                "height": height,
                "fitted": self.source.fitting((height, width)),
            },
            "presets": [preset.name for preset in self.plugins.presets_of(self.settings)],
            "components": self.settings.components.model_dump(),
            "backbone": {"identity": self.backbone.identity, "rows": dict(self.backbone.rows)}
            | pipeline_facts(self.backbone),
            "attributes": list(self.settings.attributes),
            "seed": self.settings.seed,
            "concepts": [
                {
                    "index": region.index,
                    "label": region.label,
                    "score": round(float(region.score), 4),
                    "mask": directory.mask_name(region),
                    "original_mask": directory.original_mask_name(region),
                    "area": round(float(region.mask.float().mean()), 4),
                    "tokens": self._tokens(region),
                    "words": words[region.index],
                    "described": {name: likeliest(hints, HINTS_KEPT) for name, hints in region.hints.items()},
                    "words_alone": words_alone(region, self.attributes),
                }
                for region in regions
            ],
            "learning_steps": max((line.step for line in read_log(self.run.files)[0]), default=0),
            "plugins": [one.model_dump() for one in origins_of(self.plugins, self.settings)],
            "timings": self.timings,
            "evaluations": {what: asdict(count) for what, count in self.counter.booked.items()},
            "warnings": self.warnings,
        }
        extraction = Extraction.of(self.run, manifest)
        self.run.save_card(model_card(self.run, extraction.record, self.settings))
        failed = self._export(extraction)
        if self.run is not self.home:
            self.home.check_replaceable(self.run)
        self.run.finish(manifest)
        return failed

    def _export(self, extraction: Extraction) -> dict[str, Exception]:
        """Write what the settings' exporters write; those that failed, and why. They make no run incomplete."""
        failed: dict[str, Exception] = {}
        names = self.settings.exporters
        if names:
            self.stage = "export"
            self.observers.tell("stage_started", name="export", total=len(names))
        for name in names:
            try:
                write_export(self.plugins, extraction, name, self.settings.exporter[name], self.run.path)
            except Exception as error:
                if isinstance(error, CannotWrite) or is_of_the_machine(error):
                    raise  # of no exporter: --resume goes on when there is more room
                failed[name] = error
        return failed

    def _of_exporter(self, name: str, error: Exception) -> str:
        """Which exporter failed, and how it is made up for."""
        why = str(error) if isinstance(error, InputError | RunError) else said(error)
        if not isinstance(error, ComponentError):  # which says whose it is
            why = f"exporter {name!r} of {self.plugins.offered('exporter')[name].origin}: {why}"
        return f"{why} (the run is complete; {export_of(self.home.path, name)} writes what is missing)"


def _place(sample: Sample) -> tuple[int, str, int]:
    return sample.index, sample.part, sample.number
