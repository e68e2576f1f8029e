"""The run directory: whose it is, what is in it, and that nothing is ever half written."""

import json
import shutil
from pathlib import Path

import plain_components as plain
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from icekit import ConceptLibrary, Extraction, InputError, extract
from icekit.protocols import FineTuning, Learned, Region, RunError, Step
from icekit.run.atomic import write_atomically, write_json_atomically
from icekit.run.directory import FileCheckpoint, Located, RunDirectory, StepLog
from icekit.settings import Settings, load_settings


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plugins = plain.beside_builtins()
    names = {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")}
    settings = load_settings(options={"components": names, "samples": 0, "max_concepts": 2})
    folder = tmp_path_factory.mktemp("library") / "run"
    extract(Image.new("RGB", (50, 50), "red"), folder, settings, installed=plugins)
    return folder


def begun(folder: Path) -> RunDirectory:
    run = RunDirectory(folder)
    run.begin(Settings(seed=3), "photo.png", "abc", Image.new("RGB", (8, 8)))
    return run


def test_concepts_of_a_run(run_dir: Path) -> None:
    run = Extraction.open(run_dir)
    assert [concept.label for concept in run.concepts] == ["cup", "red-bowl"]
    cup, bowl = run.concepts
    assert cup.mask().shape == (32, 32)
    assert cup.mask().mean() == pytest.approx(cup.area, abs=1e-4)
    assert run.tokens["<red-bowl-1-colour>"] is bowl.embeddings["colour"]
    assert {encoder: tuple(row.shape) for encoder, row in bowl.embeddings["colour"].items()} == {"clip_l": (plain.DIM,)}
    assert run.identity == "the words of plain"
    assert run.concept() is cup
    assert run.concept(1) is run.concept("1") is run.concept("red-bowl") is bowl
    with pytest.raises(InputError, match=r"has no concept 'vase': choose from 0 \(cup\), 1 \(red-bowl\)"):
        run.concept("vase")
    library = ConceptLibrary(run_dir, run_dir)
    assert len(library) == len(list(library)) == 4


def test_what_is_not_a_complete_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        Extraction.open(tmp_path / "nope")
    with pytest.raises(InputError, match="is not a run directory"):
        Extraction.open(tmp_path)
    begun(tmp_path / "run")
    with pytest.raises(InputError, match=r"not complete: .*resume=True"):
        Extraction.open(tmp_path / "run")
    (tmp_path / "new").mkdir()
    manifest = json.loads((run_dir / "manifest.json").read_text()) | {"schema_version": 3, "icekit_version": "9.9"}
    (tmp_path / "new" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"schema version 3 \(icekit 9.9\); this icekit reads up to version 2: .*new"):
        Extraction.open(tmp_path / "new")


def test_the_settings_of_a_run_of_before_are_read(run_dir: Path, tmp_path: Path) -> None:
    """It had a flag for parts of a mask that lie apart, and its picture was cut."""
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    text = (run / "settings.toml").read_text().replace('same_word = "apart"', 'apart = true\nreuse = "later"')
    (run / "settings.toml").write_text(text.replace('[image]\nfit = "whole"\n', ""))
    settings = Extraction.open(run).settings()
    assert (settings.same_word, settings.image.fit) == ("parts", "square")


def usable(folder: Path, *, resume: bool = False, overwrite: bool = False) -> str:
    try:
        RunDirectory(folder).check_usable(resume=resume, overwrite=overwrite)
    except InputError as error:
        return str(error)
    return ""


def test_a_run_is_replaced_only_when_asked(tmp_path: Path, run_dir: Path) -> None:
    assert usable(tmp_path / "new") == ""
    assert usable(tmp_path / "new", resume=True) == ""  # nothing to go on with: begins
    assert usable(tmp_path) == ""  # an empty folder
    assert "complete run: overwrite=True" in usable(run_dir)
    assert usable(run_dir, overwrite=True) == usable(run_dir, resume=True) == ""
    assert "one of them" in usable(run_dir, overwrite=True, resume=True)
    begun(tmp_path / "run")
    assert "interrupted run (resume=True" in usable(tmp_path / "run")
    (tmp_path / "file").touch()
    assert "is a file" in usable(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "masks/0-cup.png"])
def test_a_foreign_folder_is_never_touched(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, b'{"name": "somebody\'s"}')
    for options in ({}, {"overwrite": True}, {"resume": True}):
        assert "no run of icekit's" in usable(tmp_path, **options)


def test_overwrite_deletes_what_icekit_wrote_and_nothing_else(tmp_path: Path, run_dir: Path) -> None:
    for path in run_dir.rglob("*"):
        if path.is_file():
            write_atomically(tmp_path / path.relative_to(run_dir), path.read_bytes())
    foreign = ["notes.txt", "samples/best.png", "masks/my own.png", "checkpoint/mine.txt", "embeddings/other.txt"]
    for name in foreign:
        write_atomically(tmp_path / name, b"mine")
    begun(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*foreign, "settings.toml", "image.png", "checkpoint/run.json", "checkpoint/written.jsonl"}


def test_killed_while_beginning_is_still_icekits(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".run.json.part").write_text("{")
    assert usable(tmp_path) == ""
    (tmp_path / "checkpoint" / ".run.json.4711.part").write_text("{")  # as it is called in process 4711
    assert usable(tmp_path) == ""
    (tmp_path / "checkpoint" / "run.json").write_text('{"ready": false}')
    (tmp_path / "image.png").touch()
    assert usable(tmp_path, resume=True) == ""
    assert RunDirectory(tmp_path).started() is None


