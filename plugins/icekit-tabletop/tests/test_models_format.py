"""Formats: random models written as the export writes them load in open_clip and diffusers and agree."""

from __future__ import annotations

import math
import random
import shutil
from datetime import UTC
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from icekit_tabletop.backbone import Tabletop
from icekit_tabletop.evaluate import intersection_over_union, word_attention
from icekit_tabletop.tokenizer import build_tokenizer
from icekit_tabletop.train.batches import draw_caption, draw_timesteps
from icekit_tabletop.train.checkpoint import MovingAverage, Run, load_state, save_state
from icekit_tabletop.train.clip import build_clip, clip_config, contrastive_loss, encode_captions, enlarge
from icekit_tabletop.train.data import SceneWords
from icekit_tabletop.train.export import REGION_SHARE, export_models, write_clip
from icekit_tabletop.train.grounding import VARIANTS, build_word_bank, grounding_loss
from icekit_tabletop.train.image_tower import NO_OBJECT, PhraseBank, bank_loss, build_bank
from icekit_tabletop.train.settings import Settings
from icekit_tabletop.train.shipped import continue_models
from icekit_tabletop.train.text_tower import build_text_encoder
from icekit_tabletop.train.unet import build_painter, end_states, learning_rate
from icekit_tabletop.train.vae import build_vae
from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES, ObjectSpec, is_held_out
from safetensors.torch import load_file

