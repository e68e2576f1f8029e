"""The work behind the page: one model, one thing at a time, in a thread of its own.

What a run has come to is in its directory and nowhere else: the page looks there, and so sees runs of earlier days, and
those that another process is at work on. Here is what is being done at the moment, and how it is stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from icekit import (
    Extraction,
    InputError,
    Proposal,
    RunError,
    Settings,
    StopRun,
    Unfinished,
    hookimpl,
    load_settings,
    plugins,
)
from icekit_ui.masks import Mask
from icekit_ui.runs import PICTURES, Run, Runs

if TYPE_CHECKING:
    from icekit import Located, Plugins
    from icekit.protocols import Backbone

PATIENCE_S = 60.0
"""Seconds to wait at the end for the step that is being done."""
MOST_WARNINGS = 10
FINDING, LEARNING, MIXING = "finding", "learning", "mixing"


@dataclass(frozen=True)
class Outline:
    """An object as a person has corrected it. word: None where the program is to name it."""

    word: str | None
    mask: Mask = field(repr=False)


@dataclass
class Job:
    """What is being done: what kind of work, on which run or composition, and how far it is."""

    kind: str
    name: str
    stage: str = "load"
    done: int = 0
    total: int | None = None
    stopping: bool = False
    ended: bool = False
    problem: str = ""
    warnings: list[str] = field(default_factory=list)


class Busy(InputError):
    """Something is being done already."""


class _Warnings(logging.Handler):
    """Keeps for the page what a job's own thread warns of: that a picture is of another world than the model, say."""

    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self._job, self._thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if record.thread == self._thread and len(self._job.warnings) < MOST_WARNINGS:
            self._job.warnings.append(record.getMessage().removeprefix("warning: "))


class Watch:
    """An observer of one run: says in its job how far it is, and ends it where it is to end.

    until: the stage that is not to begin.
    """

    def __init__(self, job: Job, until: str | None = None) -> None:
        self.job, self.until = job, until

    @hookimpl
    def stage_started(self, name: str, total: int | None) -> None:
        """A stage begins."""
        if name == self.until:
            raise StopRun("the objects are found")
        self.go_on(name, 0, total)

    @hookimpl
    def region_found(self, region: object) -> None:
        """An object was found."""
        self.go_on(self.job.stage, self.job.done + 1, self.job.total)

    @hookimpl
    def step_done(self, step: Any) -> None:
        """A learning step is done."""
        self.go_on(self.job.stage, step.step, step.total)

    @hookimpl
    def image_generated(self, done: int, total: int) -> None:
        """A sample was drawn."""
        self.go_on(self.job.stage, done, total)

    def go_on(self, stage: str, done: int, total: int | None) -> None:
        """So far it is. Raises StopRun where it is to stop."""
        self.job.stage, self.job.done, self.job.total = stage, done, total
        if self.job.stopping:
            raise StopRun("stopped")


