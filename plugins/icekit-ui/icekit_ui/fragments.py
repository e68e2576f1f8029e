"""Pieces of the page as HTML. All text of a run is escaped; pictures are in the page itself, so no file is served."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from icekit.protocols import is_instance
from icekit_ui.looking import BEGUN, COMPLETE, DAMAGED, FOUND, LOOKING, Seen, Thing
from icekit_ui.masks import Mask
from icekit_ui.studio import FINDING, LEARNING, MIXING, Job

COLOURS = ("#d81b60", "#1e88e5", "#b26a00", "#00796b", "#7b1fa2", "#c62828", "#3949ab", "#558b2f", "#6d4c41", "#00838f")
"""One for each object, in turn: each has a contrast of 4 or more with white."""
STAGES = {
    "load": "loading the model",
    "localise": "looking for objects",
    "learn": "learning tokens",
    "generate": "drawing samples",
    "export": "writing the report",
}
STATES = {
    LOOKING: "not all objects are found yet",
    FOUND: "objects found",
    BEGUN: "learning was interrupted",
    COMPLETE: "complete",
    DAMAGED: "cannot be read",
}
SMOOTH = 256
"""Pictures of fewer pixels a side are small, and are enlarged by the browser."""
THUMBNAIL, SHOWN = 96, 1024
"""Longest side of a picture in a list, and of the one that is looked at, pixels."""
POINTS = 160
"""Most points of a curve of losses."""


def text(value: object) -> str:
    """Text, escaped for HTML and for the templates of the page."""
    return escape(str(value)).replace("{", "&#123;").replace("}", "&#125;")


def picture_url(picture: Image.Image, side: int | None = None) -> str:
    """A picture as a URL that holds it; side: the longest that it may have, pixels."""
    picture = picture.convert("RGB")
    if side is not None:
        picture = picture.copy()
        picture.thumbnail((side, side))
    data = io.BytesIO()
    large = max(picture.size) > SMOOTH
    picture.save(data, "JPEG", quality=90) if large else picture.save(data, "PNG")
    return f"data:image/{'jpeg' if large else 'png'};base64,{base64.b64encode(data.getvalue()).decode()}"


def colour_of(index: int) -> str:
    """An object's colour."""
    return COLOURS[index % len(COLOURS)]


def outline(mask: Mask) -> str:
    """A mask's outline as the path of an SVG, in pixels."""
    padded = np.pad(mask.astype(float), 1)
    pieces = []
    for contour in find_contours(padded, 0.5):
        points = approximate_polygon(contour, 0.4) - 0.5  # of the padding, and of a pixel's middle
        pieces.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in points) + "Z")
    return "".join(pieces)


def with_outlines(picture: Image.Image, things: Sequence[tuple[int, str, Mask]], chosen: int | None = None) -> str:
    """A picture with the outline and number of each object; those are buttons that choose it.

    things: (index, word, mask) each.
    """
    width, height = picture.size
    unit = max(width, height) / 100
    shapes = []
    for index, word, mask in things:
        path = outline(mask)
        if not path:
            continue
        rows, columns = np.nonzero(mask)
        x, y = float(columns.mean()), float(rows.mean())
        mark = " ik-chosen" if index == chosen else ""
        shapes.append(
            f'<g class="ik-thing{mark}" data-pick="{index}" tabindex="0" role="button" '
            f'aria-label="Object {index}: {text(word)}"><title>{index}: {text(word)}</title>'
            f'<path d="{path}" fill="{colour_of(index)}" stroke="{colour_of(index)}" fill-rule="evenodd"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4.5 * unit:.2f}" fill="{colour_of(index)}"/>'
            f'<text x="{x:.1f}" y="{y + 2 * unit:.1f}" font-size="{6 * unit:.2f}">{index}</text></g>'
        )
    words = ", ".join(word for _, word, _ in things) or "no object yet"
    return (
        f'<svg class="ik-picture" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="The picture, with its objects outlined: {text(words)}">'
        f'<image href="{picture_url(picture, SHOWN)}" width="{width}" height="{height}"/>{"".join(shapes)}</svg>'
    )


