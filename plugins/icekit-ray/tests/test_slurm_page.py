"""The plugin of the page on Slurm, run by submitit's executor for this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plain_components as plain
import pytest
from icekit_process import ROOT, icekit
from PIL import Image

pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
pytestmark = pytest.mark.slow

QUICK = ["--set", "learner.steps=6", "--set", "sample_steps=1", "--set", "exporters=[]", "--max-concepts", "1"]
KILLING = """
import os, signal, sys
import plain_components as plain
from icekit import hookimpl

class Killing(plain.PlainLearner):
    '''Ends its process for one picture.'''

    def learn(self, image, *arguments, **options):
        if round(float(image[0].mean()) * 255) == 60:
            print("out of luck", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().learn(image, *arguments, **options)

@hookimpl
def register_learners(register):
    register("killing", Killing)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    page = (ROOT / "docs" / "slurm.md").read_text()
    [source] = re.findall(r'```python title="slurm.py"\n(.*?)```', page, re.DOTALL)
    (tmp_path / "slurm.py").write_text(source)
    (tmp_path / "killing.py").write_text(f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n" + KILLING)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (48, 48), (20 * number, 90, 60)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def tokens(out: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in out.glob("runs/*/embeddings.safetensors")}


def test_a_batch_by_submitit(place: Path) -> None:
    files = [word for name in ("slurm.py", "killing.py", ROOT / "tests" / "plain_components.py")
             for word in ("--plugin-file", name)]  # fmt: skip
    common = ["batch", "photos", *files, *plain.OPTIONS[:3], "--learner", "killing", *QUICK]
    slurm = ["--executor", "slurm", "--workers", "2", "--set", "executor.cluster=local", "--set", "executor.share=3"]
    made = icekit([*common, *slurm, "--set", "executor.gpus=0", "--out", "slurm"], place)
    assert made.returncode == 1, made.stderr
    assert made.stdout.splitlines()[0] == "5 pictures: 4 done, 1 failed: slurm/failures.jsonl", made.stderr
    [failure] = map(json.loads, (place / "slurm" / "failures.jsonl").read_text().splitlines())
    assert (failure["name"], failure["stage"]) == ("3", "worker") and "out of luck" in failure["error"]

    local = icekit([*common, "--workers", "1", "--out", "local"], place)
    assert local.returncode == 1, local.stderr
    assert len(tokens(place / "slurm")) == 4 and tokens(place / "slurm") == tokens(place / "local")

    wrong = icekit([*common, *slurm, "--out", "wrong", "--set", "executor.share=0"], place)
    assert wrong.returncode == 2 and "executor.share" in wrong.stderr
