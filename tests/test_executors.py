"""The executor `local`: its conformance, how many workers there are, and what each sees."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from forked_program import own_server

from icekit import ComponentSettings
from icekit.builtin.executors import local
from icekit.plugins import PluginError, check_component
from icekit.protocols import InputError, Work
from icekit.testing import ExecutorUnderTest, parametrize_with_checks


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with own_server():
        yield


@parametrize_with_checks([ExecutorUnderTest(local.LocalExecutor, {}, "local")])
def test_conformance(check: Any, subject: Any) -> None:
    check(subject)


def places(work: Work, count: int | None = None) -> list[dict[str, str]]:
    return local._places(work, count)


def nothing() -> Any:
    raise AssertionError("no worker is set up here")


def test_a_worker_a_core_as_far_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10 * 2**30})())
    assert len(places(Work(nothing, "cpu"))) == 8
    assert len(places(Work(nothing, "cpu", threads=2))) == 4
    assert len(places(Work(nothing, "cpu", memory=3 * 2**30))) == 3
    assert len(places(Work(nothing, "cpu", memory=30 * 2**30))) == 1
    assert len(places(Work(nothing, "cpu", memory=30 * 2**30), count=5)) == 5


def test_a_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv(local.VISIBLE, raising=False)
    assert [one[local.VISIBLE] for one in places(Work(nothing))] == ["0", "1"]
    assert [one[local.VISIBLE] for one in places(Work(nothing), count=3)] == ["0", "1", "0"]
    monkeypatch.setenv(local.VISIBLE, "5,GPU-8f")  # as whoever started this process has it
    assert [one[local.VISIBLE] for one in places(Work(nothing, "cuda"))] == ["5", "GPU-8f"]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="device 'cuda' is not available here"):
        places(Work(nothing, "cuda"))


def test_settings_are_those_of_executors() -> None:
    class Own(ComponentSettings):
        """Not a subclass of ExecutorSettings."""

    with pytest.raises(PluginError, match=r"no subclass of icekit\.protocols\.ExecutorSettings"):
        check_component("executor", "own", type("Executor", (local.LocalExecutor,), {"Settings": Own}))
