"""`icekit batch` on a real cluster of two nodes on this machine, of which one is lost, and workers are killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_components as plain
import psutil
import pytest
from icekit_process import ROOT, environment, icekit, start
from PIL import Image

from icekit import BatchResult, InputError, Settings, extract_batch, plugins
from icekit.plugins import Choice

pytest.importorskip("ray", reason="Ray is not installed: pip install icekit-ray")
pytestmark = pytest.mark.slow

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from icekit.batch import Progress  # noqa: E402

SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
PICTURES = 12
PLAIN = ROOT / "tests" / "plain_components.py"
RUN = {"sample_steps": 1, "exporters": [], "max_concepts": 1, "learner": {"steps": 8, "pause": 0.05}}


@pytest.fixture
def nodes() -> Iterator[tuple[Cluster, Any]]:
    """A cluster, and the node that is not its head; each has room for one worker."""
    cluster = Cluster(initialize_head=True, head_node_args=SMALL)
    try:
        second = cluster.add_node(**{key: value for key, value in SMALL.items() if key != "include_dashboard"})
        cluster.wait_for_nodes()
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in a folder, which is the working directory."""
    (tmp_path / "photos").mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (48, 48), (20 * number, 90, 60)).save(tmp_path / "photos" / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icekit.plugins.sources._chosen", None)
    plugins.installed.cache_clear()
    return tmp_path


def batch(out: str, executor: str, *files: Path, learner: str = "plain", **options: Any) -> BatchResult:
    plugins.choose(Choice(files=(PLAIN, *files)))
    settings = Settings(components=plain.NAMES | {"learner": learner}, **RUN)
    return extract_batch("photos", out, settings, executor=executor, **options)


def tokens(out: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in out.glob("runs/*/embeddings.safetensors")}


def workers() -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter(["cmdline"]):
        if (one.info["cmdline"] or [""])[0].startswith("ray::Worker"):
            found.append(one)
    return found


def test_a_worker_is_killed_and_a_node_is_lost(
    place: Path, nodes: tuple[Cluster, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    cluster, second = nodes
    happened: list[str] = []
    seen: set[int] = set()

    def interfere(progress: Progress) -> None:
        seen.update(one.pid for one in workers())
        if progress.done == 2 and not happened:
            first = [one for one in workers() if raylet_of(one) != raylet_pid(second)]
            happened.append(f"killed {first[0].pid}")
            os.kill(first[0].pid, signal.SIGKILL)
        if progress.done == 6 and len(happened) == 1:
            happened.append("node removed")
            assert any(raylet_of(one) == raylet_pid(second) for one in workers()), "it is at work there"
            cluster.remove_node(second, allow_graceful=False)

    made = batch("ray", "ray", executor_settings={"address": cluster.address}, on_progress=interfere)
    assert len(happened) == 2, happened
    assert not made.failures and len(made.done) == PICTURES
    assert len(seen) >= 3, "two workers, and one in the place of the one that was killed"
    assert "raylet" not in capfd.readouterr().out
    assert not workers()

    batch("local", "local", executor_settings={"workers": 1})
    assert len(tokens(place / "local")) == PICTURES
    assert tokens(place / "ray") == tokens(place / "local")


def raylet_of(process: psutil.Process) -> int | None:
    return process.ppid()


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


FAILING = """
import os, signal, sys
import plain_components as plain
from icekit import hookimpl

class Failing(plain.PlainLearner):
    '''Ends its process for one picture, and fails for another.'''

    def learn(self, image, *arguments, **options):
        red = round(float(image[0].mean()) * 255)
        if red == 20:
            print("the GPU has fallen off the bus", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if red == 40:
            raise ValueError("NaN in the loss")
        return super().learn(image, *arguments, **options)

@hookimpl
def register_learners(register):
    register("failing", Failing)
"""


def test_what_a_failed_picture_left_in_its_log(place: Path, nodes: tuple[Cluster, Any]) -> None:
    file = place / "failing.py"
    file.write_text(f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n" + FAILING)
    made = batch("made", "ray", Path("failing.py"), learner="failing", executor_settings={"address": nodes[0].address})
    failures = {
        one["name"]: one for one in map(json.loads, (place / "made" / "failures.jsonl").read_text().splitlines())
    }
    assert len(made.done) == PICTURES - 2 and failures.keys() == {"01", "02"}
    assert failures["01"]["stage"] == "worker" and failures["02"]["stage"] == "learn"
    assert "died, and so did the one before" in failures["01"]["error"]
    assert failures["01"]["error"].endswith("the GPU has fallen off the bus"), failures["01"]
    assert "ValueError: NaN in the loss" in failures["02"]["error"]


def test_a_worker_with_another_version_is_refused(place: Path) -> None:
    """Before the first picture; and a plugin that a machine lacks likewise."""
    source = f"import sys; sys.path.append({str(ROOT / 'tests')!r})\nfrom plain_components import *\n"
    here, there = (
        plain.write_distribution(place / f"v{version}", "plain_plugin", source, name="plain-plugin", version=version)
        for version in ("1.0", "2.0")
    )
    cluster = Cluster(initialize_head=True, head_node_args=SMALL | {"env_vars": environment(here)})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=environment(there))
        cluster.wait_for_nodes()
        options = ["--executor", "ray", "--set", f"executor.address={cluster.address}", *plain.OPTIONS]
        made = icekit(["batch", "photos", "--out", "made", *options], place, here)
        assert (made.returncode, made.stdout) == (2, ""), made.stderr
        assert "of plain-plugin 2.0 there, and of plain-plugin 1.0 where the work was started" in made.stderr
        assert "Traceback" not in made.stderr
        assert not list((place / "made").glob("runs/*/*"))
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "auto"])
def test_a_cluster_that_is_not_there(address: str, place: Path) -> None:
    wait_for_the_end_of_raylets()  # of the tests before: "auto" would find them
    options = ["--executor", "ray", "--set", f"executor.address={address}", "--plugin-file", PLAIN, *plain.OPTIONS]
    made = icekit(["batch", "photos", "--out", "made", *options], place)
    assert (made.returncode, made.stdout) == (2, ""), made.stderr
    assert "no Ray can be reached there" in made.stderr and "Traceback" not in made.stderr


def wait_for_the_end_of_raylets() -> None:
    _, alive = psutil.wait_procs(raylets(), timeout=120)
    assert not alive, "this test needs a machine on which no Ray runs: `ray stop` ends one"


def raylets() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["name"]) if one.info["name"] in ("raylet", "gcs_server")]


