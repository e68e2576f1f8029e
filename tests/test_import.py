"""``icekit import``: embeddings of other programs as runs, and what is no embedding for this model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import plain_components as plain
import pytest
import torch
from icekit_process import in_this_process
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from icekit import Extraction, InputError
from icekit.run.importing import import_embeddings, rows_in
from icekit.settings import load_settings

Icekit = Callable[..., tuple[int, str, str]]
ROW = torch.arange(plain.DIM, dtype=torch.float32)
OURS = ["--backbone=plain", "--set", "sample_steps=1"]


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Icekit:
    return in_this_process(tmp_path, monkeypatch, capsys)


def refused(result: tuple[int, str, str], *hints: str) -> None:
    assert (result[0], result[1], len(result[2].splitlines())) == (2, "", 1), result
    assert all(hint in result[2] for hint in hints), result


@pytest.mark.parametrize(
    "tensors",
    [
        {"<watercolour>": ROW},
        {"emb_params": ROW[None]},
        {"embedding": ROW[None].half()},
        {"*": ROW.bfloat16()},
        {"clip_l": ROW[None]},
    ],
    ids=["diffusers", "kohya", "half", "bfloat16", "comfyui"],
)
def test_a_file_becomes_a_concept(icekit: Icekit, tmp_path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), "Water colour.safetensors")
    status, out, err = icekit("import", "Water colour.safetensors", "--out", "run", *OURS)
    assert (status, out) == (0, "0: water-colour: <water-colour-0-instance>\nrun\n"), err
    run = Extraction.open("run")
    [concept] = run.concepts
    assert torch.equal(concept.embeddings["instance"]["clip_l"], ROW)
    assert run.manifest["imported"][0]["file"] == "Water colour.safetensors"
    assert {*run.manifest["files"]} == {
        path.relative_to("run").as_posix() for path in Path("run").rglob("*") if path.is_file()
    }
    assert concept.mask().all() and Image.open("run/image.png").size == (plain.SIDE, plain.SIDE)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "1 concept of embeddings that other programs have learned" in card and "Water colour.safetensors" in card
    status, out, err = icekit("compose", "a photo of {a}", "a=run", "--n", "1", "--out", "made")
    assert status == 0, err
    assert json.loads(Path("made/prompt.json").read_text())["expanded"] == "a photo of <a-water-colour-0-instance>"


def test_several_files_and_rows(icekit: Icekit, tmp_path: Path) -> None:
    rows = torch.randn(3, plain.DIM, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": rows}, "easy.safetensors")
    save_file({"emb_params": ROW[None]}, "other.safetensors")
    files = ["easy.safetensors", "other.safetensors"]
    words = ["--word", "ink", "--word", "red cup"]
    status, out, err = icekit("import", *files, *words, "--out", "run", "--set", "samples=2", *OURS)
    assert status == 0, err
    assert out.splitlines()[0] == "0: ink: <ink-0-instance> <ink-0-instance2> <ink-0-instance3>"
    run = Extraction.open("run")
    ink, cup = run.concepts
    assert torch.equal(torch.stack([ink.embeddings[part]["clip_l"] for part in ink.tokens]), rows)
    assert cup.label == "red-cup"
    # Side by side: each concept's mask is its part of the picture.
    assert Image.open("run/image.png").size == (2 * plain.SIDE, plain.SIDE)
    assert ink.mask()[:, : plain.SIDE].all() and not ink.mask()[:, plain.SIDE :].any()
    assert (ink.mask() ^ cup.mask()).all()
    assert sorted(one.name for one in Path("run/samples").iterdir()) == [
        f"{index}-object-{number}.png" for index in (0, 1) for number in (0, 1)
    ]
    status, _, err = icekit("compose", "{b} with {a}", "a=run:ink", "b=run:red-cup", "--n", "1", "--out", "made")
    assert status == 0, err
    expanded = json.loads(Path("made/prompt.json").read_text())["expanded"]
    assert expanded == "<b-red-cup-1-instance> with <a-ink-0-instance> <a-ink-0-instance2> <a-ink-0-instance3>"
    # And back again, as it came.
    status, out, err = icekit("export", "run", "--format", "a1111")
    assert status == 0, err
    assert torch.equal(load_file("run/a1111/embeddings/run-ink-0-instance.safetensors")["emb_params"], rows)

    # Again in its place: nothing is lost before it is whole.
    refused(icekit("import", "other.safetensors", "--out", "run", *OURS), "run already holds a complete run")
    save_file({"emb_params": ROW[None, :4].contiguous()}, "short.safetensors")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    refused(icekit("import", "short.safetensors", "--out", "run", "--overwrite", *OURS), "short.safetensors")
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    status, out, err = icekit("import", "other.safetensors", "--out", "run", "--overwrite", *OURS)
    assert (status, out.splitlines()[0]) == (0, "0: other: <other-0-instance>"), err
    assert not Path("run/a1111").exists() and not Path("run/.next").exists()
    status, _, err = icekit("run", "other.safetensors", "--out", "run", "--resume", *OURS)
    assert status == 2 and Extraction.open("run").concepts[0].label == "other"


def test_the_same_files_give_the_same_run(icekit: Icekit, tmp_path: Path) -> None:
    save_file({"emb_params": ROW[None]}, "ink.safetensors")
    trees = []
    for name in ("one", "two"):
        assert icekit("import", "ink.safetensors", "--out", name, *OURS, "--set", "exporters=[]")[0] == 0
        trees.append({p.relative_to(name): p.read_bytes() for p in Path(name).rglob("*") if p.is_file()})
    assert trees[0] == trees[1]


def test_what_is_no_embedding_for_this_model(icekit: Icekit, tmp_path: Path) -> None:
    def typed(name: str, *more: str) -> tuple[int, str, str]:
        result = icekit("import", name, "--out", "run", *OURS, *more)
        assert not Path("run").exists()
        return result

    def file(name: str, **tensors: Tensor) -> str:
        save_file({key: value.contiguous() for key, value in tensors.items()}, name)
        return name

    refused(typed(file("a.safetensors", emb_params=torch.ones(1, 768))), "a.safetensors is for another model",
            "rows of length 768 against clip_l 8 of plain")  # fmt: skip
    refused(
        typed(file("xl.safetensors", clip_l=ROW[None], clip_g=torch.ones(1, 1280))),
        "rows of length clip_g 1280, clip_l 8 against clip_l 8 of plain",
    )
    refused(
        typed(file("two.safetensors", a=ROW, b=ROW + 1)),
        "two.safetensors has 2 tensors (a, b)",
        "each token its own file",
    )
    refused(
        typed(file("lora.safetensors", **{"lora_unet_x.lora_down.weight": torch.ones(2, 2)})),
        "lora.safetensors has weights of a model or a LoRA adapter",
    )
    refused(typed(file("nan.safetensors", a=ROW * float("nan"))), "a has numbers that are NaN or infinite")
    refused(typed(file("ids.safetensors", a=torch.ones(1, 8, dtype=torch.int64))), "a is int64 [1, 8]: rows are floats")
    refused(typed(file("many.safetensors", a=torch.ones(80, 8))), "many.safetensors has 80 rows", "75 at most")
    refused(
        typed(file("uneven.safetensors", clip_l=torch.ones(1, 8), clip_g=torch.ones(2, 8))),
        "not the same number of rows for each text encoder: 2 for clip_g, 1 for clip_l",
    )
    Path("broken.safetensors").write_bytes(b"not this")
    refused(typed("broken.safetensors"), "broken.safetensors is no whole safetensors file")
    for name in ("old.pt", "old.BIN"):
        Path(name).write_bytes(b"anything")
        refused(typed(name), f"{name} is a pickled file", "take the embedding as .safetensors")
    refused(typed("nowhere.safetensors"), "no such file: nowhere.safetensors")
    Path("folder.safetensors").mkdir()
    refused(typed("folder.safetensors"), "folder.safetensors cannot be read as an embedding: is a directory")
    good = file("good.safetensors", a=ROW)
    refused(typed(good, "--word", "a", "--word", "b"), "2 words for 1 files")
    refused(typed(good, "--word", " "), "--word ' ' is empty")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    refused(icekit("import", good, "--out", "mine", *OURS), "mine is not empty and no run of icekit's")
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_layouts() -> None:
    assert {*rows_in({"t5xxl": torch.ones(2, 4)}, "f")} == {"t5xxl"}
    rows = rows_in({"clip_l": torch.ones(8), "clip_g": torch.ones(16)}, "f")
    assert {key: value.shape for key, value in rows.items()} == {"clip_l": (1, 8), "clip_g": (1, 16)}
    with pytest.raises(InputError, match="f has 0 tensors"):
        rows_in({}, "f")


def test_an_embedding_of_two_text_encoders(sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From import to the model card's code, which draws the same without icekit as often as it is run."""
    monkeypatch.chdir(tmp_path)
    rows = {"clip_l": torch.full((1, 32), 0.1), "clip_g": torch.full((1, 48), -0.1)}
    save_file(rows, "ink.safetensors")
    given = {
        "components": {"backbone": "sdxl"},
        "backbone": {"model": str(sdxl_folder), "steps": 2},
        "exporters": [],
    }
    run = import_embeddings(["ink.safetensors"], "run", load_settings(None, [], given))
    assert {name: row.tolist() for name, row in run.concepts[0].embeddings["instance"].items()} == {
        name: row[0].tolist() for name, row in rows.items()
    }
    save_file({"emb_params": rows["clip_l"]}, "one.safetensors")
    with pytest.raises(InputError, match="rows of length 32 against clip_l 32, clip_g 48 of sdxl with model"):
        import_embeddings(["one.safetensors"], "other", load_settings(None, [], given))
    card = Path("run/README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace('"MODEL"', repr(str(sdxl_folder)))
    assert str(sdxl_folder) not in card and 'rows["clip_g"]' in code
    monkeypatch.chdir("run")
    names: dict[str, object] = {}
    exec(code.replace(").images[0]", ", num_inference_steps=1).images[0]"), names)
    assert isinstance(names["image"], Image.Image)
    pipe = names["pipe"]
    for end, row in (("", "clip_l"), ("_2", "clip_g")):
        number = getattr(pipe, f"tokenizer{end}").convert_tokens_to_ids("<ink-0-instance>")
        table = getattr(pipe, f"text_encoder{end}").get_input_embeddings().weight
        assert torch.equal(table[number].detach(), rows[row][0])
