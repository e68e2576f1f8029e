"""Runs, concepts and compositions as a notebook shows them: small pictures inside the HTML, everything else escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icekit.protocols import InputError
from icekit.run.reading import Files

if TYPE_CHECKING:
    from icekit.run.compose import Composition
    from icekit.run.extraction import Concept, Extraction

COLOURS = ((45, 108, 181), (184, 81, 31), (43, 122, 87), (133, 80, 160), (173, 58, 94), (121, 106, 18), (29, 122, 134))
"""The concepts' colours, in turn."""
PICTURE_SIDE, THUMBNAIL_SIDE, SHEET_SIDE = 224, 72, 640
"""Longest sides of a run's picture, of a cut-out or a sample, and of a sheet, pixels."""
TINY = 128
"""Pictures with sides up to this are PNG, and shown pixel by pixel: JPEG would blur what little there is."""
MOST = 12
"""Most concepts, and most pictures of a composition, that are shown."""

_TEMPLATES = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=jinja2.DictLoader({
        "picture": """\
{% macro picture(one, side, title="") %}
{% if one %}
<img src="{{ one.uri }}" alt="{{ title }}" title="{{ title }}" style="display:inline-block;margin:0 4px 2px 0;\
width:{{ one.width_at(side) }}px;max-width:100%;{{ "image-rendering:pixelated;" if one.tiny }}">
{% endif %}
{% endmacro %}""",
        "concept": """\
{% from "picture" import picture %}
{% macro concept(one) %}
<details open style="margin:0 0 6px">
<summary style="cursor:pointer"><span style="color:{{ one.colour }}">&#9632;</span>
<b>{{ one.index }}: {{ one.label }}</b>
&middot; {{ one.area }} of the image &middot; score {{ one.score }}</summary>
<div style="margin:4px 0 0 1.2em">{{ picture(one.cut_out, 72, one.label) }}
{% for title, sample in one.samples %}{{ picture(sample, 72, title) }}{% endfor %}</div>
<ul style="margin:2px 0 0">
{% for part in one.parts %}
<li>{{ part.name }}: <code style="white-space:nowrap">{{ part.token }}</code>
{% if part.words %}&middot; {{ part.words }}{% endif %}</li>
{% endfor %}
</ul>
</details>
{% endmacro %}""",
        "run": """\
{% from "picture" import picture %}
{% from "concept" import concept %}
<div style="font:13px system-ui,sans-serif">
<div style="margin-bottom:6px"><b>{{ place }}</b>{% for fact in facts %} &middot; {{ fact }}{% endfor %}</div>
{% for warning in warnings %}<div style="margin-bottom:6px">&#9888; {{ warning }}</div>{% endfor %}
<div style="display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start">
<div>{{ picture(picture_, 224, "the picture with its concepts") }}</div>
<div>{% for one in concepts %}{{ concept(one) }}{% endfor %}
{% if more %}<div>and {{ more }} more</div>{% endif %}</div>
</div></div>""",
        "alone": """\
{% from "concept" import concept %}
<div style="font:13px system-ui,sans-serif">{{ concept(one) }}</div>""",
        "composition": """\
{% from "picture" import picture %}
<div style="font:13px system-ui,sans-serif">
<div style="margin-bottom:6px"><b>{{ place }}</b> &middot; <code>{{ prompt }}</code></div>
{% for title, one in pictures %}{{ picture(one, side, title) }}{% endfor %}
{% if more %}<div>and {{ more }} more</div>{% endif %}
</div>""",
    }),
)  # fmt: skip


class InlinePicture:
    """A picture inside the HTML."""

    def __init__(self, picture: Image.Image, side: int) -> None:
        self.width, self.height = picture.size
        self.tiny = max(picture.size) <= TINY
        shown = picture.copy()
        shown.thumbnail((2 * side, 2 * side))  # for screens of twice as many pixels
        data = io.BytesIO()
        kind = "PNG" if self.tiny else "JPEG"
        shown.convert("RGB").save(data, kind, **({} if self.tiny else {"quality": 80}))
        self.uri = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"

    def width_at(self, side: int) -> int:
        """The width at which its longest side is this."""
        return max(1, round(self.width * side / max(self.width, self.height)))


