"""What was found as a page: thumbnails and words, and each concept as ``compose`` takes it. It requests nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from icekit.concept_library.search import Found, Hit
from icekit.protocols import InputError
from icekit.protocols.errors import printable
from icekit.run.atomic import write_text_atomically
from icekit.run.directory import RunDirectory
from icekit.run.in_notebooks import InlinePicture, cut_out
from icekit.wording import named

TEMPLATE = "found.html.jinja"
GENERATOR = b'<meta name="generator" content="icekit find">'
"""By which a page is known to be icekit's, and may be replaced."""
SIDE = 140
"""Longest side of a thumbnail on the page, CSS pixels."""
MOST_WORDS = 3
_READ = 4096


def write_page(file: Path, asked: str, found: Found) -> None:
    """Write the page; one that was written before is replaced.

    asked: what was looked for, in words.

    Raises:
        InputError: another file is in the way.
        CannotWrite: the system refuses.
    """
    check_page(file)
    write_text_atomically(file, render_page(asked, found))


def check_page(file: Path) -> None:
    """Whether a page may be written here. Raises InputError, see ``write_page``."""
    if file.is_symlink() or (file.exists() and not _is_ours(file)):
        raise InputError(f"{file} is no page of icekit's, and is not replaced: {named('page')} takes a new name")


def _is_ours(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            return GENERATOR in opened.read(_READ)
    except OSError:
        return False


def render_page(asked: str, found: Found) -> str:
    """The page as HTML. asked: what was looked for, in words."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icekit.concept_library"),
        autoescape=True,  # by file ending, jinja2 would not take .html.jinja for HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    hits = [_shown(hit) for hit in found]
    return environment.get_template(TEMPLATE).render(asked=asked, hits=hits, notes=found.notes, side=SIDE)


def _shown(hit: Hit) -> dict[str, Any]:
    return {
        "label": printable(hit.label, 100),
        "reference": hit.reference,
        "words": [
            (printable(name, 60), printable(", ".join(words[:MOST_WORDS]), 200)) for name, words in hit.words.items()
        ],
        "similarity": "" if hit.similarity is None else f"{hit.similarity:.2f}",
        "picture": _thumbnail(hit),
    }


def _thumbnail(hit: Hit) -> InlinePicture | None:
    """What the concept's mask shows; None where its run's files are not there or damaged."""
    directory = RunDirectory(hit.run_dir)
    try:
        image: Image.Image = directory.load_image()
        shown = cut_out(image, hit.concept().mask())
    except InputError:
        return None
    return None if shown is None else InlinePicture(shown, SIDE)