class Studio:
    """The runs' folder, the settings of new runs, and the model, which stays loaded.

    Raises:
        InputError: the settings are wrong.
    """

    def __init__(self, runs: Runs, settings: Settings, installed: Plugins | None = None) -> None:
        self.runs = runs
        self.given = settings
        self.plugins = installed or plugins.installed()
        self.settings = self.plugins.resolve(settings)
        self.job: Job | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._model: tuple[str, Backbone] | None = None

    # --- What is asked for -------------------------------------------------------------------------------------------

    def find(self, picture: Image.Image, stem: str, choices: Mapping[str, Any] | None = None) -> str:
        """Begin a run, and look for objects; learning does not begin by itself. The run's name.

        choices: settings that were chosen on the page, over those of the program.

        Raises:
            Busy: something is being done.
            InputError: a choice is wrong.
        """
        settings = load_settings(options={**self.given.given(), **(choices or {})})
        self.plugins.resolve(settings)  # what is wrong with them is said before anything begins
        self._refuse_if_busy()
        run = self.runs.new(stem, picture)

        def work(job: Job) -> None:
            self._extract(run, job, settings, until="learn")

        self._start(Job(FINDING, run.name), work)
        return run.name

    def learn(self, run: Run, corrected: Sequence[Outline] | None = None) -> str:
        """Go on with a run: to the end of looking if that was interrupted and nothing was corrected, or else learn.

        A complete run stays as it is, and what was corrected becomes a new one.

        corrected: all objects as they are to be; None: as they were found.

        Returns:
            The name of the run that is learned.

        Raises:
            Busy: something is being done.
            InputError: there is nothing to go on with.
        """
        self._refuse_if_busy()
        if corrected is not None and not corrected:
            raise InputError("there is no object to learn: outline one")
        if run.complete:
            return self._learn_anew(run, corrected)
        under_way = Unfinished.open(run.path)
        if self.runs.picture_of(run.name) is None:
            raise InputError(
                f"the run {run.name} was begun elsewhere, and its picture is not here: `icekit run IMAGE --out "
                f"{run.path} --resume` goes on with it"
            )
        looks = corrected is None and not under_way.located.finished

        def work(job: Job) -> None:
            located = self._described(under_way.picture, corrected, under_way.settings) if corrected else None
            self._extract(run, job, None, until="learn" if looks else None, located=located, resume=True)

        self._start(Job(FINDING if looks else LEARNING, run.name), work)
        return run.name

    def _learn_anew(self, run: Run, corrected: Sequence[Outline] | None) -> str:
        if corrected is None:
            raise InputError(f"the run {run.name} is complete: correct an object to learn it anew")
        kept = Extraction.open(run.path)
        seen = self.runs.read_picture(run.path, "image.png")
        if seen is None:
            raise InputError(f"the run {run.name} has no picture that can be read")
        picture = self.runs.read_picture(self.runs.folder, f"{PICTURES}/{run.name}.png") or seen
        settings = kept.settings()
        new = self.runs.new(run.name.rstrip("-0123456789") or run.name, picture)

        def work(job: Job) -> None:
            located = self._described(seen.convert("RGB"), corrected, settings)
            self._extract(new, job, settings, located=located)

        self._start(Job(LEARNING, new.name), work)
        return new.name

    def mix(self, prompt: str, concepts: Mapping[str, tuple[Run, int]], *, count: int, seed: int) -> str:
        """Draw pictures of a prompt that names concepts of runs. The name of the composition.

        Raises:
            Busy: something is being done.
            InputError: a reference or a run is wrong.
        """
        self._refuse_if_busy()
        runs = {name: Extraction.open(run.path) for name, (run, _) in concepts.items()}
        references = {name: f"{run.path}:{index}" for name, (run, index) in concepts.items()}
        out = self.runs.new_mix(prompt)

        def work(job: Job) -> None:
            from icekit import compose

            tuned = [run for run in runs.values() if run.is_fine_tuned]
            drawing = tuned[0] if tuned else next(iter(runs.values()))
            model = self.model(drawing.settings())
            job.stage = "generate"

            def on_image(done: int, total: int) -> None:
                job.done, job.total = done, total
                if job.stopping:
                    raise StopRun("stopped")

            compose(
                prompt, references, n=count, seed=seed, out=out, on_image=on_image, installed=self.plugins,
                backbone=model,
            )  # fmt: skip

        self._start(Job(MIXING, out.name), work)
        return out.name

    def stop(self) -> None:
        """End what is being done after the step that it is at. What it has done is kept."""
        if self.job is not None:
            self.job.stopping = True

    def close(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for what is being done; whether it has ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self.job is None or self.job.ended

    # --- The work ----------------------------------------------------------------------------------------------------

    def _refuse_if_busy(self) -> None:
        if self.job is not None and not self.job.ended:
            raise Busy(f"{self.job.name} is being worked on: wait for it, or stop it")

    def _start(self, job: Job, work: Callable[[Job], None]) -> None:
        def to_the_end() -> None:
            log, warnings = logging.getLogger("icekit"), _Warnings(job)
            log.addHandler(warnings)
            try:
                work(job)
            except StopRun:
                pass
            except (InputError, RunError) as error:
                job.problem = str(error)
            except Exception as error:  # a defect, of a component or of ours: the page goes on
                job.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            finally:
                log.removeHandler(warnings)
                job.ended = True

        with self._lock:
            self._refuse_if_busy()
            self.job = job
            self._thread = threading.Thread(target=to_the_end, name=f"icekit-ui {job.kind} {job.name}", daemon=True)
            self._thread.start()

    def _extract(
        self,
        run: Run,
        job: Job,
        settings: Settings | None,
        *,
        until: str | None = None,
        located: Located | None = None,
        resume: bool = False,
    ) -> None:
        from icekit import extract

        picture = self.runs.picture_of(run.name)
        if picture is None:
            raise InputError(f"the picture of the run {run.name} is gone")
        own = settings or Unfinished.open(run.path).settings
        model = self.model(own)
        watch = Watch(job, until)
        watch.go_on("load", 0, None)
        extract(
            picture, run.path, settings, resume=resume, observers=[watch], installed=self.plugins, backbone=model,
            located=located,
        )  # fmt: skip

    def model(self, settings: Settings) -> Backbone:
        """The settings' backbone, which stays loaded until another one is asked for."""
        from icekit import load_model

        stored = self.plugins.stored(self.plugins.resolve(settings))
        key = f"{stored.name_of('backbone')} {stored.device} {sorted(stored.values_of('backbone').items())}"
        if self._model is None or self._model[0] != key:
            self._model = None  # there is not room for two
            self._model = (key, load_model(settings, self.plugins))
        return self._model[1]

    def _described(self, picture: Image.Image, outlines: Sequence[Outline] | None, settings: Settings) -> Located:
        """Objects that a person outlined, as stage one's result: unnamed ones get a word, and all of them hints."""
        import torch

        from icekit import locate
        from icekit.protocols import ShapedBackbone

        resolved = self.plugins.resolve(settings)
        model = self.model(settings)
        if isinstance(model, ShapedBackbone):
            model = model.for_picture(picture.height, picture.width)
        name = resolved.name_of("retriever")
        own = self.plugins.component_settings("retriever", name, resolved.values_of("retriever"))
        retriever: Any = self.plugins.component("retriever", name)(own, model)
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
        resolved = resolved.model_copy(update={"max_concepts": max(resolved.max_concepts, len(outlines or ()))})
        proposals = [Proposal(torch.from_numpy(one.mask.copy()), one.word or None) for one in outlines or ()]
        return locate(
            pixels.contiguous(), retriever, _Outlined(proposals), resolved, attributes=self.plugins.attributes(resolved)
        )


class _Outlined:
    """A proposer of the masks that it was made with: see ``icekit.protocols.Proposer``."""

    def __init__(self, proposals: Sequence[Proposal]) -> None:
        self._proposals = list(proposals)

    def propose(self, image: object) -> list[Proposal]:
        """The masks."""
        return self._proposals
