"""FLUX.2-klein: the conformance checks, what is its own, ConceptAttention on it, and whole runs."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llm_models as tiny
import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from icekit_dit.attention import Capture
from icekit_dit.concepts import shares_of_concepts
from icekit_dit.flux import pack, unpack
from icekit_dit.flux2_klein import Flux2Klein, ParallelProcessor, position_ids, standardised, unstandardised
from icekit_dit.transformer import shifted
from icekit_process import with_what_is_installed
from PIL import Image
from tiny_transformers import change, write_photo
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from icekit import Settings
from icekit import open as open_run
from icekit.backbones.common import quiet
from icekit.plugins import installed
from icekit.protocols import InputError, Learned, Look
from icekit.run.directory import RunDirectory
from icekit.run.in_diffusers import python_code
from icekit.run.records import BackboneRecord
from icekit.testing import BackboneUnderTest, check_backbone, parametrize_with_checks


@functools.cache
def temporary() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="icekit-klein-")


@functools.cache
def folder(distilled: bool = False) -> Path:
    return tiny.write_flux2_klein(Path(temporary().name) / f"klein-{distilled}", distilled=distilled)


def klein(model: Path | None = None, **settings: Any) -> Flux2Klein:
    given = {"model": str(model or folder()), "image_size": (48, 64), **settings}
    return Flux2Klein(Flux2Klein.Settings(**given), "cpu")


@pytest.fixture(scope="module")
def backbone() -> Flux2Klein:
    """Of a base model."""
    return klein()


@dataclass
class KleinUnderTest(BackboneUnderTest):
    """Its latents are packed on the way, and the autoencoder's at the end; its time is how much is noise."""

    def share_of(self, timestep: float) -> float:
        return self.backbone.share_of(timestep)  # type: ignore[attr-defined]

    def latents_of(self, latents: Any) -> Tensor:
        latents = torch.as_tensor(latents)
        if latents.ndim == 3:
            return unpack(latents, self.backbone.word_grids[0])
        return standardised(latents, *self.backbone._statistics())  # type: ignore[attr-defined]

    def returned(self, prediction: Tensor) -> Any:
        return (pack(prediction),)


def subject(*, distilled: bool = False, size: tuple[int, int] = (32, 48)) -> BackboneUnderTest:
    """With rectangular pictures."""
    with quiet():
        pipeline = Flux2KleinPipeline.from_pretrained(folder(distilled))
    return KleinUnderTest(klein(folder(distilled), steps=2, image_size=size), pipeline, takes_space=True)


@parametrize_with_checks([subject()])
def test_conforms(check: Callable[[Any], None], subject: Any) -> None:
    check(subject)


@pytest.mark.slow
def test_a_distilled_model_conforms() -> None:
    failed = [str(result) for result in check_backbone(subject(distilled=True)) if result.outcome == "failed"]
    assert not failed


# --- Formulas by hand -------------------------------------------------------------------------------------------------


def test_standardising_by_hand() -> None:
    """Each place of a square has a mean and a deviation of its own: (z - m) / s."""
    latents = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mean, deviation = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 4.0, 0.5])
    expected = torch.tensor([[[[0.0, 0.5], [0.5, 8.0]]]])
    torch.testing.assert_close(standardised(latents, mean, deviation), expected)
    torch.testing.assert_close(unstandardised(expected, mean, deviation), latents)


def test_packing_and_positions_are_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    squares = Flux2KleinPipeline._patchify_latents(latents)
    assert torch.equal(pack(latents), Flux2KleinPipeline._pack_latents(squares))
    places, positions = position_ids((3, 4), 5)
    assert torch.equal(places, Flux2KleinPipeline._prepare_latent_ids(squares)[0].float())
    assert torch.equal(positions, Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 5, 2))[0].float())


def assert_schedule_is_the_pipelines(backbone: Flux2Klein, steps: int) -> None:
    schedule, sigmas = backbone._sampler(), torch.linspace(1, 1 / steps, steps)
    schedule.set_timesteps(sigmas=sigmas.tolist(), mu=compute_empirical_mu(6 * 8, steps))
    torch.testing.assert_close(shifted(sigmas, backbone._shift()), schedule.sigmas[:-1])
    assert backbone.share_of(float(schedule.sigmas[1])) == pytest.approx(float(sigmas[1]))


