"""Tokens and adapters in the files of other programs, read back as those programs read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from icekit.backbones.lora import lora_adapter
from icekit.builtin.exporters import programs
from icekit.builtin.exporters.layouts import kohya_lora, name_in_prompts, told_apart
from icekit.builtin.exporters.programs import TokenFiles
from icekit.builtin.exporters.settings import TokenFilesSettings
from icekit.protocols import FineTuning, InputError
from icekit.run.extraction import Concept
from icekit.run.records import BackboneRecord

FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    "SD 1": ("StableDiffusionPipeline", {"clip_l": 768}),
    "SD 2": ("StableDiffusionPipeline", {"clip_h": 1024}),
    "SD XL": ("StableDiffusionXLPipeline", {"clip_l": 768, "clip_g": 1280}),
    "SD 3": ("StableDiffusion3Pipeline", {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}),
    "SD 3 without T5": ("StableDiffusion3Pipeline", {"clip_l": 768, "clip_g": 1280}),
    "FLUX.1": ("FluxPipeline", {"clip_l": 768, "t5xxl": 4096}),
    "Sana": ("SanaPipeline", {"gemma2_2b": 2304}),
    "FLUX.2-klein 4B": ("Flux2KleinPipeline", {"qwen3_4b": 2560}),
    "FLUX.2-klein 9B": ("Flux2KleinPipeline", {"qwen3_8b": 4096}),
    "Z-Image": ("ZImagePipeline", {"qwen3_4b": 2560}),
}
UNETS = ("SD 1", "SD 2", "SD XL")
KNOWN = {
    "Diffusers": tuple(FAMILIES),
    "A1111": UNETS,
    "ComfyUI": (
        *UNETS,
        "SD 3",
        "SD 3 without T5",
        "FLUX.1",
        "FLUX.2-klein 4B",
        "FLUX.2-klein 9B",
        "Z-Image",
    ),
    "InvokeAI": UNETS,
}
PARTS = ("category", "instance", "colour")


@dataclass
class Record:
    backbone: BackboneRecord | None


@dataclass
class Run:
    """What exporters ask of a run."""

    home: Path
    concepts: tuple[Concept, ...]
    record: Record
    files: dict[str, Path] = field(default_factory=dict)
    lora: Mapping[str, Tensor] = field(default_factory=dict)

    def tuning_files(self) -> dict[str, Path]:
        return self.files

    def tuning(self) -> FineTuning:
        return FineTuning(self.lora)


def concept(index: int, label: str, lengths: Mapping[str, int], parts: tuple[str, ...] = PARTS) -> Concept:
    generator = torch.Generator().manual_seed(index)
    tokens = {part: f"<{label}-{index}{'' if part == 'category' else f'-{part}'}>" for part in parts}
    rows = {
        part: {name: torch.randn(length, generator=generator) for name, length in lengths.items()} for part in parts
    }
    return Concept(index, label, 1.0, 0.5, tokens, {}, rows, Path(), lambda: None)  # type: ignore[arg-type, return-value]


def run_of(family: str, *concepts: Concept, says: bool = True, home: str = "runs/My photo.v2") -> Run:
    pipeline, lengths = FAMILIES[family]
    record = BackboneRecord(identity="x", rows=lengths, pipeline_class=pipeline if says else None)
    return Run(Path(home), concepts or (concept(0, "red-cup", lengths), concept(1, "vase", lengths)), Record(record))


def export(program: str, run: Run, folder: Path, **settings: Any) -> list[str]:
    exporter: TokenFiles = getattr(programs, program)(TokenFilesSettings(**settings))
    declared = list(exporter.files(run))  # type: ignore[arg-type]
    exporter.export(run, folder)  # type: ignore[arg-type]
    written = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(declared) == sorted(written)
    return declared


# --- Readers, from what each program says that it reads ---------------------------------------------------------------


def read_by_a1111(file: Path) -> dict[str, Tensor]:
    """Its textual_inversion.py: ``clip_g`` and ``clip_l``, the first axis counts; or else one tensor."""
    data = load_file(file)
    if "clip_g" in data and "clip_l" in data:
        assert data["clip_g"].shape[0] == data["clip_l"].shape[0] == 1
        return data
    [only] = data.values()
    return {"": only if only.ndim > 1 else only[None]}


def read_by_comfyui(file: Path, encoders: Mapping[str, int]) -> dict[str, Tensor]:
    """Its sd1_clip.py: each text encoder's key, or else the first tensor; passed over if its length is another."""
    data = load_file(file)
    found = {name: data.get(name, next(iter(data.values()))) for name in encoders}
    assert all(one.shape[-1] == encoders[name] for name, one in found.items())
    return {name: one if one.ndim > 1 else one[None] for name, one in found.items()}


def read_by_invokeai(file: Path) -> tuple[str, dict[str, Tensor]]:
    """Its textual_inversion.py and its model manager: which model it is for, and the rows."""
    data = load_file(file)
    if "emb_params" in data:
        rows, length = {"": data["emb_params"]}, data["emb_params"].shape[-1]
    else:
        rows, length = {"clip_g": data["clip_g"], "clip_l": data["clip_l"]}, data["clip_g"].shape[-1]
    return {768: "SD 1", 1024: "SD 2", 1280: "SD XL"}[length], rows


