"""Processes of this machine: one for each GPU, or several on the CPU.

Each worker is a pool of one process (``concurrent.futures``), so that what becomes of a process is known to be its
job's. Processes are forked from a server that has imported what all of them need, where the system can do that safely.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from icekit.builtin.executors.settings import LocalSettings
from icekit.protocols import InputError, RunError
from icekit.protocols.executing import MOST_TRIES, JobResult, Work

KILLED = "the system kills a process that needs more memory than there is"
VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalExecutor:
    """Processes of this machine: one for each GPU, or several on the CPU."""

    Settings = LocalSettings

    def __init__(self, settings: LocalSettings) -> None:
        self.settings = settings

    def execute(self, work: Work, jobs: Iterable[Any]) -> Generator[JobResult, None, None]:
        """Do all jobs; see ``protocols.Executor``."""
        left = iter(jobs)
        places = _places(work, self.settings.workers)
        first = list(itertools.islice(left, len(places)))
        if not first:
            return
        workers = _Workers(work, places[: len(first)])
        try:
            workers.wait_until_set_up()
            yield from workers.share(itertools.chain(first, left))
        except BaseException:
            workers.kill()
            raise
        workers.leave()


class _Worker:
    """One process."""

    def __init__(self, work: Work, environment: dict[str, str]) -> None:
        self.environment = environment
        self.pool = ProcessPoolExecutor(1, mp_context=_context(work.imports))
        self._process = self.pool.submit(_begin, environment)
        self.set_up: Future[None] = self.pool.submit(_set_up, work.set_up)

    def do(self, job: Any) -> Future[Any]:
        return self.pool.submit(_do, job)

    def kill(self) -> None:
        """End the process wherever it is: what it has done is on disk."""
        # Set-up begins when the number is known: without it there is nothing to be killed.
        if self._process.done() and not self._process.cancelled() and self._process.exception() is None:
            with contextlib.suppress(OSError):
                os.kill(self._process.result(), getattr(signal, "SIGKILL", signal.SIGTERM))
        self.pool.shutdown(wait=False, cancel_futures=True)


class _Workers:
    """Those that are at work, and the jobs that they have."""

    def __init__(self, work: Work, places: list[dict[str, str]]) -> None:
        self.work = work
        self.everyone = [_Worker(work, place) for place in places]
        self.idle: list[_Worker] = []
        self.doing: dict[Future[Any], tuple[_Worker, Any, int]] = {}
        self.beginning: dict[Future[Any], _Worker] = {}
        self.again: deque[tuple[Any, int]] = deque()
        self.no_more = False

    def wait_until_set_up(self) -> None:
        for worker in self.everyone:
            try:
                worker.set_up.result()
            except BrokenProcessPool as error:
                raise RunError(
                    f"a worker died before it had begun ({KILLED}; a script that starts workers does so below "
                    "`if __name__ == '__main__':`)"
                ) from error
            self.idle.append(worker)

    def share(self, jobs: Iterator[Any]) -> Iterator[JobResult]:
        """Hand out the jobs; what comes of each."""
        new = ((job, 1) for job in jobs)
        while True:
            self._hand_out(new)
            if self.no_more and not (self.doing or self.again):
                return
            ended, _ = wait([*self.doing, *self.beginning], return_when=FIRST_COMPLETED)
            results = [result for future in ended if (result := self._ended(future)) is not None]
            self._hand_out(new)  # before whoever asked does something with the results
            yield from results

    def _hand_out(self, new: Iterator[tuple[Any, int]]) -> None:
        while self.idle:
            job, tries = self.again.popleft() if self.again else next(new, (None, 0))
            if not tries:
                self.no_more = True
                return
            worker = self.idle.pop()
            try:
                self.doing[worker.do(job)] = (worker, job, tries)
            except BrokenProcessPool:  # it died while it had nothing to do
                self.again.appendleft((job, tries))
                self._replace(worker)

    def _ended(self, future: Future[Any]) -> JobResult | None:
        if future in self.beginning:
            worker = self.beginning.pop(future)
            error = future.exception()
            if error is None:
                self.idle.append(worker)
                return None
            worker.kill()
            self.everyone.remove(worker)
            if not self.everyone:
                raise RunError(f"no worker is left: all of them died, and the last could not be replaced ({KILLED})")
            return None
        worker, job, tries = self.doing.pop(future)
        try:
            value = future.result()
        except BrokenProcessPool:
            self._replace(worker)
            if tries < MOST_TRIES:
                self.again.append((job, tries + 1))
                return None
            return JobResult(job, lost=f"the worker that did it died, and so did the next ({KILLED})")
        self.idle.append(worker)
        return JobResult(job, value)

    def _replace(self, dead: _Worker) -> None:
        dead.kill()
        self.everyone.remove(dead)
        worker = _Worker(self.work, dead.environment)
        self.everyone.append(worker)
        self.beginning[worker.set_up] = worker

    def leave(self) -> None:
        """End the processes, which have nothing to do any more."""
        for worker in self.everyone:
            worker.pool.shutdown(wait=True, cancel_futures=True)

    def kill(self) -> None:
        for worker in self.everyone:
            worker.kill()


# --- In the worker ----------------------------------------------------------------------------------------------------

_job: Callable[[Any], Any] | None = None


def _begin(environment: dict[str, str]) -> int:
    """Make a process a worker; its number."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C arrives at all processes of a terminal; one of them decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return os.getpid()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _set_up(set_up: Callable[[], Callable[[Any], Any]]) -> None:
    global _job
    _job = set_up()


def _do(job: Any) -> Any:
    assert _job is not None, "a worker is set up before it has a job"
    return _job(job)


# --- Where they are ---------------------------------------------------------------------------------------------------


def _context(imports: Sequence[str]) -> multiprocessing.context.BaseContext:
    """How processes are started: never by forking this one, which may have threads and a GPU in use.

    imports: for the server that is forked, if there is none yet.
    """
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(imports))
    return context


def _places(work: Work, count: int | None) -> list[dict[str, str]]:
    """The environment of each worker: which GPU it sees. count: how many there are to be; None: as many as fit."""
    kind, visible = _device(work.device)
    if kind == "cuda":
        many = len(visible) if count is None else count
        return [{VISIBLE: visible[number % len(visible)]} for number in range(many)]
    if kind == "mps":
        return [{}] * (count or 1)
    return [{}] * (count or _that_fit(work))


def _device(name: str) -> tuple[str, list[str]]:
    """The kind of device, and the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if name == "cpu":
        return "cpu", []
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        named = [one.strip() for one in os.environ.get(VISIBLE, "").split(",") if one.strip()]
        return "cuda", named if len(named) == count else [str(number) for number in range(count)]
    if name == "cuda":
        raise InputError("device 'cuda' is not available here: choose auto or cpu")
    return ("mps" if torch.backends.mps.is_available() else "cpu"), []


def _that_fit(work: Work) -> int:
    """One worker for each core that it computes on, as far as memory holds their models."""
    import psutil

    with contextlib.suppress(AttributeError):  # not on every system
        return _bounded(len(os.sched_getaffinity(0)) // work.threads, work.memory, psutil.virtual_memory().available)
    return _bounded((os.cpu_count() or 1) // work.threads, work.memory, psutil.virtual_memory().available)


def _bounded(count: int, needed: int | None, free: int) -> int:
    return max(1, count if not needed else min(count, free // needed))
