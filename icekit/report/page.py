"""The report of a run: ``report.html``, one self-contained page that explains a run directory to people.

Pictures travel inside the page as data URIs; nothing is requested from anywhere, and the page's own content security
policy says so. Whatever comes from the run (labels, words, file names, settings) is escaped by the template.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from icekit.protocols import is_instance, object_tokens
from icekit.report import loss_chart
from icekit.run.directory import WORDS_ALONE, RunDirectory
from icekit.run.in_diffusers import python_code
from icekit.run.log import read_log
from icekit.run.reading import Files
from icekit.run.records import BackboneRecord, ConceptRecord, Manifest

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
    score: float
    area: float
    outline: str
    badge: tuple[float, float]
    cut_out: Picture | None
    traits: list[str]
    prompt: str
    samples: list[Picture]
    alone: Alone | None
    parts: list[Part]


def render_report(run_dir: Path, manifest: Manifest, place: Path | None = None, image_side: int = HERO_SIDE) -> str:
    """The report of a run directory as HTML. What is not there (samples, attention maps, a log) is left out.

    Nothing outside of the directory is read, wherever its links lead.

    Args:
        run_dir: where the files of the run are.
        manifest: the run's manifest, which need not be on disk yet.
        place: where they will be in the end, if not there.
        image_side: longest side of the run's picture in the page, pixels, if it is larger.

    Raises:
        InputError: a file of the run is damaged.
    """
    run = RunDirectory(run_dir)
    files, size = run.files, (manifest.image.width, manifest.image.height)
    image = _picture(files, "image.png", size)
    pictures = _pictures_by_part(files)
    concepts = [_concept(entry, files, image, size, pictures) for entry in manifest.concepts]
    log, passed_over = read_log(files)
    timings = {key.removesuffix("_s"): value for key, value in manifest.timings.items()}
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
    html = environment.get_template("report.html.jinja").render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=PurePosixPath(manifest.image.source.replace("\\", "/")).name or "image",
        manifest=manifest,
        image=to_picture(enlarge(image, image_side), image_side) if image else None,
        size=size,
        concepts=concepts,
        charts=loss_chart.loss_charts(log),
        passed_over=passed_over,
        chart=loss_chart,
        settings=files.text("settings.toml") or "",
        compares=any(
            alone and alone.samples for one in concepts for alone in (one.alone, *(p.alone for p in one.parts))
        ),
        timings=timings,
        total_seconds=total,
        evaluations=manifest.evaluations,
        evaluated=sum(one.forward for one in manifest.evaluations.values()),
        snippets=_snippets(run, place or run_dir, concepts, manifest.backbone),
    )
    return html.encode("utf-8", "backslashreplace").decode()  # a path may hold what is no UTF-8


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


def _picture(files: Files, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
    """A picture of the run, RGB; None when it is not there.

    size: (width, height) that it must have, pixels.
    """
    image = files.picture(name, size)
    return image.convert("RGB") if image else None


def _pictures_by_part(files: Files) -> dict[tuple[str, int, str], list[str]]:
    """The files of ``samples/`` and ``attention/`` by (folder, index of the concept, part), samples in order."""
    numbered: dict[tuple[str, int, str], list[tuple[int, str]]] = {}
    for folder, pattern in (("samples", r"(\d{1,9})-(.+)-(\d{1,9})\.png"), ("attention", r"(\d{1,9})-(.+)()\.png")):
        for name in files.names(folder, ".png"):
            if match := re.fullmatch(pattern, name.removeprefix(f"{folder}/")):
                index, part, number = match.groups()
                numbered.setdefault((folder, int(index), part), []).append((int(number or 0), name))
    return {key: [name for _, name in sorted(found)] for key, found in numbered.items()}


def _concept(
    entry: ConceptRecord,
    files: Files,
    image: Image.Image | None,
    size: tuple[int, int],
    pictures: Mapping[tuple[str, int, str], Sequence[str]],
) -> Concept:
    index = entry.index
    mask_image = files.picture(entry.mask, size)
    mask = np.asarray(mask_image.convert("L")) > 127 if mask_image else None
    x, y = label_point(mask) if mask is not None else (0.0, 0.0)
    cut = cut_out(image, mask) if image is not None and mask is not None else None

    def samples(part: str) -> list[Picture]:
        found = [_picture(files, name) for name in pictures.get(("samples", index, part), [])]
        return [to_picture(one) for one in found if one]

    def alone(part: str) -> Alone | None:
        phrase = entry.words_alone.get(part)
        return Alone(entry.described.get(part, []), phrase, samples(f"{part}{WORDS_ALONE}")) if phrase else None

    def attention(part: str) -> Picture | None:
        found = pictures.get(("attention", index, part))
        map_of_it = _picture(files, found[0]) if found else None
        return to_picture(heat_overlay(image, map_of_it)) if map_of_it and image is not None else None

    return Concept(
        index=index,
        label=entry.label,
        colour=COLOURS[index % len(COLOURS)],
        score=entry.score,
        area=entry.area,
        outline=mask_outline(mask) if mask is not None else "",
        badge=(100 * x / mask.shape[1], 100 * y / mask.shape[0]) if mask is not None else (0.0, 0.0),
        cut_out=to_picture(enlarge(cut, CUT_OUT_SIDE), CUT_OUT_SIDE) if cut else None,
        traits=[names[0] for part, names in entry.words.items() if names and part not in MEANINGS],
        prompt=object_tokens(entry.tokens),
        samples=samples("object"),
        alone=alone("object"),
        parts=[
            Part(
                name=part,
                meaning=MEANINGS.get("instance" if is_instance(part) else part, f"its {part}"),
                token=token,
                words=entry.words.get(part, []),
                attention=attention(part),
                samples=samples(part),
                alone=alone(part),
            )
            for part, token in entry.tokens.items()
        ],
    )


def _snippets(
    run: RunDirectory, to_be: Path, concepts: Sequence[Concept], backbone: BackboneRecord | None
) -> dict[str, str]:
    """What to type next, with this run's own directory and tokens; empty when nothing was found.

    to_be: where the run's files will be in the end.
    backbone: as in the manifest. For diffusers there is something to type where it says how its model is loaded there,
        and has one text encoder, for which tokens are kept as diffusers reads them.
    """
    if not concepts:
        return {}
    place = _from_here(to_be)
    first = concepts[0]
    second = max(concepts[1:], key=lambda other: len(_differing(first, other)), default=first)
    attributes = [part.name for part in first.parts if part.name not in MEANINGS and not is_instance(part.name)]
    differing = _differing(first, second)

    def compose(prompt: str, **runs: Concept) -> str:
        bindings = [f"{name}={place}:{concept.index}" for name, concept in runs.items()]
        return shlex.join(["icekit", "compose", prompt, *bindings])

    lines = [compose("a photo of {a}", a=first)]
    if attributes:
        names = " ".join(f"{{a.{name}}}" for name in reversed(attributes))
        lines.append(compose(f"a {second.label}, {names}", a=first))
        if second is not first:
            lines.append(compose(f"{{a}}, {{b.{(differing or attributes)[-1]}}}", a=first, b=second))
    snippets = {"compose": "\n".join(lines)}
    if backbone and (source := backbone.pipeline_source):
        code = python_code(run, place, source, backbone, f"a photo of a {first.prompt}")
        snippets |= {"diffusers": code} if code else {}
    return snippets


def _differing(one: Concept, other: Concept) -> list[str]:
    """The attributes that two concepts share and that have other words: a picture shows when they are exchanged."""
    words = {part.name: part.words[:1] for part in other.parts}
    return [
        part.name
        for part in one.parts
        if part.name not in MEANINGS
        and not is_instance(part.name)
        and words.get(part.name, part.words[:1]) != part.words[:1]
    ]


def _from_here(path: Path) -> str:
    """A path as it can be typed in the working directory, if that is still there."""
    full = path.resolve()
    try:
        here = Path.cwd()
    except OSError:
        return str(full)
    return str(full.relative_to(here) if full.is_relative_to(here) else full)
