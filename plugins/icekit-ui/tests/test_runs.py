"""The folder of runs: what is in it, and that nothing outside of it is read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from icekit_ui.runs import PICTURES, Runs, slug
from PIL import Image

from icekit import InputError

PICTURE = Image.new("RGB", (40, 32), "teal")


def write_run(folder: Path, *, complete: bool = True) -> Path:
    """What the list looks at of a run."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / ("manifest.json" if complete else "checkpoint/run.json")).write_text("{}")
    (folder / "samples").mkdir()
    PICTURE.save(folder / "image.png")
    PICTURE.save(folder / "samples" / "0-object-0.png")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    secret = write_run(tmp_path / "secret")
    folder = tmp_path / "runs"
    write_run(folder / "photo")
    write_run(folder / "begun", complete=False)
    (folder / "other").mkdir()
    (folder / "linked").symlink_to(secret)
    return Runs(folder)


def test_what_is_listed(runs: Runs) -> None:
    os.utime(runs.folder / "begun", (2e9, 2e9))
    assert [(run.name, run.complete) for run in runs.all()] == [("begun", False), ("photo", True)]


@pytest.mark.parametrize(
    "name",
    ["linked", "other", "..", ".", "", "../secret", "photo/", "/etc", "photo/../photo", "nothing", 0, None, ["photo"]],
)
def test_only_a_run_of_the_folder_is_found(runs: Runs, name: Any) -> None:
    with pytest.raises(InputError, match="there is no run"):
        runs.find(name)


def test_pictures_are_read_where_no_link_is_on_the_way(runs: Runs, tmp_path: Path) -> None:
    photo = runs.find("photo").path
    read = runs.read_picture(photo, "samples/0-object-0.png")
    assert read is not None and read.size == (40, 32)
    (photo / "leak.png").symlink_to(tmp_path / "secret" / "image.png")
    (photo / "attention").symlink_to(tmp_path / "secret" / "samples")
    os.mkfifo(photo / "pipe.png")
    (photo / "broken.png").write_bytes(b"\x89PNG no picture")
    for name in (
        "leak.png", "attention/0-object-0.png", "pipe.png", "broken.png", "nothing.png", "samples",
        "../../secret/image.png", str(tmp_path / "secret" / "image.png"),
    ):  # fmt: skip
        assert runs.read_picture(photo, name) is None, name
    assert runs.read_picture(tmp_path / "secret", "image.png") is None
    assert runs.read_picture(runs.folder / "linked", "image.png") is None
    assert runs.names(photo, "attention") == []
    assert runs.names(photo, "samples") == ["samples/0-object-0.png"]


def test_a_picture_of_another_format_is_not_opened(runs: Runs) -> None:
    photo = runs.find("photo").path
    (photo / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert runs.read_picture(photo, "image.png") is None


def test_lines_that_are_half_written_are_passed_over(runs: Runs) -> None:
    photo = runs.find("photo").path
    (photo / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n[]\n{"step": 2, "lo')
    assert runs.lines(photo, "log.jsonl") == [{"step": 1}]


def test_new_runs_have_names_of_their_own(runs: Runs) -> None:
    names = [runs.new("Photo", PICTURE).name for _ in range(3)]
    assert names == ["photo-2", "photo-3", "photo-4"]
    assert runs.picture_of("photo-2") == runs.folder / PICTURES / "photo-2.png"
    assert runs.picture_of("photo") is None
    assert [slug(one) for one in ("Été à Paris!", "../../etc", "日本", "a" * 90)] == [
        "ete-a-paris", "etc", "picture", "a" * 40,
    ]  # fmt: skip


def test_a_link_in_the_place_of_its_own_folders_is_refused(runs: Runs, tmp_path: Path) -> None:
    (runs.folder / PICTURES).symlink_to(tmp_path / "secret")
    (runs.folder / "mixes").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a symbolic link"):
        runs.new("photo", PICTURE)
    with pytest.raises(InputError, match="is a symbolic link"):
        runs.new_mix("a photo")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--runs"):
        Runs(tmp_path / "file")