def of_run(run: Extraction) -> str:
    """A run: its picture with the masks, and each concept with its tokens."""
    files, size = _files(run.run_dir), (run.record.image.width, run.record.image.height)
    picture = _read(files, "image.png", size)
    shown = run.concepts[:MOST]
    masks = [_mask(concept) for concept in shown]
    marked = None if picture is None else InlinePicture(_marked(picture, masks), PICTURE_SIDE)
    steps = run.record.learning_steps
    facts = [
        run.record.components.get("backbone", ""),
        f"{len(run.concepts)} concept{'s' * (len(run.concepts) != 1)}",
        f"{steps} learning steps" if steps is not None else "",
    ]
    return _TEMPLATES.get_template("run").render(
        place=run.run_dir,
        facts=[fact for fact in facts if fact],
        warnings=run.record.warnings,
        picture_=marked,
        concepts=[_of(concept, files, picture, mask) for concept, mask in zip(shown, masks, strict=True)],
        more=len(run.concepts) - len(shown),
    )


def of_concept(concept: Concept) -> str:
    """A concept with its tokens."""
    files = _files(concept.mask_file.parents[1])
    shown = _of(concept, files, _read(files, "image.png"), _mask(concept))
    return _TEMPLATES.get_template("alone").render(one=shown)


def of_composition(made: Composition) -> str:
    """A composition: its sheet, or its picture."""
    names = [made.sheet.name] if made.sheet else [path.name for path in made.images[:MOST]]
    side = SHEET_SIDE if made.sheet else PICTURE_SIDE
    read = [(name, _read(_files(made.out), name)) for name in names]
    pictures = [(name, InlinePicture(one, side)) for name, one in read if one is not None]
    # A sheet of few small pictures is not blown up.
    largest = max((max(one.width, one.height) for _, one in pictures), default=side)
    return _TEMPLATES.get_template("composition").render(
        place=made.out,
        prompt=made.prompt,
        pictures=pictures,
        side=min(side, 2 * largest if made.sheet else max(side, largest)),
        more=0 if made.sheet else len(made.images) - len(names),
    )


def _of(
    concept: Concept, files: Files, picture: Image.Image | None, mask: NDArray[np.bool_] | None
) -> Mapping[str, Any]:
    samples = []
    for part in ("object", *concept.tokens):
        sample = _read(files, f"samples/{concept.index}-{part}-0.png", picture.size if picture else None)
        if sample is not None:
            samples.append((f"generated: {part}", InlinePicture(sample, THUMBNAIL_SIDE)))
    shown = cut_out(picture, mask)
    return {
        "index": concept.index,
        "label": concept.label,
        "colour": "#{:02x}{:02x}{:02x}".format(*_colour(concept.index)),
        "area": f"{concept.area:.0%}",
        "score": f"{concept.score:.2f}",
        "cut_out": None if shown is None else InlinePicture(shown, THUMBNAIL_SIDE),
        "samples": samples,
        "parts": [
            {"name": part, "token": token, "words": ", ".join(concept.words.get(part, []))}
            for part, token in concept.tokens.items()
        ],
    }


def _files(folder: Path) -> Files:
    return Files(folder, str(folder), lambda: "")


def _read(files: Files, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
    """A picture of a run; None where it is not there or cannot be read: what is left is shown."""
    try:
        return files.picture(name, size)
    except InputError:
        return None


def _mask(concept: Concept) -> NDArray[np.bool_] | None:
    try:
        return concept.mask()
    except InputError:
        return None


def _colour(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]


def _marked(picture: Image.Image, masks: Sequence[NDArray[np.bool_] | None]) -> Image.Image:
    """The picture with each mask tinted, and its border drawn."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).copy()
    for index, mask in enumerate(masks):
        if mask is None or mask.shape != pixels.shape[:2]:
            continue
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & mask
        colour = np.array(_colour(index), dtype=np.float32)
        pixels[mask] = 0.65 * pixels[mask] + 0.35 * colour
        pixels[mask & ~inner] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def cut_out(picture: Image.Image | None, mask: NDArray[np.bool_] | None) -> Image.Image | None:
    """What a mask shows, on white, cut to it."""
    if picture is None or mask is None or mask.shape != picture.size[::-1] or not mask.any():
        return None
    pixels = np.where(mask[:, :, None], np.asarray(picture.convert("RGB")), np.uint8(255))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Image.fromarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
