"""Runs and batches go to the hub and come from it: over HTTP, with a hub of the tests' own on this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import plain_components as plain
import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from icekit_process import in_this_process
from PIL import Image

from icekit import ConceptLibrary, Extraction, InputError, extract, load_settings
from icekit.run.compose import split_reference
from icekit.run.hub import HubRun, parse

Icekit = Callable[..., tuple[int, str, str]]
NAMES = {**plain.NAMES, "retriever": "embedding"}
OPTIONS = {
    "components": NAMES, "samples": 0, "learner": {"steps": 2}, "max_concepts": 1, "attributes": ["colour"],
    "exporters": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    extract(Image.new("RGB", (40, 40), "red"), folder / "run", load_settings(options=OPTIONS),
            installed=plain.beside_builtins())  # fmt: skip
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    disable_progress_bars()  # as the program does when it starts
    with hub_server.serving(monkeypatch, str(tmp_path / "hub-cache")) as hub:
        yield hub
    enable_progress_bars()


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Icekit:
    return in_this_process(tmp_path, monkeypatch, capsys)


def shown(run: Path) -> list[str]:
    """The files of a run that others see: all in its record but what is hidden."""
    return [name for name in json.loads((run / "manifest.json").read_text())["files"] if not name.startswith(".")]


def test_a_run_there_and_back(hub: hub_server.Hub, icekit: Icekit, run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "secret.safetensors").symlink_to("/etc/hostname")
    code, out, err = icekit("push", "run", "user/photo", "--private")
    assert code == 0, err
    files = hub.repositories["user/photo"]
    own = shown(run)
    assert set(files) == {*own, ".gitattributes"} and hub.private["user/photo"]
    assert all(files[name] == (run / name).read_bytes() for name in own)
    assert out == f"hub:user/photo\t{hub.url}/user/photo\t{len(own)} files\n"
    card = run.parent / "card.md"
    card.write_bytes(files["README.md"])
    assert "icekit" in (ModelCard.load(card).data.tags or [])

    back = Extraction.open("hub:user/photo")
    here = Extraction.open(run)
    assert back.manifest == here.manifest and back.run_dir != here.run_dir
    for one, other in zip(back.concepts, here.concepts, strict=True):
        assert (one.mask() == other.mask()).all()
        assert all((rows["clip_l"] == other.embeddings[part]["clip_l"]).all() for part, rows in one.embeddings.items())
    code, out, err = icekit("find", "cup", "hub:user/photo", "--page", "found.html", "--json")
    assert code == 0 and json.loads(out)["found"][0]["reference"] == "hub:user/photo:0"
    assert "data:image/" in Path("found.html").read_text()
    code, _, err = icekit("compose", "a {a}", "a=hub:user/photo:cup", "--n", "1", "--out", "composed")
    assert code == 0, err
    code, _, err = icekit("report", "hub:user/photo")
    assert code == 2 and "hub:user/photo is in the hub's cache, where nothing is written: give --out DIR" in err
    code, out, err = icekit("report", "hub:user/photo", "--out", "page")
    assert code == 0 and Path("page/report.html").is_file()


def test_it_is_read_again_without_the_hub(
    hub: hub_server.Hub, icekit: Icekit, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert icekit("push", "run", "user/photo")[0] == 0
    first = Extraction.open("hub:user/photo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert Extraction.open("hub:user/photo").manifest == first.manifest and len(hub.requests) == asked
    code, _, err = icekit("find", "cup", "hub:user/other")
    assert code == 2 and err.startswith("icekit: hub:user/other: the Hugging Face hub does not give it: offline")
    assert err.count("\n") == 1
    code, _, err = icekit("push", "run", "user/photo")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err and err.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    code, _, err = icekit("push", "run", "user/photo")
    assert code == 1 and "user/photo cannot be pushed to" in err and err.count("\n") == 1


def test_what_a_push_replaces_and_what_it_leaves(hub: hub_server.Hub, icekit: Icekit, run: Path) -> None:
    assert icekit("push", "run", "user/photo")[0] == 0
    hub.repositories["user/photo"] |= {"LICENSE": b"mine", "masks/7-griffin.png": b"of a run before"}
    assert icekit("push", "run", "user/photo")[0] == 0
    files = hub.repositories["user/photo"]
    assert "LICENSE" in files and "masks/7-griffin.png" not in files and "manifest.json" in files
    hub.repositories["user/model"] = {"unet/model.safetensors": b"somebody's"}
    code, _, err = icekit("push", "run", "user/model")
    assert code == 2 and "user/model has files in it, and no run or batch of icekit's" in err
    assert hub.repositories["user/model"] == {"unet/model.safetensors": b"somebody's"}
    for wrong, status in (("photo", 2), ("../photo", 2), ("user/photo/more", 2)):
        code, _, err = icekit("push", "run", wrong)
        assert code == status and "write user/name" in err
    hub.refuses = True
    code, _, err = icekit("push", "run", "user/photo")
    assert code == 2 and "log in with `hf auth login`" in err and err.count("\n") == 1
    (run / "manifest.json").unlink()
    code, _, err = icekit("push", "run", "user/photo")
    assert code == 2 and "is not a run directory" in err


def test_a_batch_there_and_back(hub: hub_server.Hub, icekit: Icekit, run: Path, tmp_path: Path) -> None:
    from icekit.batch.directory import BatchDirectory
    from icekit.batch.record import BatchRecord, PictureRecord

    batch = tmp_path / "batch"
    pictures = [PictureRecord(name=name, source=f"/home/me/{name}.png") for name in ("cat", "dog", "not-yet")]
    record = BatchRecord(
        icekit_version="0", settings={}, settings_hash="0", executor="local", threads=1, pictures=pictures
    )
    directory = BatchDirectory(batch)
    directory.save_record(record)
    for name in ("cat", "dog"):
        shutil.copytree(run, batch / "runs" / name)
    (batch / "runs" / "notes.txt").write_text("mine")
    code, out, err = icekit("push", "batch", "user/many")
    assert code == 0 and out.startswith("hub:user/many\t"), err
    files = hub.repositories["user/many"]
    assert {"README.md", "batch.json", "runs/cat/manifest.json", "runs/dog/README.md"} <= set(files)
    assert "runs/notes.txt" not in files and "written.jsonl" not in files
    library = ConceptLibrary("hub:user/many", installed=plain.beside_builtins())
    found = library.find("cup")
    assert [one.reference for one in found][:2] == ["hub:user/many/runs/cat:0", "hub:user/many/runs/dog:0"]
    assert Extraction.open("hub:user/many/runs/dog").concept("cup").index == 0
    with pytest.raises(InputError, match="user/many has no folder 'runs/cow'"):
        Extraction.open("hub:user/many/runs/cow")


def test_what_is_fetched(hub: hub_server.Hub, icekit: Icekit, run: Path, tmp_path: Path) -> None:
    """No pickle, nothing hidden; a run of the hub is looked at as everybody's, and nothing is written beside it."""
    assert icekit("push", "run", "user/photo")[0] == 0
    plan = json.dumps({"old": ["image.png"], "new": ["image.png"], "last": "image.png"}).encode()
    hub.repositories["user/photo"] |= {
        "weights.bin": b"a pickle", "embeddings.pt": b"a pickle", ".next/exchange.json": plan, "run.py": b"print(1)",
        ".icekit.exports.json": b"{}", "checkpoint/run.json": b"{}",
    }  # fmt: skip
    place = Extraction.open("hub:user/photo").run_dir
    there = {one.relative_to(place).as_posix() for one in place.rglob("*") if one.is_file()}
    assert there == set(shown(run))
    manifest = json.loads(hub.repositories["user/photo"]["manifest.json"])
    manifest["concepts"][0]["mask"] = "../../../../../etc/hostname"
    hub.repositories["user/photo"]["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(InputError, match=r"is damaged: manifest\.json"):
        Extraction.open("hub:user/photo")
    # A link that is not the hub's own leads nowhere, in its cache too.
    manifest["concepts"][0]["mask"] = "masks/0-cup.png"
    hub.repositories["user/photo"]["manifest.json"] = json.dumps(manifest).encode()
    back = Extraction.open("hub:user/photo")
    mask = back.run_dir / "masks/0-cup.png"
    outside = tmp_path / "mask.png"
    shutil.copy(run / "masks/0-cup.png", outside)
    mask.unlink()
    mask.symlink_to(outside)
    with pytest.raises(InputError, match="nothing outside is read"):
        back.concepts[0].mask()
    assert os.path.lexists(mask)


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("hub:user/run", HubRun("user/run", None, "")),
        ("hub:user/run@v1.0", HubRun("user/run", "v1.0", "")),
        ("hub:user/many/runs/photo", HubRun("user/many", None, "runs/photo")),
        ("hub:user/many@main/runs/two words/", HubRun("user/many", "main", "runs/two words")),
    ],
)
def test_references(reference: str, parts: HubRun) -> None:
    assert parse(reference) == parts
    assert split_reference(f"{reference}:cup") == (reference, "cup")


@pytest.mark.parametrize(
    "reference", ["hub:", "hub:run", "hub:user/..", "hub:user/run/../x", "hub:user/run@", "hub:a b/c"]
)
def test_wrong_references(reference: str, icekit: Icekit) -> None:
    code, _, err = icekit("compose", "a {a}", f"a={reference}:0")
    assert code == 2 and "no run of the hub is named so: write hub:user/run" in err and err.count("\n") == 1