# --- Embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("program", KNOWN)
def test_rows_are_read_back_equal(tmp_path: Path, program: str, family: str) -> None:
    run, lengths = run_of(family), FAMILIES[family][1]
    if family not in KNOWN[program]:
        with pytest.raises(InputError) as refused:
            export(program, run, tmp_path)
        assert str(refused.value).startswith(f"runs/My photo.v2 cannot go to {program}: its tokens are of ")
        return
    files = export(program, run, tmp_path)
    assert files[0] == "embeddings/My-photo-v2-red-cup-0.safetensors"
    assert files[2] == "embeddings/My-photo-v2-red-cup-0-colour.safetensors"
    places = iter(files)
    for one in run.concepts:
        for part in PARTS:
            file, rows = tmp_path / next(places), one.embeddings[part]
            read: dict[str, Tensor]
            if program == "A1111":
                read = read_by_a1111(file)
            elif program == "ComfyUI":
                read = read_by_comfyui(file, lengths)
            elif program == "InvokeAI":
                told, read = read_by_invokeai(file)
                assert told == family
            else:
                data = load_file(file)
                key = f"<{file.stem}>"
                read = {"": data[key][None]} if len(lengths) == 1 else {name: data[name][None] for name in data}
                assert [*data] == [key] if len(lengths) == 1 else {*data} == {*lengths}
            found = {name or next(iter(lengths)): value for name, value in read.items()}
            assert found.keys() == rows.keys()
            assert all(torch.equal(found[name], row[None]) for name, row in rows.items())


@pytest.mark.parametrize(("program", "form"), [("Diffusers", "<{}>"), ("A1111", "{}"), ("ComfyUI", "embedding:{}"),
                                               ("InvokeAI", "<{}>")])  # fmt: skip
def test_prompts_name_the_files(tmp_path: Path, program: str, form: str) -> None:
    files = export(program, run_of("SD 1"), tmp_path, prefix="mine")
    names = [Path(file).stem for file in files if file.startswith("embeddings/")]
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) for name in names)
    assert files[-1] == "mine-prompts.txt"
    lines = (tmp_path / files[-1]).read_text().splitlines()
    a, b = "mine-red-cup-0", "mine-vase-1"
    assert lines == [
        f"a photo of a {form.format(f'{a}-instance')} {form.format(a)}",
        f"a photo of a {form.format(a)} {form.format(f'{a}-colour')}",
        f"a photo of a vase, {form.format(f'{a}-colour')}",
        f"a photo of a {form.format(f'{b}-instance')} {form.format(b)}",
        f"a photo of a {form.format(b)} {form.format(f'{b}-colour')}",
        f"a photo of a red cup, {form.format(f'{b}-colour')}",
    ]
    assert set(re.findall(r"mine-[a-z0-9-]+", " ".join(lines))) == {*names}


def test_several_rows_are_one_file(tmp_path: Path) -> None:
    lengths = FAMILIES["SD XL"][1]
    one = concept(0, "style", lengths, ("instance", "instance2", "instance3"))
    run = run_of("SD XL", one)
    files = export("ComfyUI", run, tmp_path, prefix="")
    assert files == ["embeddings/style-0-instance.safetensors", "prompts.txt"]
    read = load_file(tmp_path / files[0])
    for encoder in lengths:
        assert torch.equal(read[encoder], torch.stack([one.embeddings[part][encoder] for part in one.tokens]))


def test_names_in_prompts() -> None:
    names = ["crème-brûlée-0", "器-1-colour", "10-cups-2", "cup-0"]
    assert [name_in_prompts(name) for name in names] == ["creme-brulee-0", "concept-1-colour", "concept-10-cups-2",
                                                         "cup-0"]  # fmt: skip
    assert told_apart(["a", "A", "b", "a"]) == ["a", "A-2", "b", "a-3"]


def test_what_no_program_reads_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of("FLUX.1", concept(0, "cup", {"clip_l": 768, "t5xxl": 4096, "modulation": 3072}))
    for program, title in (("ComfyUI", "ComfyUI"), ("Diffusers", "diffusers")):
        with pytest.raises(InputError, match=f"cannot go to {title}: its tokens have rows for modulation"):
            export(program, run, tmp_path)
    # A run that says nothing of its pipeline: by its text encoders.
    export("A1111", run_of("SD XL", says=False), tmp_path / "xl")
    with pytest.raises(InputError, match="A1111 reads those of Stable Diffusion 1 and 2 and Stable Diffusion XL"):
        export("A1111", run_of("FLUX.1", says=False), tmp_path)
    # Rows that a program will pass over.
    run = run_of("SD 1", concept(0, "cup", {"clip_l": 96}))
    export("A1111", run, tmp_path / "short")
    assert "the rows for clip_l have 96 numbers, and the models that A1111 reads have 768" in caplog.text
    caplog.clear()
    export("Diffusers", run, tmp_path / "diffusers")
    export("ComfyUI", run_of("SD 1"), tmp_path / "right")
    assert not caplog.text
    export("ComfyUI", run_of("Z-Image"), tmp_path / "z")
    assert "ComfyUI read no embeddings with Z-Image" in caplog.text