TEXTS = ["a red metal ball", "cup", "", "a blue striped wood cup and a white glass vase on a table"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with checkpoints of untrained models, and their export in it."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("work")
    clip = build_clip()
    painter = build_painter(build_text_encoder(clip.state_dict(), build_tokenizer()))
    with torch.no_grad():
        next(parameter for name, parameter in painter["text"].named_parameters() if "fc2" in name).add_(0.1)
    for name, module in (("clip", clip), ("vae", build_vae()), ("unet", painter)):
        state = {f"average/{key}": value for key, value in module.state_dict().items()}
        extra = {"scaling_factor": 0.5} if name == "vae" else {}
        save_state(work / f"{name}.safetensors", state, {"seen": 1, "extra": extra})
    export_models(Settings(work=work, models=work / "models"))
    return work


def test_text_towers_agree() -> None:
    torch.manual_seed(1)
    clip, tokenizer = build_clip().eval(), build_tokenizer()
    clip.attn_mask = clip.attn_mask.float()
    weights = clip.state_dict()
    encoder = build_text_encoder(weights, tokenizer)
    tokens = tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    hidden: list[torch.Tensor] = []
    handle = clip.ln_final.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.no_grad():
        pooled = clip.encode_text(tokens, normalize=True)
        output = encoder(tokens)
    handle.remove()
    torch.testing.assert_close(output.last_hidden_state, hidden[0], atol=1e-4, rtol=0)
    projected = torch.nn.functional.normalize(output.pooler_output @ weights["text_projection"], dim=-1)
    torch.testing.assert_close(projected, pooled, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(encode_captions(clip, tokens), pooled, atol=1e-4, rtol=0)


def test_towers_of_other_shapes_are_refused() -> None:
    weights = build_clip().state_dict()
    del weights["transformer.resblocks.3.ln_2.bias"]
    with pytest.raises((ValueError, RuntimeError)):
        build_text_encoder(weights, build_tokenizer())


def test_open_clip_loads_the_export(exported: Path) -> None:
    source = f"local-dir:{exported / 'models' / 'open-clip'}"
    model, preprocess = open_clip.create_model_from_pretrained(source)
    tokens = open_clip.get_tokenizer(source)(TEXTS)
    with torch.no_grad():
        assert model.encode_text(tokens).shape == (4, 128)
        assert model.encode_image(enlarge(torch.zeros(2, 3, 64, 64))).shape == (2, 128)
    assert "Resize(size=128" in str(preprocess)


def test_diffusers_loads_the_export(exported: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(str(exported / "models" / "stable-diffusion"))
    assert {pipeline.vae.dtype, pipeline.unet.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.safety_checker is None
    assert {block.attn2.heads for block in pipeline.unet.mid_block.attentions[0].transformer_blocks} == {4}
    image = pipeline(
        TEXTS[0], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert image.shape == (1, 64, 64, 3)


def test_words_alone_are_attended_to(exported: Path) -> None:
    backbone = Tabletop(Tabletop.Settings(model=str(exported / "models" / "stable-diffusion")), "cpu")
    maps = word_attention(backbone, torch.zeros(2, 3, 64, 64), TEXTS[:2], 0.15, torch.Generator().manual_seed(0))
    assert maps.shape == (2, 6, 16, 16)  # start, at most four words, end
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 16, 16))
    assert maps[:, -1].max() < 1e-6  # end


def test_intersection_over_union() -> None:
    one, other = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert intersection_over_union(one, other) == pytest.approx(1 / 3)
    assert intersection_over_union(one & ~one, other & ~other) == 1.0


def test_the_export_is_small_and_holds_no_pickle(exported: Path) -> None:
    files = [path for path in (exported / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_export_again_replaces(exported: Path) -> None:
    export_models(Settings(work=exported, models=exported / "models"))
    names = sorted(path.name for path in (exported / "models").iterdir())
    assert names == ["history.json", "open-clip", "stable-diffusion"]


def test_export_without_anything_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to export"):
        export_models(Settings(work=tmp_path, models=tmp_path / "models"))


def test_the_exported_image_tower_lies_between_its_two_stages(exported: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "clip.safetensors", tmp_path)
    towers = []
    for seed, stage in enumerate(("clip-image", "clip-regions")):
        torch.manual_seed(seed)
        towers.append(build_clip().visual.state_dict())
        state = {f"average/{name}": tensor for name, tensor in towers[-1].items()}
        save_state(tmp_path / f"{stage}.safetensors", state, {"seen": 1, "extra": {}})
        export_models(Settings(work=tmp_path, models=tmp_path / stage))
    before, between = (
        load_file(tmp_path / stage / "open-clip" / "open_clip_model.safetensors")
        for stage in ("clip-image", "clip-regions")
    )
    name = "attnpool.c_proj.weight"
    torch.testing.assert_close(before[f"visual.{name}"], towers[0][name].half())
    mixed = (1 - REGION_SHARE) * towers[0][name] + REGION_SHARE * towers[1][name]
    torch.testing.assert_close(between[f"visual.{name}"].float(), mixed, rtol=2e-3, atol=1e-5)


def test_training_continues_from_the_shipped_weights(exported: Path, tmp_path: Path) -> None:
    continue_models(Settings(work=tmp_path, models=exported / "models"))
    for stage in ("clip", "vae", "unet"):
        before, _ = load_state(exported / f"{stage}.safetensors", "average/")
        after, info = load_state(tmp_path / f"{stage}.safetensors", "weights/")
        assert info["seen"] == 1
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if name.startswith("eyes."):
                continue  # they are not exported
            torch.testing.assert_close(after[name], tensor.half().to(tensor.dtype), rtol=0, atol=0)
    decoder, _ = load_state(tmp_path / "decoder.safetensors", "weights/")
    assert {name.split(".")[0] for name in decoder} == {"decoder", "post_quant_conv"}
    tower, _ = load_state(tmp_path / "clip-image.safetensors", "weights/")
    assert build_clip().visual.load_state_dict(tower)
    assert info["extra"] == {} and load_state(tmp_path / "vae.safetensors")[1]["extra"] == {"scaling_factor": 0.5}


def test_a_picture_is_held_against_every_phrase_of_a_family() -> None:
    bank = build_bank(build_clip(), ("colour", "material", "shape"), random.Random(0))
    names = [tuple(values) for values in (SHAPES, COLOURS, MATERIALS)]
    combinations = [tuple(n[i] for n, i in zip(names, code, strict=False)) for code in bank.codes.tolist()]
    assert len(set(combinations)) == len(combinations) > 300
    assert not any(is_held_out(*combination) for combination in combinations)

    # Two phrases of shapes 0 and 1, three wordings alike; one picture of a shape 0, one of both, one of nothing.
    bank = PhraseBank(torch.eye(2).repeat(3, 1, 1), torch.tensor([[0, -1, -1, -1], [1, -1, -1, -1]]))
    scenes = torch.full((3, 4, 4), -2)
    scenes[0, 0], scenes[1, 0], scenes[1, 1] = torch.tensor([0, 3, 2, 1]), torch.tensor([1, 0, 0, 0]), torch.zeros(4)
    assert bank.truth(scenes).tolist() == [[True, False], [True, True], [False, False]]
    nothing = PhraseBank(bank.embeddings, torch.tensor([[0, -1, -1, -1], [NO_OBJECT, -1, -1, -1]]))
    assert nothing.truth(scenes).tolist() == [[True, False], [True, False], [False, True]]
    images = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    loss = bank_loss(images, bank, torch.tensor([0, 2]), scenes, scale=10.0)
    # First picture: log(1 + exp(8 - 6)); second: no rival, nothing to lose; third: no true phrase, left out.
    assert loss.item() == pytest.approx(math.log1p(math.exp(2.0)) / 2, rel=1e-5)


def test_some_captions_of_many_objects_name_one() -> None:
    items = (ObjectSpec("cup", "red", "metal", "plain"), ObjectSpec("ball", "blue", "wood", "plain"))
    scene = SceneWords(items, "oak", "white")
    rng = random.Random(0)
    captions = [draw_caption(scene, rng, 0.0)[0].text for _ in range(2000)]
    both = sum("cup" in text and "ball" in text for text in captions)
    one = sum(("cup" in text) != ("ball" in text) for text in captions)
    # 0.15 say nothing; of the others 0.1 name one of two: 0.085 of all, and 0.765 both
    assert 1450 < both < 1610 and 120 < one < 220 and captions.count("") == 2000 - both - one


def test_write_clip_takes_other_sizes(tmp_path: Path) -> None:
    config = clip_config()
    config["model_cfg"]["embed_dim"] = 16
    config["model_cfg"]["vision_cfg"] |= {"width": 16}
    write_clip(tmp_path, open_clip.CLIP(**config["model_cfg"]).state_dict(), config)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    assert model.encode_image(torch.zeros(1, 3, 128, 128)).shape == (1, 16)


def _train(work: Path, total: int, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    module = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    with Run(Settings(work=work), "toy", module, optimiser, total, 0.9) as run:
        while not run.finished and run.seen != stop_at:
            torch.manual_seed(run.step)
            loss = (module(torch.randn(4, 3)) - 1).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            run.advance(4, {"loss": loss.item()})
    return load_state(work / "toy.safetensors")[0]


def test_a_stopped_run_continues_exactly(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", 40)
    (tmp_path / "parts").mkdir(exist_ok=True)
    _train(tmp_path / "parts", 40, stop_at=16)
    resumed = _train(tmp_path / "parts", 40)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_moving_average_starts_quickly_and_follows() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(module, 0.999)
    with torch.no_grad():
        module.weight.fill_(5.0)
    for step in range(1, 60):
        average.update(module, step)
    assert float(average.state["weight"]) == pytest.approx(5.0, abs=0.05)


def test_accidentally_true_pairs_are_no_negatives() -> None:
    image = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    truth = torch.ones(3, 3, dtype=torch.bool)
    loss = contrastive_loss(image, image.clone(), truth, torch.tensor(10.0))
    assert float(loss) == pytest.approx(0.0, abs=1e-5)


def test_grounding_wants_places_for_true_words_and_none_for_others() -> None:
    families = [slice(i, i + 1) for i in range(4)]  # one word each; the first weighs two of five
    shares = torch.full((1, 16, 4), 0.5)  # 16 places: the largest one counts
    true = torch.tensor([[True, False, False, False]])
    log2 = math.log(2)
    expected = (2 * (0.5 * 0.5 + log2) + 3 * (0.5 * 0.5 + 3 * log2)) / 5
    assert float(grounding_loss(shares, true, families)) == pytest.approx(expected, rel=1e-5)
    assert float(grounding_loss(shares[:0], true[:0], families)) == 0


def test_the_word_bank_knows_where_its_words_are() -> None:
    tokenizer = build_tokenizer()
    bank = build_word_bank(tokenizer, random.Random(0), torch.device("cpu"))
    phrases = bank.draw(torch.Generator().manual_seed(0))
    assert bank.places.shape == (len(bank.words), VARIANTS) and phrases.ids.shape[0] == len(bank.words)
    for word, ids, place in zip(bank.words, phrases.ids, phrases.places, strict=True):
        assert tokenizer.decode(ids[place]).strip() == word
    hidden = torch.randn(len(bank.words), phrases.ids.shape[1], 5)
    states = phrases.states(hidden)
    assert torch.equal(states[0], hidden[0, 0]) and torch.equal(states[3], hidden[2, phrases.places[2]])

    codes = np.full((1, 4, 4), -1)
    codes[0, 0] = [list(SHAPES).index("cup"), list(COLOURS).index("red"), list(MATERIALS).index("metal"), 0]
    true = [word for word, here in zip(bank.words, bank.present(codes)[0], strict=True) if here]
    assert true[:3] == ["cup", "red", "metal"] and len(true) == 4


def test_the_text_tower_learns_along_but_for_its_embeddings() -> None:
    tokenizer = build_tokenizer()
    text = build_painter(build_text_encoder(build_clip().state_dict(), tokenizer))["text"]
    still = {name for name, parameter in text.named_parameters() if not parameter.requires_grad}
    assert {name.rsplit(".", 2)[-2] for name in still} == {"token_embedding", "position_embedding"}
    ids = tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    output = text(ids)
    assert torch.equal(end_states(output.last_hidden_state, ids), output.pooler_output)


def test_timesteps_mix_noisy_and_clear_and_rates_rise_and_fall() -> None:
    steps = draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert int(steps.min()) >= 0
    assert int(steps.max()) <= 999
    # 0.85 of them 1000 u^0.7, mean 588; 0.15 uniform below 450, mean 225; together 534, and 0.42 of them below 450
    assert float(steps.float().mean()) == pytest.approx(534, abs=15)
    assert float((steps < 450).float().mean()) == pytest.approx(0.422, abs=0.03)
    assert learning_rate(1.0, 0.0, 0) < learning_rate(1.0, 0.5, 10_000) > learning_rate(1.0, 0.99, 10_000) > 0


def test_time_caps(tmp_path: Path) -> None:
    from datetime import datetime

    noon = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
    assert Settings(work=tmp_path).minutes_left(5, noon) is None
    assert Settings(work=tmp_path, minutes=8).minutes_left(5, noon) == 3
    assert Settings(work=tmp_path, minutes=8, until="12:01").minutes_left(5, noon) == 1
    assert Settings(work=tmp_path, until="11:00").minutes_left(0, noon) == 0
