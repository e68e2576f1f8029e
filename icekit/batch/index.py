"""The page of a batch: a thumbnail, the concepts and the words of every run, found as one types.

The runs travel in the page as JSON, some 200 bytes each; their thumbnails lie beside it and are loaded as they are
shown, a page of them at a time, so that it opens at once with ten thousand.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from icekit.batch.directory import thumbnail_name
from icekit.batch.progress import Progress
from icekit.batch.record import DoneRecord

TEMPLATES = Path(__file__).parent / "templates"


def render_index(title: str, done: Iterable[DoneRecord], progress: Progress) -> str:
    """The page as HTML: what it requests are the thumbnails beside it.

    title: what the batch is called. done: its complete runs.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icekit.batch"),
        autoescape=True,  # by file ending, jinja2 would not take .html.jinja for HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Markup, for these two are ours; everything else that enters the page is a plain str, and escaped.
    style, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("index.css", "index.js"))
    return environment.get_template("index.html.jinja").render(
        title=title,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=Markup(json_in_html([shown(one) for one in done])),
        progress=progress,
    )


def shown(one: DoneRecord) -> dict[str, Any]:
    """What the page knows of a run: name, place, thumbnail, concepts (label, score, words)."""
    place = f"runs/{quote(one.name)}/"
    return {
        "name": one.name,
        "place": place + "report.html" * one.report,
        "thumbnail": quote(thumbnail_name(one.name)),
        "concepts": [[concept.label, round(concept.score, 3), concept.words] for concept in one.concepts],
    }


def json_in_html(value: Any) -> str:
    """JSON that can stand in a script element: no markup is in it, whatever the texts are."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
