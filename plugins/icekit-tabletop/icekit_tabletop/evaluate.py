"""`python -m icekit_tabletop.evaluate {clip,vae,attention,images}`: how good the trained models are, on scenes of seeds
that training never saw. Masks serve here as ground truth only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from icekit.pixels import to_tensor
from icekit.protocols import Look
from icekit_tabletop.backbone import Tabletop
from icekit_tabletop.captions import describe
from icekit_tabletop.probe import shipped_probe
from icekit_tabletop.render import render_batch
from icekit_tabletop.train.clip import enlarge
from icekit_tabletop.train.data import EVALUATION_SEED, VALUES, scene_of_count
from icekit_tabletop.train.settings import IMAGE_SIZE, MODELS_FOLDER
from icekit_tabletop.train.vae import image_quality
from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES, SceneSpec, Split, is_held_out

TEMPLATES: dict[str, tuple[str, ...]] = {
    "shape": ("{}", "a {}", "a photo of a {}", "a picture of a {}"),
    "colour": ("a {} thing", "a photo of a {} object", "the colour {}"),
    "material": ("a {} thing", "a photo of a {} object", "a thing made of {}"),
    "texture": ("a {} thing", "a photo of a {} object", "a {} texture"),
}

BATCH = 24
"""Images generated at once."""


@dataclass(frozen=True)
class Options:
    """What is evaluated and how; `models` holds the exported folders."""

    models: Path = MODELS_FOLDER
    device: str = "cpu"
    n: int = 500
    split: Split = "held-out"
    share: float = 0.15
    steps: int = 20
    guidance: float = 4.0
    sheet: Path | None = None


def scenes_of(n: int, counts: Sequence[int], split: Split, offset: int = 0) -> list[SceneSpec]:
    """`n` evaluation scenes with these numbers of objects in turn."""
    return [scene_of_count(EVALUATION_SEED + offset + i, counts[i % len(counts)], split) for i in range(n)]


def render(scenes: Sequence[SceneSpec]) -> tuple[Tensor, Tensor]:
    """Float images in -1..1, [N, 3, 64, 64], and bool masks, [N, 4, 64, 64]."""
    parts = [render_batch(scenes[i : i + 50], IMAGE_SIZE) for i in range(0, len(scenes), 50)]
    return torch.cat([part[0] for part in parts]).float() / 127.5 - 1, torch.cat([part[1] for part in parts])


def _load_pipeline(options: Options) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(str(options.models / "stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(options.device)


def _load_backbone(options: Options) -> Tabletop:
    return Tabletop(
        Tabletop.Settings(model=str(options.models / "stable-diffusion"), images_at_once=BATCH), options.device
    )


@torch.no_grad()
def evaluate_clip(options: Options) -> dict[str, float]:
    """Zero-shot accuracy on single objects, and the share of two- and three-object scenes in which every shape present
    ranks above every shape absent.
    """
    source = f"local-dir:{options.models / 'open-clip'}"
    model, _ = open_clip.create_model_from_pretrained(source, device=options.device)
    tokenizer = open_clip.get_tokenizer(source)

    def embed(images: Tensor) -> Tensor:
        parts = [enlarge(part) for part in images.to(options.device).split(100)]
        return torch.cat([model.encode_image(part, normalize=True) for part in parts])

    def prompts(attribute: str) -> Tensor:
        embeddings = [
            model.encode_text(
                tokenizer([template.format(value) for template in TEMPLATES[attribute]]).to(options.device),
                normalize=True,
            ).mean(0)
            for value in VALUES[attribute]
        ]
        return F.normalize(torch.stack(embeddings), dim=-1)

    result: dict[str, float] = {}
    singles = scenes_of(options.n, (1,), options.split)
    features = embed(render(singles)[0])
    for attribute, values in VALUES.items():
        truth = torch.tensor([values.index(getattr(scene.objects[0].spec, attribute)) for scene in singles])
        found = (features @ prompts(attribute).T).argmax(1).cpu()
        result[attribute] = float((found == truth).float().mean())
    groups = scenes_of(options.n, (2, 3), options.split, offset=1_000_000)
    scores = (embed(render(groups)[0]) @ prompts("shape").T).cpu()
    apart = 0
    for scene, row in zip(groups, scores, strict=True):
        present = torch.tensor([shape in {item.spec.shape for item in scene.objects} for shape in VALUES["shape"]])
        apart += bool(row[present].min() > row[~present].max())
    result["shapes_ranked"] = apart / len(groups)
    return result


@torch.no_grad()
def evaluate_vae(options: Options) -> dict[str, float]:
    """PSNR of the autoencoder in dB, and the standard deviation of the scaled latents (1 is ideal)."""
    vae = _load_pipeline(options).vae
    images = render(scenes_of(options.n, (1, 2, 3, 4), options.split, offset=2_000_000))[0]
    quality, latents = [], []
    for part in images.to(options.device).split(50):
        mean = vae.encode(part).latent_dist.mean
        latents.append(mean * vae.config.scaling_factor)
        quality.append(image_quality(vae.decode(mean).sample, part) * len(part))
    return {"psnr": sum(quality) / len(images), "latent_deviation": float(torch.cat(latents).std())}


@torch.no_grad()
def word_attention(
    backbone: Tabletop, images: Tensor, prompts: list[str], share: float, generator: torch.Generator
) -> Tensor:
    """Cross-attention at 16x16, mean over all layers of that grid: [B, tokens, 16, 16].

    `images` in -1..1, [B, 3, 64, 64], are noised to this share of the noise schedule and denoised under their prompts
    once, attending to the words alone as the backbone does.
    """
    latents = backbone.encode_images(images.to(backbone.device) / 2 + 0.5)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    shares = torch.full((len(images),), share, device=backbone.device)
    noisy = backbone.add_noise(latents, noise, shares)
    [maps] = backbone.predict(noisy, shares, backbone.encode_prompts(prompts), Look(words=(16,))).attention.words
    return maps.float().cpu()


def intersection_over_union(found: Tensor, truth: Tensor) -> float:
    """IoU of two bool masks of one shape."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


