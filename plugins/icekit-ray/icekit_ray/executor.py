"""Actors of a Ray cluster: each is a worker, which keeps its models for as long as it lives.

The driver replaces an actor that died, and not Ray (``max_restarts``): a job is to be counted that has cost two workers
their lives, and a new worker's set-up may say that its machine has other versions.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from icekit.protocols import InputError, JobResult, RunError, Work
from icekit.protocols.executing import MOST_TRIES
from icekit_ray.actor import Place, Worker, last_words
from icekit_ray.connecting import connected
from icekit_ray.settings import RaySettings

log = logging.getLogger(__name__)
LOG_S = 20.0
"""Seconds in which a machine must hand out the end of a dead worker's log."""
MOST_WHY = 240
"""Characters of what Ray says of a death."""


class RayExecutor:
    """The machines of a Ray cluster: an actor a worker, which keeps the models."""

    Settings = RaySettings

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings

    def execute(self, work: Work, jobs: Iterable[Any]) -> Generator[JobResult, None, None]:
        """Do all jobs; see ``icekit.protocols.Executor``."""
        left = iter(jobs)
        first = list(itertools.islice(left, 1))
        if not first:
            return
        with connected(self.settings.address, max(_cores(), (self.settings.workers or 1) * work.threads)):
            count, needs = _room(work, self.settings, [one["Resources"] for one in ray.nodes() if one["Alive"]])
            first += itertools.islice(left, count - 1)
            workers = _Workers(work, needs, len(first), self.settings.wait)
            try:
                workers.wait_until_set_up()
                yield from workers.share(itertools.chain(first, left))
            finally:
                workers.end()


class _Worker:
    """One actor. place: where it is; None while the cluster has no room for it. doing: its job, and which try it is."""

    def __init__(self, actor_class: Any, work: Work) -> None:
        self.place: Place | None = None
        self.is_set_up = False
        self.doing: tuple[Any, int] | None = None
        self.actor = actor_class.remote()
        self.now = self.actor.begin.remote(os.getcwd())
        self._next = self.actor.set_up.remote(work.set_up)

    def found_at(self, place: Place) -> None:
        """It has begun; now it is being set up."""
        self.place, self.now = place, self._next

    def begin(self, job: Any, tries: int) -> None:
        self.doing = (job, tries)
        self.now = self.actor.do.remote(job)

    def end(self) -> None:
        """End the process, wherever it is: what it has done is on disk."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.actor, no_restart=True)


class _Workers:
    """Those that are at work, and the jobs that they have."""

    def __init__(self, work: Work, needs: dict[str, float], count: int, wait: float) -> None:
        self.work, self.needs, self.wait = work, needs, wait
        self.actor_class = ray.remote(Worker).options(
            max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **needs
        )
        self.everyone = [_Worker(self.actor_class, work) for _ in range(count)]
        self.idle: list[_Worker] = []
        self.again: deque[tuple[Any, int]] = deque()
        self.no_more = False

    def wait_until_set_up(self) -> None:
        """Return when all are set up for which the cluster has room; the others come when it has."""
        deadline = time.monotonic() + self.wait
        while beginning := [one for one in self.everyone if not one.is_set_up]:
            homeless = [one for one in beginning if one.place is None]
            left = deadline - time.monotonic()
            if left <= 0 and len(homeless) == len(beginning):  # those that have a place are being set up, or are
                if len(homeless) == len(self.everyone):
                    raise InputError(f"the cluster has no room for a worker, which needs {_shown(self.needs)}")
                log.warning(
                    "the cluster has room for %d workers, and none for %d more",
                    len(self.everyone) - len(homeless),
                    len(homeless),
                )
                return
            worker = self._next_of(beginning, max(left, 1.0) if homeless else None)
            if worker is None:
                continue
            error = self._goes_on(worker)
            if error is not None:
                raise error

    def share(self, jobs: Iterator[Any]) -> Iterator[JobResult]:
        """Hand out the jobs; what comes of each."""
        new = ((job, 1) for job in jobs)
        while True:
            self._hand_out(new)
            if self.no_more and not self.again and all(one.doing is None for one in self.everyone):
                return
            busy = [one for one in self.everyone if one.doing is not None or not one.is_set_up]
            has_place = any(one.place is not None for one in busy)
            worker = self._next_of(busy, None if has_place else self.wait)
            if worker is None:
                raise RunError(f"no worker is left, and the cluster has no room for one ({_shown(self.needs)})")
            result = self._ended(worker)
            self._hand_out(new)  # before whoever asked does something with the result
            if result is not None:
                yield result

    def end(self) -> None:
        for worker in self.everyone:
            worker.end()

    # --- What workers say --------------------------------------------------------------------------------------------

    def _next_of(self, workers: list[_Worker], timeout: float | None) -> _Worker | None:
        """The first of them whose task has ended, however; None: none in so many seconds."""
        by_task = {one.now: one for one in workers}
        ended, _ = ray.wait(list(by_task), num_returns=1, timeout=timeout)
        if not ended:
            return None
        # Those that ended come last next time: nobody is overlooked.
        worker = by_task[ended[0]]
        self.everyone.remove(worker)
        self.everyone.append(worker)
        return worker

    def _goes_on(self, worker: _Worker) -> InputError | RunError | None:
        """A worker has begun, or is set up; what is wrong with it if it cannot go on."""
        try:
            said = ray.get(worker.now)
        except RayTaskError as error:
            return InputError(f"a worker{_at(worker.place)} cannot be set up: {_one_line(error.cause)}")
        except RayError as error:
            return RunError(f"a worker{_at(worker.place)} died before it had begun: {_why(error)}{self._log(worker)}")
        if isinstance(said, Place):
            worker.found_at(said)
        elif said is not None:
            assert isinstance(said, InputError | RunError), "what the actor returns"
            return said
        else:
            worker.is_set_up = True
            self.idle.append(worker)
        return None

    def _ended(self, worker: _Worker) -> JobResult | None:
        if worker.doing is None:
            error = self._goes_on(worker)
            if error is not None:
                log.warning("%s; the work goes on without it", error)
                self.everyone.remove(worker)
                worker.end()
                if not self.everyone:
                    raise RunError(f"no worker is left: {error}") from error
            return None
        job, tries = worker.doing
        try:
            value = ray.get(worker.now)
        except RayTaskError as error:
            raise RunError(f"a job failed{_at(worker.place)}: {_one_line(error.cause)}") from error
        except RayError as error:
            worker.end()  # one that cannot be reached may live
            self.everyone.remove(worker)
            self.everyone.append(_Worker(self.actor_class, self.work))
            if tries < MOST_TRIES:
                self.again.append((job, tries + 1))
                return None
            why = f"the worker{_at(worker.place)} that did it died, and so did the one before: {_why(error)}"
            return JobResult(job, lost=why + self._log(worker))
        worker.doing = None
        self.idle.append(worker)
        return JobResult(job, value)

    def _hand_out(self, new: Iterator[tuple[Any, int]]) -> None:
        while self.idle:
            job, tries = self.again.popleft() if self.again else next(new, (None, 0))
            if not tries:
                self.no_more = True
                return
            self.idle.pop().begin(job, tries)  # if it is dead, that is known when the result is asked for

    def _log(self, worker: _Worker) -> str:
        """The end of a dead worker's log, which is on its machine."""
        if worker.place is None or worker.place.log is None:
            return ""
        there = NodeAffinitySchedulingStrategy(worker.place.node, soft=False)
        read = ray.remote(last_words).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        try:
            end = ray.get(read.remote(worker.place.log), timeout=LOG_S)
        except RayError:
            return "; its machine, which has its log, is gone, too"
        return f"; its log ends with: {end}" if end else ""