# --- What is its own --------------------------------------------------------------------------------------------------


def test_a_base_model_takes_many_steps_with_guidance(backbone: Flux2Klein) -> None:
    """Where nobody says how many: 50, by which its schedule is shifted. A setting wins, and a call over it."""
    assert (backbone.passes(None, 4.0), backbone.passes(None, 1.0), backbone.passes(3, 4.0)) == (100, 50, 6)
    assert_schedule_is_the_pipelines(backbone, 50)


def test_a_distilled_model_takes_few_steps_and_no_guidance(caplog: pytest.LogCaptureFixture) -> None:
    """Its index says that it is one: 4 steps where nobody says how many, and nothing but these depends on the setting.
    That guidance is passed over is no news at every picture.
    """
    of_two_steps = subject(distilled=True, size=(48, 64))
    assert isinstance(of_two_steps.backbone, Flux2Klein) and of_two_steps.backbone.passes(None, 4.0) == 2
    backbone, taken = klein(folder(True)), list[int]()
    assert (backbone.passes(None, 4.0), backbone.passes(3, 4.0)) == (4, 3)
    for one in (backbone, of_two_steps.backbone):
        assert_schedule_is_the_pipelines(one, 4)
    backbone.transformer.register_forward_hook(lambda *_: taken.append(1))
    [with_guidance] = backbone.generate(["a cup"], seeds=[0])
    assert len(taken) == 4
    [without] = backbone.generate(["a cup"], seeds=[0], guidance_scale=1.0)
    assert with_guidance.tobytes() == without.tobytes() and not caplog.records
    expected = of_two_steps.reference_picture("a cup", 0, num_inference_steps=4)
    assert_same_pictures(with_guidance, expected)


def test_words_and_tokens_in_a_prompt(backbone: Flux2Klein) -> None:
    """A token is where its word would be, with the space before it; what is shown is padded, three layers wide."""
    token = {"<cup-0>": backbone.word_rows("cup")}
    [word] = backbone.token_positions("a red cup", ["cup"])
    [place] = backbone.token_positions("a red <cup-0>", ["<cup-0>"], token)
    assert word == place == [backbone._first_place + 2]
    plain, learned = backbone.encode_prompts(["a red cup"]), backbone.encode_prompts(["a red <cup-0>"], token)
    torch.testing.assert_close(plain.parts["sequence"], learned.parts["sequence"])
    assert plain.parts["sequence"].shape == (1, 512, 3 * 16)
    assert plain.parts["mask"].sum() < 40 and plain.parts["sequence"][:, -1].any()
    with pytest.raises(InputError, match=r"prompt too long, \d+ tokens of at most \d+: 'cup cup"):
        backbone.encode_prompts([" ".join(["cup"] * 600)])
    torch.testing.assert_close(backbone.embed_texts(["<cup-0>"], token), backbone.embed_texts(["cup"]))


@pytest.mark.slow
def test_a_tokenizer_that_pads_before_the_prompt(tmp_path: Path) -> None:
    """The padding is where the pipeline has it, and words are where they are then."""
    path = Path(shutil.copytree(folder(), tmp_path / "model"))
    change(path / "tokenizer" / "tokenizer_config.json", padding_side="left")
    with quiet():
        pipeline = Flux2KleinPipeline.from_pretrained(path)
    backbone = klein(path)
    assert backbone.token_positions("a red cup", ["cup"])[0][0] > 480
    encoded = backbone.encode_prompts(["a cup", "a red cup"])
    torch.testing.assert_close(encoded.parts["sequence"], pipeline.encode_prompt(["a cup", "a red cup"])[0])
    assert encoded.parts["mask"][:, -1].all() and not encoded.parts["mask"][:, 0].any()