@torch.no_grad()
def evaluate_attention(options: Options) -> dict[str, float]:
    """Mean IoU between a word's attention, thresholded at half its maximum, and the true mask of its object.

    `full_*`: the word within the caption that names everything; `bare_*`: within "a photo of a <word>". `single`
    and `group` (two or three objects) tell scenes apart; objects whose word another object shares are passed over.
    """
    backbone = _load_backbone(options)
    generator = torch.Generator().manual_seed(0)
    scores: dict[str, list[float]] = {}
    scenes = scenes_of(options.n, (1, 2, 1, 3), options.split, offset=3_000_000)
    images, masks = render(scenes)
    cases: list[tuple[int, str, str, str, Tensor]] = []
    for row, scene in enumerate(scenes):
        specs = [item.spec for item in scene.objects]
        kind = "single" if len(specs) == 1 else "group"
        for place, spec in enumerate(specs):
            for attribute in ("shape", "colour"):
                word = getattr(spec, attribute)
                if sum(getattr(other, attribute) == word for other in specs) > 1 or not masks[row, place].any():
                    continue
                cases.append((row, f"full_{attribute}_{kind}", describe(specs), word, masks[row, place]))
                cases.append((row, f"bare_{attribute}_{kind}", f"a photo of a {word}", word, masks[row, place]))
    for start in tqdm(range(0, len(cases), 50), desc="attention", file=sys.stderr):
        part = cases[start : start + 50]
        maps = word_attention(
            backbone, images[[case[0] for case in part]], [case[2] for case in part], options.share, generator
        )
        for (_, name, prompt, word, mask), attention in zip(part, maps, strict=True):
            [place, *_] = backbone.token_positions(prompt, [word])[0]
            large = F.interpolate(attention[None, None, place], size=IMAGE_SIZE, mode="bilinear")[0, 0]
            scores.setdefault(name, []).append(intersection_over_union(large >= 0.5 * large.max(), mask))
    return {name: sum(values) / len(values) for name, values in sorted(scores.items())}


