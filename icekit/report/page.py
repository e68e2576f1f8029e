"""The report of a run: ``report.html``, one self-contained page that explains a run directory to people.

Pictures travel inside the page as data URIs; nothing is requested from anywhere, and the page's own content security
policy says so. Whatever comes from the run (labels, words, file names, settings) is escaped by the template.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from icekit.protocols import object_tokens
from icekit.report import loss_chart
from icekit.run.directory import WEIGHTS_FOLDERS, WORDS_ALONE, RunDirectory
from icekit.run.extraction import Extraction

Mask = NDArray[np.bool_]

COLOURS = (
    "#2d6cb5", "#b8511f", "#2b7a57", "#8550a0", "#ad3a5e", "#796a12", "#1d7a86", "#95573a", "#5a62b0", "#4f7426",
)  # fmt: skip
"""The concepts' colours, in turn; white on each of them has a contrast of 4.5 or more."""
HEAT = ((23, 18, 48), (96, 38, 96), (188, 66, 74), (240, 144, 58), (255, 236, 164))
"""Colours of an attention map, from none to most, lighter all the way."""
TINY = 160
"""Samples with sides up to this are shown pixel by pixel, which is crisp at twice their size."""
HERO_SIDE, CUT_OUT_SIDE, THUMBNAIL_SIDE = 1024, 480, 320
"""Longest sides of the pictures in the page, pixels."""
MEANINGS = {
    "category": "the kind of thing it is",
    "instance": "what makes it this one",
}
"""What a token stands for, in plain words; the others are attributes."""


@dataclass(frozen=True)
class Picture:
    """A picture inside the page: data URI, size in pixels, and whether to show it pixel by pixel (it is tiny)."""

    uri: str
    width: int
    height: int
    tiny: bool


@dataclass(frozen=True)
class Part:
    """A leaf of a concept's tree: one token, with what it is called and what it looks like."""

    name: str
    meaning: str
    token: str
    words: list[str]
    attention: Picture | None
    samples: list[Picture]
    alone: Alone | None


@dataclass(frozen=True)
class Alone:
    """What the words alone give, without any learning.

    words: those that describe the attribute, best first; empty where nobody said any. phrase: what the samples were
    prompted with.
    """

    words: list[str]
    phrase: str
    samples: list[Picture]


@dataclass(frozen=True)
class Concept:
    """A concept as the page shows it.

    outline: SVG path data of the mask's border, in pixels of the image; empty without a mask.
    badge: where its number stands, percent of the image's width and height.
    traits: the best word of each attribute.
    """

    index: int
    label: str
    colour: str
    score: float | None
    area: float | None
    outline: str
    badge: tuple[float, float]
    cut_out: Picture | None
    traits: list[str]
    prompt: str
    samples: list[Picture]
    alone: Alone | None
    parts: list[Part]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a complete run directory, atomically, and return its path.

    Raises:
        InputError: the directory holds no complete run.
    """
    run = Extraction.open(run_dir)
    RunDirectory(run.run_dir).save_report(render_report(run.run_dir, run.manifest))
    return run.run_dir / "report.html"


def render_report(run_dir: Path, manifest: Mapping[str, Any]) -> str:
    """The report of a run directory as HTML. What is not there (samples, attention maps, a log) is left out.

    Args:
        run_dir: where the files of the run are.
        manifest: the run's manifest, which need not be on disk yet.
    """
    image = _open_inside(run_dir, "image.png")
    pictures = _pictures_by_part(run_dir)
    concepts = [_concept(entry, run_dir, image, pictures) for entry in manifest.get("concepts", [])]
    settings_file = run_dir / "settings.toml"
    settings = settings_file.read_text(encoding="utf-8") if settings_file.is_file() else ""
    timings = {key.removesuffix("_s"): value for key, value in manifest.get("timings", {}).items()}
    total = timings.pop("total", None) or sum(timings.values())

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icekit.report"),
        autoescape=True,  # by file ending, jinja2 would not take .html.jinja for HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    # Markup, for these two are ours; everything else that enters the page is a plain str, and escaped.
    style, script = (
        Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))
        for name in ("report.css", "report.js")
    )
    return environment.get_template("report.html.jinja").render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=PurePosixPath(str(manifest["image"]["source"]).replace("\\", "/")).name or "image",
        manifest=manifest,
        image=to_picture(enlarge(image, HERO_SIDE), HERO_SIDE) if image else None,
        size=image.size if image else (manifest["image"]["width"], manifest["image"]["height"]),
        concepts=concepts,
        charts=loss_chart.loss_charts(loss_chart.read_log(run_dir / "log.jsonl")),
        chart=loss_chart,
        settings=settings,
        compares=any(
            alone and alone.samples for one in concepts for alone in (one.alone, *(p.alone for p in one.parts))
        ),
        timings=timings,
        total_seconds=total,
        snippets=_snippets(run_dir, concepts, manifest.get("backbone") or {}),
    )


def duration(seconds: float) -> str:
    """A time for people: ``0.4 s``, ``28 s``, ``4 min 30 s``, ``1 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def mask_outline(mask: Mask) -> str:
    """The border of a mask ``[H, W]`` as SVG path data (for fill rule even-odd), in pixels; empty for an empty mask."""
    # Here, for scikit-image and scipy take seconds to import, which every command would wait for.
    from skimage.measure import approximate_polygon, find_contours

    contours = find_contours(np.pad(mask, 1).astype(np.float64), 0.5)
    parts = []
    for contour in contours:
        # Sample (row, column) of the padded mask is the centre of a pixel: half a pixel in, less the padding.
        polygon = approximate_polygon(contour, tolerance=max(mask.shape) / 1200) - 0.5
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in polygon[:-1]) + "Z")
    return "".join(parts)