def test_a_row_is_called_as_the_language_model(backbone: Flux2Klein) -> None:
    """Klein 9B reads prompts with a larger one, whose rows no other model's fit."""
    assert dict(backbone.rows) == {"qwen3_4b": 16}
    pipeline, one = tiny.tiny_flux2_klein_pipeline(), copy.copy(backbone)
    sizes = {"hidden_size": 4096, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(pipeline.tokenizer), num_hidden_layers=27, head_dim=2, **sizes)
    with torch.device("meta"):
        pipeline.text_encoder = Qwen3Model(config)
    assert list(one._text_encoders(pipeline)) == ["qwen3_8b"] and one.encoder == "qwen3_8b"
    config.num_hidden_layers = 26
    with pytest.raises(InputError, match="its text encoder has 26 layers; it should have 27 or more"):
        one._text_encoders(pipeline)


def test_places_divide_their_attention_among_the_prompt_and_the_picture(backbone: Flux2Klein) -> None:
    """In blocks of both kinds, and the prediction is the same bit for bit, in a batch and with a gradient."""
    noisy = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    at, encoded = torch.tensor([0.3, 0.8]), backbone.encode_prompts(["a cup", "a red cup"])
    plain = backbone._predicted(noisy, at, encoded)
    with backbone._seeing(True, True, 512) as seen:
        looked = backbone._predicted(noisy, at, encoded)
        words, pixels = seen()
    assert torch.equal(looked, plain) and torch.equal(backbone._predicted(noisy, at, encoded), plain)
    assert words is not None and pixels is not None
    assert (words.shape, pixels.shape) == ((2, 48, 512), (2, 48, 48))
    torch.testing.assert_close(words.sum(-1) + pixels.sum(-1), torch.ones(2, 48))


def test_the_weights_of_a_block_with_one_stream_by_hand(backbone: Flux2Klein) -> None:
    """The mean over heads of softmax(Q K^T / sqrt(d)), with queries and keys normed and rotated."""
    block = backbone.transformer.single_transformer_blocks[0].attn
    capture = Capture(words=True, pixels=True)
    generator = torch.Generator().manual_seed(0)
    states, angles = torch.randn(1, 9, 32, generator=generator), 3 * torch.rand(9, 16, generator=generator)
    rotary = (angles.cos(), angles.sin())
    with torch.no_grad():
        output = ParallelProcessor(capture, 0, 5)(block, states, image_rotary_emb=rotary)
        assert torch.equal(output, block(states, image_rotary_emb=rotary))
        heads = block.to_qkv_mlp_proj(states)[..., : 3 * 32].unflatten(-1, (3, 2, 16)).unbind(2)
        query, key = (
            apply_rotary_emb(norm(one), rotary, sequence_dim=1)
            for norm, one in zip((block.norm_q, block.norm_k), heads[:2], strict=True)
        )
        weights = (torch.einsum("bnhd,bmhd->bhnm", query, key) / 4).softmax(-1).mean(1)[:, 5:]
    words, pixels = capture.seen()
    assert words is not None and pixels is not None
    torch.testing.assert_close(torch.cat([words, pixels], dim=-1), weights)


