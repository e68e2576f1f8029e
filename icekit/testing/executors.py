"""The conformance checks of ``icekit.protocols.Executor``; ``icekit.testing`` says how they are used.

They start real workers, two at a time, and end some of them. What workers do here writes files into a temporary folder:
they must see the folders of this machine.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from icekit.protocols import InputError, JobResult, RunError, Work
from icekit.testing import components
from icekit.testing.asserting import kind_of
from icekit.testing.jobs import SetUp
from icekit.testing.scenes import two_objects
from icekit.testing.subjects import ExecutorUnderTest

DEADLINE_S = 60.0
"""Seconds until a worker that is to end has ended."""
MANY = 1_000
"""Jobs of which few are done."""


def check_every_job_is_done(subject: ExecutorUnderTest) -> None:
    """Each job is done once and comes back with what it gave; a worker is set up once, and ends when all is done."""
    with _folder() as folder:
        set_up = SetUp(folder)
        results = _all(subject, set_up, range(12))
        _are_squares(results, range(12))
        counts = {number: len(list(Path(folder).glob(f"tried-{number}-*"))) for number in range(12)}
        twice = [number for number, count in counts.items() if count != 1]
        assert not twice, f"job {twice[0]} was done {counts[twice[0]]} times, and should be done once"
        did = {result.value[1] for result in results}
        assert did <= set_up.workers, "a job was done by a process that was not set up"
        assert len(set_up.workers) <= 2, f"asked for two workers it has set up {len(set_up.workers)}"
        _have_ended(set_up, "all jobs were done")


def check_no_jobs(subject: ExecutorUnderTest) -> None:
    """There may be nothing to do."""
    with _folder() as folder:
        assert _all(subject, SetUp(folder), []) == [], "without a job there is a result"


def check_jobs_are_taken_as_needed(subject: ExecutorUnderTest) -> None:
    """Jobs are asked for as workers become free: there may be a million of them. Closed, it leaves no worker behind."""
    with _folder() as folder:
        taken: list[int] = []

        def jobs() -> Iterator[int]:
            for number in range(MANY):
                taken.append(number)
                yield number

        set_up = SetUp(folder, pause=0.02)
        results = _execute(subject, set_up, jobs())
        with contextlib.closing(results):
            for _ in range(3):
                next(results)
        assert len(taken) < MANY, f"after three results all of {MANY} jobs were asked for"
        _have_ended(set_up, "it was closed")


def check_set_up_that_fails(subject: ExecutorUnderTest) -> None:
    """What a worker's set-up raises is raised, with its message, and no job is done."""
    with _folder() as folder:
        message = "setting 'x' cannot be 'y'"
        try:
            _all(subject, SetUp(folder, refuse=message), range(3))
        except InputError as error:
            assert message in str(error), f"the message is {str(error)!r}, and should say {message!r}"
        except Exception as error:
            raise AssertionError(f"an InputError of set-up is raised as {kind_of(error)}: {error}") from error
        else:
            raise AssertionError("an InputError of set-up is not raised")
        assert not list(Path(folder).glob("tried-*")), "a job was done by a worker whose set-up failed"


def check_lost_workers(subject: ExecutorUnderTest) -> None:
    """A job whose worker dies is tried once more; if that one dies, too, it comes back as lost. The others go on."""
    with _folder() as folder:
        set_up = SetUp(folder, ends=((2, 1), (4, 9)))
        results = _all(subject, set_up, range(8))
        lost = [result.job for result in results if result.lost is not None]
        assert lost == [4], f"of a job whose worker died once and one whose workers all died, lost are {lost}"
        _are_squares([result for result in results if result.lost is None], [0, 1, 2, 3, 5, 6, 7])
        tried = len(list(Path(folder).glob("tried-4-*")))
        assert tried == 2, f"a job whose worker dies was tried {tried} times; it should be tried twice"
        _have_ended(set_up, "all jobs were done")


def check_one_worker_that_is_lost(subject: ExecutorUnderTest) -> None:
    """One worker is enough, and is replaced when it dies."""
    with _folder() as folder:
        results = _all(subject, SetUp(folder, ends=((0, 1),)), range(3), workers=1)
        _are_squares(results, range(3))


def _folder() -> Any:
    return tempfile.TemporaryDirectory()


def _execute(
    subject: ExecutorUnderTest, set_up: SetUp, jobs: Any, workers: int = 2
) -> Generator[JobResult, None, None]:
    settings = subject.settings_for(two_objects()).model_copy(update={"workers": workers})
    results: Generator[JobResult, None, None] = subject.component(settings).execute(Work(set_up, "cpu"), jobs)
    return results


def _all(subject: ExecutorUnderTest, set_up: SetUp, jobs: Sequence[int], workers: int = 2) -> list[JobResult]:
    try:
        results = list(_execute(subject, set_up, jobs, workers))
    except RunError as error:
        raise AssertionError(f"it gives up: {error}") from error
    for one in results:
        assert isinstance(one, JobResult), f"a result is {kind_of(one)}, no icekit.protocols.JobResult"
    return results


def _are_squares(results: Sequence[JobResult], numbers: Sequence[int]) -> None:
    jobs = sorted(result.job for result in results)
    assert jobs == list(numbers), f"of the jobs {list(numbers)} came back {jobs}"
    for result in results:
        assert result.lost is None, f"job {result.job} is lost: {result.lost}"
        assert result.value[0] == result.job**2, f"job {result.job} came back with {result.value[0]}, another one's"


def _have_ended(set_up: SetUp, when: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while left := [process for process in set_up.workers if _is_alive(process)]:
        assert time.monotonic() < deadline, f"process {left[0]} of a worker is still there after {when}"
        time.sleep(0.02)


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


CHECKS = (
    *components.CHECKS,
    check_no_jobs,
    check_every_job_is_done,
    check_jobs_are_taken_as_needed,
    check_set_up_that_fails,
    check_lost_workers,
    check_one_worker_that_is_lost,
)
"""All checks of an executor, cheap ones first."""