def test_a_cluster_with_less_room_than_was_asked_for(
    place: Path, nodes: tuple[Cluster, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And in a process that is connected to it already, and stays so."""
    ray.init(address=nodes[0].address, log_to_driver=False)
    made = batch("made", "ray", executor_settings={"workers": 3, "wait": 8})
    assert len(made.done) == PICTURES and ray.is_initialized()
    assert "the cluster has room for 2 workers, and none for 1 more" in caplog.text
    with pytest.raises(InputError, match="no room for a worker, which needs 1 CPU and 1 GPU"):
        batch("none", "ray", executor_settings={"gpus": 1, "wait": 4})


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_it_is_ended_and_started_again(how: signal.Signals, place: Path) -> None:
    """On a Ray of its own, which ends with it; the tokens are those of a batch that nobody disturbed."""
    quick = ["--set", "sample_steps=1", "--set", "exporters=[]", "--max-concepts", "1", "--plugin-file", PLAIN]
    common = ["batch", "photos", *plain.OPTIONS, *quick]
    slow = [*common, "--out", "made", "--executor", "ray", "--workers", "2", "--set", "learner.pause=0.1"]
    process = start(slow, place)
    assert process.stderr is not None
    for line in process.stderr:
        if "2 done" in line:
            break
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert sum(one.name().startswith("ray::Worker") for one in helpers) == 2
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how) and not out, err
    at_work = [one for one in helpers if is_worker(one)] if how == signal.SIGKILL else helpers
    assert not psutil.wait_procs(at_work, 20)[1]
    done = {file: file.stat().st_mtime_ns for file in (place / "made").glob("runs/*/manifest.json")}
    assert 2 <= len(done) < PICTURES

    again = icekit(slow, place)
    assert again.returncode == 0 and again.stdout.startswith(f"{PICTURES} pictures: {PICTURES} done"), again.stderr
    assert all(file.stat().st_mtime_ns == at for file, at in done.items()), "what was done stays"
    local = icekit([*common, "--out", "local", "--workers", "1"], place)
    assert local.returncode == 0, local.stderr
    assert tokens(place / "made") == tokens(place / "local")


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::Worker")
    except psutil.NoSuchProcess:
        return False