@pytest.mark.slow
def test_saving_memory_changes_nothing() -> None:
    """Gradients of rows through maps and prediction, and pictures, with blocks computed twice and parts in turn."""

    def results(**settings: Any) -> list[Tensor]:
        backbone = klein(**settings)
        rows = {name: row.clone().requires_grad_() for name, row in backbone.word_rows("cup").items()}
        encoded = backbone.encode_prompts(["a photo of <x>"], {"<x>": rows})
        noisy = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        seen = backbone.predict(noisy, torch.tensor([0.4]), encoded, Look(words=(8,), pixels=(8,)))
        weighing = torch.linspace(0, 1, seen.attention.words[0].numel()).view_as(seen.attention.words[0])
        (seen.output.square().mean() + (seen.attention.words[0] * weighing).sum()).backward()
        [image] = backbone.generate(["a cup"], seeds=[3], steps=1)
        gradient = rows["qwen3_4b"].grad
        assert gradient is not None
        return [gradient, torch.tensor(list(image.tobytes()))]

    plain = results(gradient_checkpointing=False)
    for settings in ({"gradient_checkpointing": True}, {"low_memory": "on"}):
        for one, other in zip(results(**settings), plain, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_half_precision() -> None:
    """bfloat16 is close to float32, in the language model, too, and rows get float32 gradients."""
    backbone, plain = klein(dtype="bfloat16"), klein()
    assert backbone.transformer.dtype == backbone._text.table.dtype == torch.bfloat16
    assert backbone._vae.bn.running_mean.dtype == torch.float32
    rows = {name: row.requires_grad_() for name, row in backbone.word_rows("cup").items()}
    noisy = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    output = backbone.predict(noisy, torch.tensor([0.5]), backbone.encode_prompts(["a <x>"], {"<x>": rows})).output
    output.square().mean().backward()
    assert output.dtype == torch.float32
    assert all(row.grad is not None and row.grad.dtype == torch.float32 and row.grad.any() for row in rows.values())
    expected = plain.predict(noisy, torch.tensor([0.5]), plain.encode_prompts(["a cup"])).output
    assert float((output.detach() - expected).norm() / expected.norm()) < 0.1
    assert backbone.generate(["a cup"], seeds=[0], steps=1)[0].size == (64, 48)


@pytest.mark.slow
def test_pictures_of_any_shape() -> None:
    backbone = klein(image_size=None)
    assert backbone.image_size == (512, 512)  # 128 latents of 4 pixels
    assert backbone.for_picture(100, 200).image_size == (360, 720)
    with pytest.raises(InputError, match=r"image_size = \[44, 64\]: both sides must be multiples of 8$"):
        klein(image_size=(44, 64))


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "made for Flux2Pipeline; supported is Flux2KleinPipe"),
        ("model_index.json", {"text_encoder": ["transformers", "Qwen3Model"]}, "text_encoder is a Qwen3Model"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": False, "shift": 0}, "shift is 0; .* above 0"),
        ("transformer/config.json", {"joint_attention_dim": 24}, "transformer"),
    ],
)
def test_a_wrong_folder_is_one_line(file: str, values: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder(), tmp_path / "model"))
    change(path / file, **values)
    with pytest.raises(InputError, match=rf"^backbone\.model = .*{says}") as error:
        klein(path)
    assert "\n" not in str(error.value)


# --- ConceptAttention -------------------------------------------------------------------------------------------------


def test_concepts_do_not_change_the_picture_and_share_its_places(backbone: Flux2Klein) -> None:
    noisy = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    at, prompts = torch.tensor([0.2, 0.8]), backbone.encode_prompts(["a photo of a cup"] * 2)
    with torch.no_grad():
        plain = backbone.predict(noisy, at, prompts).output
        states = backbone._concept_states(["cup", "table"], {})
        with backbone._reading(backbone.transformer.context_embedder(states).expand(2, -1, -1)) as read:
            beside = backbone.predict(noisy, at, prompts).output
    assert len(read) == 1 and torch.equal(beside, plain)
    assert not any(module._forward_hooks for module in backbone.transformer.modules())
    maps = backbone.concept_maps(noisy, at, prompts, ["cup", "table"])
    assert maps.shape == (2, 2, 6, 8) and float(maps.min()) >= 0
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 6, 8))
    torch.testing.assert_close(maps, read[0].unflatten(2, (6, 8)))
    assert not torch.allclose(maps[0], maps[1])
    token = {"<cup-0>": backbone.word_rows("cup")}
    assert backbone.concept_maps(noisy, at, prompts, ["<cup-0>", "table"], token).shape == maps.shape