# --- Room and words ---------------------------------------------------------------------------------------------------


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _room(work: Work, settings: RaySettings, nodes: list[dict[str, float]]) -> tuple[int, dict[str, float]]:
    """How many workers there are to be, and what each needs of the cluster, as options of its actor.

    nodes: what each machine has.
    """
    gpus = settings.gpus
    if gpus is None:
        has_gpus = any(node.get("GPU") for node in nodes)
        gpus = 1.0 if work.device == "cuda" or (work.device == "auto" and has_gpus) else 0.0
    needs = {"num_cpus": float(work.threads), "num_gpus": gpus}
    largest = max((node.get("memory", 0.0) for node in nodes), default=0.0)
    if not gpus and work.memory and largest and settings.workers is None:
        needs["memory"] = min(float(work.memory), largest)
    of_ray = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    fit = sum(min(int(node.get(of_ray[key], 0) // need) for key, need in needs.items() if need) for node in nodes)
    return settings.workers or max(1, fit), needs


def _shown(needs: dict[str, float]) -> str:
    shown = [f"{needs['num_cpus']:g} CPU"]
    shown += [f"{needs['num_gpus']:g} GPU"] if needs["num_gpus"] else []
    return " and ".join([*shown, *([f"{needs['memory'] / 2**30:.1f} GiB"] if "memory" in needs else [])])


def _at(place: Place | None) -> str:
    return "" if place is None else f" on {place.host} (process {place.process})"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MOST_WHY]


def _why(error: RayError) -> str:
    """What Ray says of a death, without its advice."""
    text = " ".join(str(error).split())
    for mark in ("The actor is dead because ", "Worker exit detail: "):
        text = text.rpartition(mark)[2]
    return text.partition(" Some common causes")[0].partition(" There are some potential")[0][:MOST_WHY].rstrip(". ")