def label_point(mask: Mask) -> tuple[float, float]:
    """The point (x, y) of a mask ``[H, W]`` that is farthest from its border, pixels; the centre for an empty mask."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    if not mask.any():
        return mask.shape[1] / 2, mask.shape[0] / 2
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(column) + 0.5, float(row) + 0.5


def heat_overlay(image: Image.Image, attention: Image.Image, side: int = THUMBNAIL_SIDE) -> Image.Image:
    """An attention map (grey, any size) as heat over the image in grey; RGB, at most ``side`` pixels a side.

    The map is stretched to its own range: it shows where the token looks, and not how much.
    """
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    heat = np.asarray(attention.convert("F").resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    low, high = np.asarray(attention.convert("F")).min(), np.asarray(attention.convert("F")).max()
    heat = np.clip((heat - low) / max(float(high - low), 1e-6), 0, 1)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)[..., None]
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(heat, stops, channel) for channel in np.array(HEAT).T], axis=-1)
    # Light and shade of the image modulate the heat, so that both stay legible.
    return Image.fromarray(np.clip(colour * (0.45 + 0.55 * grey / 255) + 0.22 * grey, 0, 255).astype(np.uint8))


def cut_out(image: Image.Image, mask: Mask) -> Image.Image | None:
    """What is under the mask ``[H, W]``, cropped to a square around it, transparent elsewhere (RGBA); None if empty."""
    if not mask.any():
        return None
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    left, top, right, bottom = rgba.getchannel("A").getbbox() or (0, 0, *rgba.size)
    half = round(max(right - left, bottom - top) * 0.54) + 1
    x, y = (left + right) // 2, (top + bottom) // 2
    return rgba.crop((x - half, y - half, x + half, y + half))


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """A small picture enlarged by a whole factor to nearly ``side`` pixels; others as they are.

    Smoothly, for at ten times their size pixels as they are hide what the picture shows.
    """
    factor = side // max(image.size)
    if factor < 2:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)


def to_picture(image: Image.Image, side: int = THUMBNAIL_SIDE) -> Picture:
    """A picture for the page, reduced to at most ``side`` pixels a side: lossless if tiny, WebP otherwise."""
    tiny = max(image.size) <= TINY
    file = io.BytesIO()
    if tiny:
        image.save(file, "PNG", optimize=True)
    else:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(file, "WEBP", quality=88)
    kind = "png" if tiny else "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(uri, image.width, image.height, tiny)


def _open_inside(run_dir: Path, name: str) -> Image.Image | None:
    """A picture of the run directory, RGB or grey; None when it is not there. A path that leads outside is not read."""
    path = (run_dir / name).resolve()
    if not path.is_relative_to(run_dir.resolve()) or not path.is_file():
        return None
    with Image.open(path) as image:
        return image.convert("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB")


def _pictures_by_part(run_dir: Path) -> dict[tuple[str, int, str], list[Path]]:
    """The files of ``samples/`` and ``attention/`` by (folder, index of the concept, part), samples in order."""
    numbered: dict[tuple[str, int, str], list[tuple[int, Path]]] = {}
    for folder, pattern in (("samples", r"(\d+)-(.+)-(\d+)\.png"), ("attention", r"(\d+)-(.+)()\.png")):
        for path in (run_dir / folder).glob("*.png"):
            if match := re.fullmatch(pattern, path.name):
                index, part, number = match.groups()
                numbered.setdefault((folder, int(index), part), []).append((int(number or 0), path))
    return {key: [path for _, path in sorted(found)] for key, found in numbered.items()}


def _concept(
    entry: Mapping[str, Any],
    run_dir: Path,
    image: Image.Image | None,
    pictures: Mapping[tuple[str, int, str], Sequence[Path]],
) -> Concept:
    index = int(entry["index"])
    label = str(entry["label"])
    tokens: dict[str, str] = entry["tokens"]
    words: dict[str, list[str]] = entry.get("words") or {}
    mask_image = _open_inside(run_dir, entry["mask"]) if entry.get("mask") else None
    mask = np.asarray(mask_image.convert("L")) > 127 if mask_image else None
    if mask is not None and image is not None and mask.shape != (image.height, image.width):
        mask = None
    x, y = label_point(mask) if mask is not None else (0.0, 0.0)
    cut = cut_out(image, mask) if image is not None and mask is not None else None

    def samples(part: str) -> list[Picture]:
        return [to_picture(_open(path)) for path in pictures.get(("samples", index, part), [])]

    def alone(part: str) -> Alone | None:
        phrase = (entry.get("words_alone") or {}).get(part)
        described = list((entry.get("described") or {}).get(part) or [])
        return Alone(described, phrase, samples(f"{part}{WORDS_ALONE}")) if phrase else None

    def attention(part: str) -> Picture | None:
        found = pictures.get(("attention", index, part))
        return to_picture(heat_overlay(image, _open(found[0]))) if found and image is not None else None

    return Concept(
        index=index,
        label=label,
        colour=COLOURS[index % len(COLOURS)],
        score=entry.get("score"),
        area=entry.get("area"),
        outline=mask_outline(mask) if mask is not None else "",
        badge=(100 * x / mask.shape[1], 100 * y / mask.shape[0]) if mask is not None else (0.0, 0.0),
        cut_out=to_picture(enlarge(cut, CUT_OUT_SIDE), CUT_OUT_SIDE) if cut else None,
        traits=[names[0] for part, names in words.items() if names and part not in MEANINGS],
        prompt=object_tokens(tokens),
        samples=samples("object"),
        alone=alone("object"),
        parts=[
            Part(
                name=part,
                meaning=MEANINGS.get(part, f"its {part}"),
                token=token,
                words=list(words.get(part) or []),
                attention=attention(part),
                samples=samples(part),
                alone=alone(part),
            )
            for part, token in tokens.items()
        ],
    )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _snippets(run_dir: Path, concepts: Sequence[Concept], backbone: Mapping[str, Any]) -> dict[str, str]:
    """What to type next, with this run's own directory and tokens; empty when nothing was found.

    backbone: as in the manifest. For diffusers there is something to type where it says how its model is loaded there,
        and has one text encoder, for which tokens are kept as diffusers reads them.
    """
    if not concepts:
        return {}
    full = run_dir.resolve()
    place = str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)
    first = concepts[0]
    attributes = [part.name for part in first.parts if part.name not in MEANINGS]
    second = concepts[1] if len(concepts) > 1 else first

    def compose(prompt: str, **runs: Concept) -> str:
        bindings = [f"{name}={place}:{concept.index}" for name, concept in runs.items()]
        return shlex.join(["icekit", "compose", prompt, *bindings])

    lines = [compose("a photo of {a}", a=first)]
    if attributes:
        names = " ".join(f"{{a.{name}}}" for name in reversed(attributes))
        lines.append(compose(f"a {second.label}, {names}", a=first))
        if second is not first:
            lines.append(compose(f"{{a}}, {{b.{attributes[-1]}}}", a=first, b=second))
    snippets = {"compose": "\n".join(lines)}
    pipeline, source = backbone.get("pipeline_class"), backbone.get("pipeline_source")
    if pipeline and str(pipeline).isidentifier() and source and len(backbone.get("rows", {})) == 1:
        snippets["diffusers"] = _diffusers(run_dir, place, str(pipeline), str(source), first.prompt)
    return snippets


def _diffusers(run_dir: Path, place: str, pipeline: str, source: str, prompt: str) -> str:
    """Python code that generates an image with the run's tokens, and with what was made of the noise predictor."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)  # a JSON string is a Python string, too

    names, tuned = [pipeline], ""
    for folder in WEIGHTS_FOLDERS:
        kind = _class_name(run_dir / folder / "config.json")
        if kind:
            names.append(kind)
            tuned += f"pipe.{folder} = {kind}.from_pretrained({quoted(f'{place}/{folder}')})\n"
    if (run_dir / "lora.safetensors").is_file():
        tuned += f'pipe.load_lora_weights({quoted(place)}, weight_name="lora.safetensors")\n'
    return f"""\
from pathlib import Path
from diffusers import {", ".join(names)}

pipe = {pipeline}.from_pretrained({quoted(source)})
for file in sorted(Path({quoted(place + "/embeddings")}).glob("*.safetensors")):
    pipe.load_textual_inversion(str(file), token=f"<{{file.stem}}>")
{tuned}image = pipe({quoted(f"a photo of a {prompt}")}).images[0]
"""


def _class_name(config: Path) -> str | None:
    """The diffusers class that a folder of weights is for; None where there is no such folder."""
    try:
        name = str(json.loads(config.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if name.isidentifier() else None
