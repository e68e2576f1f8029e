"""The executor against icekit's own checks, each with a Ray of its own: seconds to start."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from icekit.testing import parametrize_with_checks

pytest.importorskip("ray", reason="Ray is not installed: pip install icekit-ray")
pytestmark = pytest.mark.slow

from icekit_ray.executor import RayExecutor  # noqa: E402


@parametrize_with_checks([RayExecutor])
def test_conformance(check: Any, subject: Any) -> None:
    check(subject)


ALONE = """
import subprocess, sys
import psutil
from icekit.protocols import Work
from icekit.testing.jobs import SetUp
from icekit_ray.executor import RayExecutor

folder, ends = sys.argv[1:]
set_up = SetUp(folder, ends=((0, 1),))
for result in RayExecutor(RayExecutor.Settings(workers=1)).execute(Work(set_up, "cpu"), range(3)):
    assert result.value[0] == result.job**2, result
    processes = psutil.Process().children(recursive=True)
    for one in [psutil.Process(), *processes]:
        for socket in one.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                print("listens", one.name(), socket.laddr.ip, file=sys.stderr)
    if ends == "killed":
        print(*[one.pid for one in processes], file=sys.stderr)
        psutil.Process().kill()
"""


def alone(folder: Path, ends: str) -> subprocess.CompletedProcess[str]:
    script = folder / "alone.py"
    script.write_text(textwrap.dedent(ALONE))
    (folder / "work").mkdir()
    arguments = [sys.executable, str(script), str(folder / "work"), ends]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=200)


def test_it_prints_nothing_and_others_cannot_reach_it(tmp_path: Path) -> None:
    made = alone(tmp_path, "well")  # though a worker dies, of which Ray has much to say
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    addresses = {line.split()[-1] for line in made.stderr.splitlines() if line.startswith("listens")}
    assert addresses and addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}, made.stderr


def test_it_ends_with_a_program_that_is_killed(tmp_path: Path) -> None:
    made = alone(tmp_path, "killed")
    assert made.returncode == -9, made.stderr
    workers = {int(one.name.removeprefix("worker-")) for one in (tmp_path / "work").glob("worker-*")}
    processes = {int(word) for word in made.stderr.splitlines()[-1].split()}
    assert workers & processes and len(processes) > 3
    assert not left(workers, 10)
    assert not left(processes, 120)  # Ray's own helpers see what happened, and take a minute to go


def left(processes: set[int], seconds: float) -> list[psutil.Process]:
    _, alive = psutil.wait_procs([psutil.Process(one) for one in processes if psutil.pid_exists(one)], seconds)
    return list(alive)
