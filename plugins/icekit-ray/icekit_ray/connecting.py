"""The connection to a cluster, or a Ray of this machine's own; what Ray prints stays out of standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.exceptions import RayError

from icekit.protocols import InputError, RunError
from icekit_ray.settings import AUTO, LOCAL

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
REACHED_S = 10.0
"""Seconds in which a cluster's address must answer."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray of its own: jobs and results are small."""
LONGEST_FOLDER = 40
"""Characters: the system limits a socket's path, and Ray's sockets are deep in its folder."""


@contextlib.contextmanager
def connected(address: str, cpus: int) -> Iterator[None]:
    """Be connected to a cluster within the block. A process that is connected already stays so, wherever that is.

    cpus: that a Ray of its own has.

    Raises:
        InputError: there is no such cluster, or it has another Ray or Python.
    """
    with _printing_nothing():
        if ray.is_initialized():
            yield
            return
        with contextlib.ExitStack() as kept:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            kept.callback(ray.shutdown)  # whatever is there when it fails
            with _own_sigterm():
                if address == LOCAL:
                    _start(cpus, kept, quiet)
                else:
                    _join(address, quiet)
            yield


def _join(address: str, quiet: dict[str, Any]) -> None:
    try:
        where = os.environ.get("RAY_ADDRESS", address) if address == AUTO else address
        if where != AUTO:  # Ray itself tries for minutes
            host, _, port = where.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_S).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, AssertionError, RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"executor.address {address!r}: no Ray can be reached there ({reason}); `ray start --head` starts one"
        ) from error


def _start(cpus: int, kept: contextlib.ExitStack, quiet: dict[str, Any]) -> None:
    """Start a Ray that listens on the loopback interface alone, in a folder that goes with it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    folder = tempfile.gettempdir() if len(tempfile.gettempdir()) < LONGEST_FOLDER else "/tmp"
    made = tempfile.TemporaryDirectory(prefix="icekit-ray-", dir=folder, ignore_cleanup_errors=True)
    kept.enter_context(made)
    kept.callback(ray.shutdown)  # before the folder goes
    try:
        # Ray puts the machine's address in the network in the place of 127.0.0.1, unless it is no Ray for clusters.
        with _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
            ray.init(
                address=LOCAL,
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                _temp_dir=made.name,
                **quiet,
            )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise RunError(f"Ray does not start: {' '.join(str(error).split())[:300]}") from error
    if {node["NodeManagerAddress"] for node in ray.nodes()} != {LOOPBACK}:
        raise RunError(f"Ray {ray.__version__} listens on more than {LOOPBACK}: start one yourself (executor.address)")


@contextlib.contextmanager
def _printing_nothing() -> Iterator[None]:
    """Ray prints what its daemons say on standard output, where results are: it becomes a line of the log."""

    def note(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            log.debug("ray (%s): %s", data.get("pid", ""), line)

    with _replaced(ray_worker, "print_to_stdstream", note):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray sets a handler of its own for SIGTERM: whoever had one keeps it."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