def legend(things: Sequence[tuple[int, str, float | None]]) -> str:
    """The words of the objects, each with its colour and number."""
    rows = "".join(
        f'<li><span class="ik-dot" style="background:{colour_of(index)}">{index}</span> {text(word)}'
        + (f' <span class="ik-quiet">score {score:.2f}</span>' if score is not None else "")
        + "</li>"
        for index, word, score in things
    )
    return f'<ul class="ik-legend">{rows}</ul>' if rows else ""


def progress(job: Job | None) -> str:
    """What is being done, and how far it is."""
    if job is None or job.ended:
        return ""
    what = {FINDING: "Finding", LEARNING: "Learning", MIXING: "Mixing"}[job.kind]
    stage = "stopping after this step" if job.stopping else STAGES.get(job.stage, job.stage)
    counted = f" {job.done} of {job.total}" if job.total and job.done else ""
    counts = job.total and job.stage in ("learn", "generate")
    bar = f'<progress max="{job.total}" value="{job.done}"></progress>' if counts else "<progress></progress>"
    return (
        f'<div class="ik-progress" role="status"><strong>{what} {text(job.name)}</strong>: {text(stage)}{counted}'
        f"{bar.replace('<progress', f'<progress aria-label={chr(34)}{text(stage)}{chr(34)}')}</div>"
    )


def message(problem: str, kind: str = "problem") -> str:
    """Something to say to the person before the page; nothing if empty."""
    role = "alert" if kind == "problem" else "status"
    return f'<div class="ik-message ik-{kind}" role="{role}">{text(problem)}</div>' if problem else ""


def curves(steps: Sequence[Mapping[str, Any]]) -> str:
    """The losses of the learning so far, a small curve each, phase by phase, with the latest value."""
    phases: dict[str, dict[str, list[float]]] = {}
    for line in steps:
        losses = line.get("losses")
        for name, value in losses.items() if isinstance(losses, dict) else ():
            if isinstance(value, int | float) and math.isfinite(value):
                phases.setdefault(str(line.get("phase", "")), {}).setdefault(str(name), []).append(float(value))
    drawn = []
    for phase, losses in phases.items():
        for name, values in losses.items():
            spoken = f"{phase}, {name}: {values[-1]:.3g} after {len(values)} steps, {values[0]:.3g} at first"
            drawn.append(
                f'<figure class="ik-curve"><figcaption>{text(phase)}: {text(name)} '
                f"<strong>{values[-1]:.3g}</strong></figcaption>{_curve(values, spoken)}</figure>"
            )
    if not drawn:
        return ""
    hint = "Losses, each on a scale of its own. Single steps jump; where a curve goes over many steps is what counts."
    return f'<p class="ik-quiet">{hint}</p><div class="ik-curves">{"".join(drawn)}</div>'