def test_the_prompt_itself_as_concepts(backbone: Flux2Klein, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concepts that are the text, and are where it is, become what the text becomes; else all are where a prompt's
    first word is.
    """
    noisy = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    at, prompts = torch.tensor([0.5]), backbone.encode_prompts(["a photo of a cup"])
    given = {"encoder_hidden_states": torch.zeros(1, 512, 1), "image_rotary_emb": (torch.arange(560.0)[:, None],) * 2}
    angles = backbone._concept_arguments(given, 3)["image_rotary_emb"][0].flatten().tolist()
    assert angles == [backbone._first_place] * 3 + list(range(512, 560))
    capture = Capture(outputs=True)
    monkeypatch.setattr(backbone, "_concept_arguments", lambda given, _: dict(given))
    with torch.no_grad():
        with backbone._capturing_outputs(capture):
            backbone.predict(noisy, at, prompts)
        with backbone._reading(backbone.transformer.context_embedder(prompts.parts["sequence"])) as maps:
            backbone.predict(noisy, at, prompts)
    of_text, of_places = capture.outputs[1]  # the second of two blocks
    torch.testing.assert_close(maps[0], shares_of_concepts(of_text, of_places), atol=1e-5, rtol=1e-4)


# --- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than high, with a red square."""
    return write_photo(tmp_path_factory.mktemp("photo") / "photo.png", width=64)


def picture_in_the_pipeline(run: Path, record: BackboneRecord, prompt: str) -> Any:
    """What the lines for diffusers draw as they stand, of two steps; a distilled model passes over the guidance."""
    code = python_code(RunDirectory(run), str(run), record.pipeline_source or "", record, prompt)
    how = "num_inference_steps=2, height=48, width=64, generator=torch.Generator().manual_seed(1), guidance_scale=3.0"
    scope: dict[str, Any] = {"torch": torch}
    exec(code.replace(").images", f", {how}).images"), scope)
    return scope["image"]


def assert_same_pictures(one: Any, other: Any) -> None:
    assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


def test_tokens_in_the_pipeline(backbone: Flux2Klein, tmp_path: Path) -> None:
    """The lines for diffusers draw what icekit draws, with guidance."""
    generator, row = torch.Generator().manual_seed(0), backbone.word_rows("cup")["qwen3_4b"]
    tokens = {
        name: {"qwen3_4b": row.std() * torch.randn(row.shape, generator=generator)}
        for name in ("<cup-0>", "<cup-0-colour>")
    }
    RunDirectory(tmp_path).save_learned(Learned(tokens))
    facts = {name: getattr(backbone, name) for name in BackboneRecord.model_fields if hasattr(backbone, name)}
    record = BackboneRecord.model_validate(json.loads(json.dumps(facts)))
    assert not record.pipeline_loads_tokens and record.pipeline_takes_space
    prompt = "a photo of a <cup-0-colour> <cup-0>"
    [own] = backbone.generate([prompt], seeds=[1], tokens=tokens, steps=2, guidance_scale=3.0)
    assert_same_pictures(own, picture_in_the_pipeline(tmp_path, record, prompt))
    [plain] = backbone.generate(["a photo of a cup"], seeds=[1], steps=2, guidance_scale=3.0)
    assert np.abs(np.asarray(own, float) - np.asarray(plain, float)).max() > 1


def test_the_family_is_read_from_the_model() -> None:
    given = Settings.model_validate({"backbone": {"model": str(folder())}})
    assert installed().resolve(given).components.backbone == "flux2-klein"


@pytest.mark.slow
def test_two_runs_mixed_and_in_the_pipeline(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the program; the family is read from the model. The lines for diffusers draw what icekit draws."""
    call = with_what_is_installed(tmp_path, monkeypatch, capsys)
    values = ("backbone.image_size=[48, 64]", "backbone.steps=1", "retriever.words=cup", "learner.steps=2", "samples=1")
    for run, segmentor in (("one", "conceptattention"), ("two", "xattn")):
        components = ["--retriever", "words", "--segmentor", segmentor, "--attribute", "colour", "--device", "cpu"]
        sets = [f"--set={value}" for value in values]
        status, _, err = call("run", photo, "--model", folder(True), "--out", tmp_path / run, *components, *sets)
        assert status == 0, err
    runs = [f"{name}={tmp_path / run}" for name, run in (("a", "one"), ("b", "two"))]
    status, _, err = call("compose", "{a.colour} {b} on a table", *runs, "--n", "1", "--out", tmp_path / "made")
    assert status == 0, err
    with Image.open(next((tmp_path / "made").glob("*.png"))) as picture:
        assert picture.size == (64, 48)

    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["components"]["backbone"] == "flux2-klein"
    record = BackboneRecord.model_validate(manifest["backbone"])
    assert dict(record.rows) == {"qwen3_4b": 16}
    assert not record.pipeline_loads_tokens and record.pipeline_takes_space
    place, prompt = tmp_path / "one", "a photo of a <cup-0-instance> <cup-0>"
    [own] = klein(folder(True)).generate([prompt], seeds=[1], tokens=open_run(place).tokens, steps=2)
    assert_same_pictures(own, picture_in_the_pipeline(place, record, prompt))
