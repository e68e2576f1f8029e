"""How many workers there are, and what each takes of the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from icekit.protocols import Work

pytest.importorskip("ray", reason="Ray is not installed: pip install icekit-ray")

from icekit_ray.actor import last_words
from icekit_ray.executor import RayExecutor, _room

GIB = 2**30
SMALL: dict[str, float] = {"CPU": 4.0, "memory": 8.0 * GIB}
LARGE: dict[str, float] = {"CPU": 8.0, "GPU": 2.0, "memory": 64.0 * GIB}


def room(
    nodes: list[dict[str, float]], settings: dict[str, Any] | None = None, **work: Any
) -> tuple[int, dict[str, float]]:
    values = RayExecutor.Settings(**(settings or {}))
    return _room(Work(lambda: lambda job: job, **work), values, nodes)


def test_a_worker_a_gpu_where_there_are_some() -> None:
    assert room([SMALL, LARGE, LARGE]) == (4, {"num_cpus": 1.0, "num_gpus": 1.0})
    assert room([SMALL, LARGE], {"gpus": 0.5})[0] == 4
    assert room([SMALL], device="cuda") == (1, {"num_cpus": 1.0, "num_gpus": 1.0})  # a cluster may grow


def test_a_worker_a_core_as_far_as_memory_holds() -> None:
    assert room([SMALL, SMALL]) == (8, {"num_cpus": 1.0, "num_gpus": 0.0})
    assert room([SMALL, LARGE], device="cpu") == (12, {"num_cpus": 1.0, "num_gpus": 0.0})
    assert room([SMALL, SMALL], threads=3)[0] == 2
    assert room([SMALL, LARGE], device="cpu", memory=3 * GIB)[0] == 2 + 8
    assert room([SMALL], memory=30 * GIB) == (1, {"num_cpus": 1.0, "num_gpus": 0.0, "memory": 8.0 * GIB})


def test_as_many_as_are_asked_for() -> None:
    assert room([SMALL], {"workers": 9}, memory=30 * GIB) == (9, {"num_cpus": 1.0, "num_gpus": 0.0})


def test_the_end_of_a_log(tmp_path: Any) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":job_id:01\n:actor_name:Worker\n" + "".join(f"line  {number}\n\n" for number in range(9)))
    assert last_words(str(log)) == "line 4 / line 5 / line 6 / line 7 / line 8"
    assert last_words(str(tmp_path / "none")) == ""