def generate(backbone: Tabletop, prompts: Sequence[str], options: Options) -> Tensor:
    """Images generated as icekit does, in -1..1, [N, 3, 64, 64], the same for the same prompts."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="images", file=sys.stderr):
        part = prompts[start : start + BATCH]
        images += backbone.generate(
            part,
            seeds=range(start, start + len(part)),
            steps=options.steps,
            guidance_scale=options.guidance,
        )
    return torch.stack([to_tensor(image) for image in images]) * 2 - 1


def write_sheet(images: Tensor, path: Path, columns: int = 10) -> None:
    """A PNG of the images (-1..1, [N, 3, H, W]) in rows, enlarged twice."""
    pad = -len(images) % columns
    padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, pad))
    grid = padded.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def evaluate_images(options: Options) -> dict[str, float]:
    """What a classifier trained on renders reads from generated images.

    `shape`, `colour`, `material`: share of "a <colour> <material> <shape>" read back, `all_three` together; `binding`:
    of "a <colour> <shape> and a <colour> <shape>", images in which the two pairs asked for are likelier than with
    their colours exchanged; `both_found`: those in which both pairs are found. `probe_*`: the same on renders, the
    most that could be reached.
    """
    probe = shipped_probe()
    backbone = _load_backbone(options)
    rng = random.Random(0)
    combinations = [
        (shape, colour, material)
        for shape in SHAPES
        for colour in COLOURS
        for material in MATERIALS
        if options.split == "any" or is_held_out(shape, colour, material) == (options.split == "held-out")
    ]
    wanted = rng.sample(combinations, len(combinations))
    wanted = [wanted[i % len(wanted)] for i in range(options.n)]
    pairs = [(rng.sample(VALUES["shape"], 2), rng.sample(VALUES["colour"], 2)) for _ in range(options.n)]
    singles = generate(backbone, [f"a {colour} {material} {shape}" for shape, colour, material in wanted], options)
    doubles = generate(backbone, [f"a {c[0]} {s[0]} and a {c[1]} {s[1]}" for s, c in pairs], options)
    if options.sheet is not None:
        write_sheet(torch.cat([singles[:50], doubles[:50]]), options.sheet)
    result = {**_read_singles(probe, singles, wanted), **_read_pairs(probe, doubles, pairs)}

    rendered = scenes_of(options.n, (1,), options.split, offset=4_000_000)
    specs = [scene.objects[0].spec for scene in rendered]
    real = _read_singles(probe, render(rendered)[0], [(s.shape, s.colour, s.material) for s in specs])
    couples = [
        scene
        for scene in scenes_of(2 * options.n, (2,), "any", offset=5_000_000)
        if len({o.spec.shape for o in scene.objects}) == len({o.spec.colour for o in scene.objects}) == 2
    ]
    named = [([o.spec.shape for o in scene.objects], [o.spec.colour for o in scene.objects]) for scene in couples]
    real |= _read_pairs(probe, render(couples)[0], named)
    return result | {f"probe_{name}": value for name, value in real.items()}


def _read_singles(probe: torch.nn.Module, images: Tensor, wanted: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    outputs = probe(images)[:3]
    names = (VALUES["shape"], VALUES["colour"], VALUES["material"])
    truth = torch.tensor([[values.index(value) for values, value in zip(names, item, strict=True)] for item in wanted])
    right = torch.stack([output.argmax(1) for output in outputs], dim=1) == truth
    shares = right.float().mean(0).tolist()
    return {
        "shape": shares[0],
        "colour": shares[1],
        "material": shares[2],
        "all_three": float(right.all(1).float().mean()),
    }


def _read_pairs(
    probe: torch.nn.Module, images: Tensor, pairs: Sequence[tuple[list[str], list[str]]]
) -> dict[str, float]:
    logits = probe(images)[3]
    bound = found = 0
    for row, (shapes, colours) in zip(logits, pairs, strict=True):
        first, second = (VALUES["shape"].index(shape) for shape in shapes)
        one, two = (VALUES["colour"].index(colour) for colour in colours)
        bound += bool(row[first, one] + row[second, two] > row[first, two] + row[second, one])
        found += bool(min(row[first, one], row[second, two]) > 0)
    return {"binding": bound / len(pairs), "both_found": found / len(pairs)}


EVALUATIONS: dict[str, Callable[[Options], dict[str, float]]] = {
    "clip": evaluate_clip,
    "vae": evaluate_vae,
    "attention": evaluate_attention,
    "images": evaluate_images,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one evaluation and prints its figures."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m icekit_tabletop.evaluate", description="Measure the trained models."
    )
    parser.add_argument("what", choices=EVALUATIONS)
    parser.add_argument("--models", type=Path, default=defaults.models, help="folder of the exported models")
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--n", type=int, default=defaults.n, help="scenes or images")
    parser.add_argument("--split", choices=("held-out", "train", "any"), default=defaults.split)
    parser.add_argument("--share", type=float, default=defaults.share, help="of the noise, for attention; 0 to 1")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of sampling")
    parser.add_argument("--guidance", type=float, default=defaults.guidance)
    parser.add_argument("--sheet", type=Path, help="PNG to write generated images to")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given: dict[str, Any] = vars(parser.parse_args(argv))
    what, as_json = given.pop("what"), given.pop("json")
    options = Options(**given)
    result = {name: round(value, 4) for name, value in EVALUATIONS[what](options).items()}
    if as_json:
        print(json.dumps({"evaluation": what, "n": options.n, "split": options.split, **result}))
    else:
        for name, value in result.items():
            print(f"{name:24} {value:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