def _curve(values: Sequence[float], spoken: str) -> str:
    every = max(1, math.ceil(len(values) / POINTS))
    means = [sum(values[at : at + every]) / len(values[at : at + every]) for at in range(0, len(values), every)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    last = max(1, len(means) - 1)
    points = " ".join(f"{100 * at / last:.1f},{28 - 26 * (value - low) / span:.1f}" for at, value in enumerate(means))
    return (
        f'<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label="{text(spoken)}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" vector-effect="non-scaling-stroke"/></svg>'
    )


def samples(seen: Seen) -> str:
    """The samples that were drawn so far."""
    words = {str(one.index): one.word for one in seen.things}
    tiles = []
    for name, picture in seen.samples.items():
        stem = name.rpartition("/")[2].removesuffix(".png")
        index, _, rest = stem.partition("-")
        part = rest.rpartition("-")[0]
        plain = part.endswith("-words")
        what = f"{words.get(index, index)}, {part.removesuffix('-words')}" + (" (words alone)" if plain else "")
        tiles.append(
            f'<figure><img src="{picture_url(picture)}" alt="Sample: {text(what)}"/>'
            f"<figcaption>{text(what)}</figcaption></figure>"
        )
    return f'<div class="ik-tiles">{"".join(tiles)}</div>' if tiles else ""


def concepts(seen: Seen) -> str:
    """The tokens of a complete run, and what they are called."""
    if seen.state != COMPLETE:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><span class="ik-dot" style="background:{colour_of(one.index)}">{one.index}</span> '
        f"{text(one.word)}</th><td>"
        + " ".join(f"<span>{text(name)}: {text(', '.join(words))}</span>" for name, words in one.words.items())
        + "</td><td>"
        + " ".join(f"<code>{text(token)}</code>" for token in one.tokens.values())
        + "</td></tr>"
        for one in seen.things
    )
    return (
        '<div class="ik-table"><table><thead><tr><th scope="col">object</th><th scope="col">looks</th>'
        f'<th scope="col">tokens</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def run_list(entries: Sequence[tuple[str, str, Image.Image | None]], current: str, more: int = 0) -> str:
    """The runs that there are, to click on. entries: (name, state in words, picture) each."""
    if not entries:
        return '<p class="ik-quiet">No run yet: drop a picture below.</p>'
    items = []
    for name, state, picture in entries:
        image = f'<img src="{picture_url(picture, THUMBNAIL)}" alt=""/>' if picture else '<span class="ik-none"></span>'
        marked = ' aria-current="true"' if name == current else ""
        items.append(
            f'<li><button type="button" data-pick="{text(name)}"{marked}>{image}<span>{text(name)}</span>'
            f'<span class="ik-quiet">{text(state)}</span></button></li>'
        )
    rest = f'<p class="ik-quiet">{more} older ones are not shown.</p>' if more else ""
    return f'<ul class="ik-runs" aria-label="Runs, the newest first">{"".join(items)}</ul>{rest}'


def chips(run: str, things: Sequence[Thing], picture: Image.Image | None) -> str:
    """The parts of a run's concepts as buttons that put them into the prompt."""
    rows = []
    for one in things:
        parts = [part for part in one.tokens if part != "category" and not is_instance(part)]
        whole = ["", *(part for part in one.tokens if part not in parts), *parts]
        buttons = "".join(
            f'<button type="button" data-pick="{text(f"{one.index}:{part}")}" data-run="{text(run)}" '
            f'aria-label="Put {text(_spoken(one, part))} of {text(run)} into the prompt">'
            f"{text(_called(one, part))}</button>"
            for part in whole
        )
        cut = f'<img src="{picture_url(cut_out(picture, one.mask), THUMBNAIL)}" alt=""/>' if picture else ""
        rows.append(f'<li>{cut}<div><strong>{text(one.word)}</strong><div class="ik-chips">{buttons}</div></div></li>')
    return f'<section class="ik-concepts"><h4>{text(run)}</h4><ul>{"".join(rows)}</ul></section>'


def _called(thing: Thing, part: str) -> str:
    if not part:
        return "the object"
    words = thing.words.get(part)
    return f"{part}: {words[0]}" if words else part


def _spoken(thing: Thing, part: str) -> str:
    return f"the {part} of {thing.word}" if part else thing.word


def cut_out(picture: Image.Image, mask: Mask) -> Image.Image:
    """An object alone, on white, cut to where it is."""
    if not mask.any() or mask.shape != picture.size[::-1]:
        return picture
    rows, columns = np.nonzero(mask)
    alone = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, "white"), Image.fromarray(mask))
    margin = 2
    return alone.crop(
        (
            max(0, int(columns.min()) - margin),
            max(0, int(rows.min()) - margin),
            min(picture.width, int(columns.max()) + 1 + margin),
            min(picture.height, int(rows.max()) + 1 + margin),
        )
    )


def mixed(pictures: Sequence[tuple[str, Image.Image]], prompt: str) -> str:
    """The pictures of a composition."""
    tiles = "".join(
        f'<figure><img src="{picture_url(picture)}" alt="Picture {number} of: {text(prompt)}"/>'
        f'<figcaption><a href="{picture_url(picture)}" download="{text(name)}">save</a></figcaption></figure>'
        for number, (name, picture) in enumerate(pictures, 1)
    )
    return f'<div class="ik-tiles ik-mixed">{tiles}</div>' if tiles else ""
