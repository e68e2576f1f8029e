"""A fuzzer on what icekit reads of other people's making.

    pip install atheris
    python tests/hostile/fuzz.py picture -max_total_time=600
    python tests/hostile/fuzz.py run -max_total_time=600

Each target takes a file's bytes and reads them (True) or refuses them by an ``InputError`` of one line (False):
everything else is a finding, which libFuzzer leaves as a ``crash-*`` file. What was found once belongs into
``corpus/TARGET/``: the fuzzer starts from there as well, and ``test_corpus.py`` reads it.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CORPUS = Path(__file__).with_name("corpus")


def picture(data: bytes) -> bool:
    """``load_image`` on a picture file."""
    from icekit import InputError
    from icekit.run.images import load_image

    path = _scratch() / "picture"
    path.write_bytes(data)
    try:
        found = load_image(path)
    except InputError as error:
        return _one_line(error)
    assert found.picture.mode == "RGB", found.picture.mode
    return True


def run(data: bytes) -> bool:
    """A run directory of which one file is replaced: the first byte says which."""
    from icekit import Extraction, InputError, export

    names = ("manifest.json", "settings.toml", "embeddings.safetensors", "log.jsonl", "image.png", "masks/0-cup.png")
    folder = _whole_run()
    name = names[data[0] % len(names)] if data else names[0]
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(data[1:])
    (folder / "report.html").unlink(missing_ok=True)
    try:
        found = Extraction.open(folder)
        found.settings()
        for concept in found.concepts:
            concept.mask()
        export(folder, "report")
    except InputError as error:
        return _one_line(error)
    finally:
        (folder / name).write_bytes(before)
    return True


def checkpoint(data: bytes) -> bool:
    """A learner's checkpoint."""
    from icekit import InputError
    from icekit.run.directory import FileCheckpoint

    path = _scratch() / "learner.safetensors"
    path.write_bytes(data)
    try:
        FileCheckpoint(path).load()
    except InputError as error:
        return _one_line(error)
    return True


def settings(data: bytes) -> bool:
    """A settings file."""
    from icekit import InputError, load_settings

    path = _scratch() / "settings.toml"
    path.write_bytes(data)
    try:
        load_settings(path)
    except InputError as error:
        return _one_line(error)
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {one.__name__: one for one in (picture, run, checkpoint, settings)}


def _one_line(error: Exception) -> bool:
    message = str(error)
    assert message.strip() and "\n" not in message and len(message) < 2000, message[:3000]
    return False


@cache
def _scratch() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="icekit-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _whole_run() -> Path:
    """A small run directory, made by hand: what a target breaks, it puts back."""
    import torch
    from safetensors.torch import save_file

    folder = _scratch() / "run"
    for name in ("masks", "embeddings"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (32, 32), "white").save(folder / "image.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).save(folder / "masks/0-cup.png")
    tokens = {"category": "<cup-0>", "instance": "<cup-0-instance>"}
    save_file({token: torch.zeros(8) for token in tokens.values()}, folder / "embeddings.safetensors")
    (folder / "settings.toml").write_text("seed = 0\n")
    (folder / "log.jsonl").write_text('{"step": 1, "total": 1, "phase": "object", "losses": {"total": 1.0}}\n')
    concept = {"index": 0, "label": "cup", "score": 0.5, "mask": "masks/0-cup.png", "area": 0.25, "tokens": tokens}
    concept |= {"words": {}, "described": {}, "words_alone": {}}
    manifest = {
        "schema_version": 2,
        "icekit_version": "0.1.0",
        "image": {"source": "cup.png", "sha256": "0" * 64, "width": 32, "height": 32, "fitted": {}},
        "presets": [],
        "components": {"backbone": "sd21", "retriever": "clip", "segmentor": "xattn", "learner": "ice"},
        "backbone": {"identity": "a model", "rows": {"clip_l": 8}},
        "attributes": [],
        "seed": 0,
        "concepts": [concept],
        "learning_steps": 1,
        "timings": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _whole_checkpoint() -> bytes:
    import torch

    from icekit.run.directory import FileCheckpoint

    path = _scratch() / "whole.safetensors"
    FileCheckpoint(path).save({"row": torch.zeros(8)}, {"done": 3})
    return path.read_bytes()


def seeds() -> dict[str, list[bytes]]:
    """Where a fuzzer starts: files that are right, of every kind that a target takes."""
    buffers = []
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3))
    kinds = {"PNG": {}, "JPEG": {}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}, "GIF": {}, "WEBP": {}, "PPM": {}}
    for kind, options in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        buffers.append(buffer.getvalue())
    folder = _whole_run()
    files = ("manifest.json", "settings.toml", "embeddings.safetensors", "log.jsonl", "image.png", "masks/0-cup.png")
    return {
        "picture": buffers,
        "run": [bytes([place]) + (folder / name).read_bytes() for place, name in enumerate(files)],
        "checkpoint": [_whole_checkpoint()],
        "settings": [b'seed = 3\nerase = "black"\n[components]\nlearner = "ice"\n[learner]\nsteps = 4\n'],
    }


def main() -> None:
    """Fuzz one target."""
    import atheris

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer's options]")
    target = sys.argv.pop(1)
    with atheris.instrument_imports(include=["icekit", "PIL"]):
        import icekit.report.exporter
        import icekit.run.extraction
        import icekit.run.images  # noqa: F401
    start = Path(tempfile.mkdtemp(prefix="icekit-corpus-"))
    for number, data in enumerate(seeds()[target]):
        (start / str(number)).write_bytes(data)
    known = CORPUS / target
    atheris.Setup(
        [*sys.argv, str(start), *([str(known)] if known.is_dir() else [])], lambda data: TARGETS[target](data) and None
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
