"""Programs in processes of their own that need not import torch: they are forked from one that has.

Importing torch, diffusers and the like takes longer than what most commands of the documents do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import site
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = ["torch", "diffusers", "transformers", "open_clip", "peft", "ot", "skimage.segmentation", "pytest"]
"""What the process that is forked has imported; icekit itself and its plugins are not among it."""


@contextlib.contextmanager
def own_server() -> Iterator[None]:
    """Processes within the block are forked from another server than those of other tests, with other imports."""
    stop: Callable[[], None] = forkserver._forkserver._stop  # type: ignore[attr-defined]
    stop()
    try:
        yield
    finally:
        stop()


def run(module: str, arguments: Sequence[str], cwd: Path, packages: Path, timeout: float = 280) -> tuple[int, str]:
    """Run ``python -m MODULE ARGUMENTS`` in ``cwd``; the exit status, and what was printed.

    packages: a folder of installed distributions, beside those of this environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    out = packages / "printed.txt"
    process = context.Process(target=_run, args=(module, list(arguments), str(cwd), str(packages), str(out)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode, out.read_text(encoding="utf-8", errors="replace")


def _run(module: str, arguments: list[str], cwd: str, packages: str, out: str) -> None:
    printed = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(printed, stream)
    for key in [key for key in os.environ if key.startswith("PYTEST_")]:
        del os.environ[key]
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    site.addsitedir(packages)
    if module != "icekit":  # its script does not look into the working directory, and python -m does
        sys.path.insert(0, cwd)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