@pytest.mark.parametrize("lengths", [{"clip_l": 4}, {"clip_l": 4, "clip_g": 6}])
def test_tokens_of_one_text_encoder_and_of_several(tmp_path: Path, lengths: dict[str, int]) -> None:
    run = begun(tmp_path)
    names = ("<cup-0>", "<cup-0-colour>")
    tokens = {name: {encoder: torch.randn(length) for encoder, length in lengths.items()} for name in names}
    run.save_learned(Learned(tokens))
    whole = load_file(tmp_path / "embeddings.safetensors")
    alone = load_file(tmp_path / "embeddings" / "cup-0-colour.safetensors")
    if len(lengths) == 1:
        assert (whole.keys(), alone.keys()) == ({*names}, {"<cup-0-colour>"})
    else:
        assert whole.keys() == {f"{name}.{encoder}" for name in names for encoder in lengths}
        assert alone.keys() == lengths.keys()
    found = run.load_tokens(lengths, names)
    assert found is not None and found.keys() == tokens.keys()
    for name, rows in tokens.items():
        assert found[name].keys() == rows.keys()
        assert all(torch.equal(found[name][encoder], row) for encoder, row in rows.items())


@pytest.mark.parametrize(
    "tuning",
    [
        FineTuning(),
        FineTuning(lora={"transformer.to_q.lora_A.weight": torch.ones(2)}, folder="transformer"),
        FineTuning(lora={"unet.to_q.lora_A.weight": torch.ones(2)}),
        FineTuning(weights={"x": torch.ones(2)}, weights_config={"a": 1}, folder="transformer"),
        FineTuning(weights={"x": torch.ones(2)}, weights_config={"a": 1}),
    ],
)
def test_what_was_made_of_the_noise_predictor_comes_back(tmp_path: Path, tuning: FineTuning) -> None:
    run = begun(tmp_path)
    run.save_learned(Learned({}, tuning))
    found = run.load_tuning()
    assert (found.folder, found.weights_config) == (tuning.folder, tuning.weights_config)
    assert (found.lora.keys(), found.weights.keys()) == (tuning.lora.keys(), tuning.weights.keys())
    assert (tmp_path / tuning.folder / "config.json").is_file() == bool(tuning.weights)
    run.begin(Settings(), "photo.png", "abc", Image.new("RGB", (8, 8)))  # another run in its place
    assert not run.load_tuning() and not (tmp_path / tuning.folder).exists()


def test_regions_come_back(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert run.load_located() == Located()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 1:7] = True
    hints = {"colour": {"red": 0.75, "blue": 0.25}}
    run.save_located(Located((Region(0, "Wine Glass", 0.25, mask, hints),), ("ghost",), finished=True))
    located = run.load_located()
    [region] = located.regions
    assert (region.index, region.word, region.score, located.refused, located.finished) == (
        *(0, "Wine Glass", 0.25, ("ghost",), True),
    )
    assert torch.equal(region.mask, mask)
    assert region.hints == hints
    assert (tmp_path / "masks" / "0-wine-glass.png").is_file()


def test_a_renamed_region_leaves_no_mask_behind(tmp_path: Path) -> None:
    run = begun(tmp_path)
    mask = torch.ones(8, 8, dtype=torch.bool)
    run.save_located(Located((Region(0, "cone", 0.25, mask),)))
    (tmp_path / "masks" / "mine.png").touch()
    run.save_located(Located((Region(0, "pyramid", 0.25, mask),), finished=True))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0-pyramid.png", "mine.png"]


def test_what_a_killed_process_had_half_written_goes_and_nothing_else(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "masks").mkdir()
    ours = [".manifest.json.17.part", "samples/.0-object-1.png.17.part", "checkpoint/.learner.safetensors.3.part"]
    others = [".mine.json.17.part", "samples/.notes.png.17.part", "samples/0-object-0.png", "masks/half.part"]
    for name in [*ours, *others]:
        (tmp_path / name).touch()
    run.clear_leftovers()
    assert [name for name in ours if (tmp_path / name).exists()] == []
    assert [name for name in others if not (tmp_path / name).exists()] == []


def test_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "deep" / "state.safetensors")
    assert checkpoint.load() is None
    shared = torch.randn(4, 4)
    tensors = {"a": shared, "b": shared.T, "bytes": torch.arange(5, dtype=torch.uint8), "c": torch.tensor(3)}
    state = {"step": 7, "rate": 0.1, "text": "é\n", "nested": {"list": [1, 2.5, None]}}
    checkpoint.save(tensors, {"step": 1})
    checkpoint.save(tensors, state)
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded[1] == state
    assert all(
        torch.equal(loaded[0][key], value) and loaded[0][key].dtype == value.dtype for key, value in tensors.items()
    )
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["state.safetensors"]


def test_log_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    for steps in (range(1, 8), range(6, 10)):
        with StepLog(tmp_path / "log.jsonl") as log:
            for step in steps:
                log.write(Step(step, 9, "phase", {"total": 0.5}))
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 1')
    with StepLog(tmp_path / "log.jsonl") as log:
        log.write(Step(10, 10, "phase", {}))
    lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 11))


def test_what_is_no_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomically(tmp_path / "results.json", {"value": float("nan")})
    with StepLog(tmp_path / "log.jsonl") as log, pytest.raises(ValueError, match="JSON"):
        log.write(Step(1, 1, "phase", {"total": float("inf")}))
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size] == []


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def no_space(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(RunError, match="no space"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