# --- What was trained of the model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    from icekit.testing.tiny import tiny_pipeline, tiny_xl_pipeline

    return {"SD 1": tiny_pipeline(version=1), "SD XL": tiny_xl_pipeline()}


def adapter_of(unet: torch.nn.Module) -> dict[str, Tensor]:
    """An adapter as a run keeps it, with something learned."""
    generator = torch.Generator().manual_seed(3)
    with lora_adapter(unet, 2, generator) as weights:
        return {
            key: (value.detach() if ".lora_A." in key else torch.randn(value.shape, generator=generator) * 0.1).clone()
            for key, value in weights.items()
        }


@pytest.mark.parametrize(
    ("program", "family"), [("Diffusers", "SD 1"), ("A1111", "SD 1"), ("ComfyUI", "SD XL"), ("InvokeAI", "SD XL")]
)
def test_an_adapter_changes_the_same_weights(
    tmp_path: Path, pipelines: dict[str, Any], program: str, family: str
) -> None:
    """Read by diffusers, which reads kohya's files as well."""
    pipeline = pipelines[family]
    lora = adapter_of(pipeline.unet)
    save_file(lora, tmp_path / "lora.safetensors")
    run = run_of(family, home="photo")
    run.files, run.lora = {"lora.safetensors": tmp_path / "lora.safetensors"}, lora
    files = export(program, run, tmp_path / "out")
    [file] = [tmp_path / "out" / name for name in files if "lora" in name]
    assert file.relative_to(tmp_path / "out").as_posix() == {
        "Diffusers": "pytorch_lora_weights.safetensors",
        "A1111": "models/Lora/photo-lora.safetensors",
    }.get(program, "loras/photo-lora.safetensors")
    prompts = tmp_path / "out" / files[-1] if program != "Diffusers" else tmp_path / "out" / "photo-prompts.txt"
    lines = prompts.read_text().splitlines()
    assert all(line.endswith("<lora:photo-lora:1>") for line in lines) == (program == "A1111")
    if program != "Diffusers":
        with safe_open(file, "pt") as tensors:
            keys = set(tensors.keys())
            assert all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", key) for key in keys)
            assert tensors.get_tensor(next(key for key in keys if key.endswith("alpha"))) == 2

    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        changed = 0
        for name, value in pipeline.unet.state_dict().items():
            stem = f"unet.{name.removesuffix('.weight')}"
            delta = torch.zeros(())
            if f"{stem}.lora_A.weight" in lora:
                delta, changed = lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"], changed + 1
            assert torch.allclose(value, before[name] + delta, atol=1e-6), name
        assert changed == len(lora) // 2
    finally:
        pipeline.unet.load_state_dict(before)


def test_adapters_of_transformers_keep_their_keys(tmp_path: Path) -> None:
    """ComfyUI reads diffusers' keys of transformers."""
    lora = {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 4),
            "transformer.blocks.0.attn.to_q.lora_B.weight": torch.ones(4, 2)}  # fmt: skip
    run = run_of("FLUX.1", home="photo")
    run.files, run.lora = {"lora.safetensors": tmp_path / "lora.safetensors"}, lora
    export("ComfyUI", run, tmp_path / "out")
    read = load_file(tmp_path / "out" / "loras" / "photo-lora.safetensors")
    assert {key: value.tolist() for key, value in read.items()} == {key: one.tolist() for key, one in lora.items()}
    with pytest.raises(ValueError, match=r"unet\.x"):
        kohya_lora({"unet.x": torch.ones(1)})


def test_all_weights_go_to_diffusers_alone(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    run = run_of("SD 1")
    run.files = {f"unet/{one.name}": one for one in sorted((tmp_path / "unet").iterdir())}
    files = export("Diffusers", run, tmp_path / "out")
    assert {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"} < {*files}
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"
    for program in ("A1111", "ComfyUI", "InvokeAI"):
        with pytest.raises(InputError, match=rf"cannot go to {program}: its learner trained all weights.*diffusers\)"):
            export(program, run, tmp_path / program)


# --- In diffusers itself ----------------------------------------------------------------------------------------------


def test_diffusers_loads_them(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    pipeline = pipelines["SD 1"]
    rows = {"clip_l": 32}
    run = run_of("SD 1", concept(0, "cup", rows), concept(1, "style", rows, ("instance", "instance2")), home="photo")
    export("Diffusers", run, tmp_path)
    for one in run.concepts:
        for part, token in one.tokens.items():
            name = f"<photo-{token.strip('<>')}>"
            if part == "instance2":
                name = "<photo-style-1-instance>_1"  # as diffusers calls the second row
            else:
                pipeline.load_textual_inversion(str(tmp_path / "embeddings" / f"{name.strip('<>')}.safetensors"))
            table = pipeline.text_encoder.get_input_embeddings().weight
            found = table[pipeline.tokenizer.convert_tokens_to_ids(name)]
            assert torch.equal(found.detach(), one.embeddings[part]["clip_l"]), name
