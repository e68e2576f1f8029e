"""``icekit find``: concepts of all runs, by word, attribute and similarity."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from icekit.cli.common import print_json, print_table, table_of
from icekit.cli.parameters import COUNT, UserPath
from icekit.foreign import aside
from icekit.protocols import InputError
from icekit.protocols.errors import printable

if TYPE_CHECKING:
    from icekit.concept_library import Found

DEFAULT_DIR = "runs"
"""Where `icekit run` puts its runs."""


@click.command("find")
@click.argument("words")
@click.argument("run_dirs", nargs=-1, metavar="[DIR]...", type=UserPath())
@click.option("--attribute", "attributes", multiple=True, metavar="NAME=WORD", help="Only concepts whose words of this "
              "attribute have WORD among them; give it once for each.")  # fmt: skip
@click.option("--like", metavar="RUN_DIR:CONCEPT", help="Those that look like this concept; WORDS may be ''.")
@click.option("--n", type=COUNT, default=20, show_default=True, metavar="N", help="Most concepts")
@click.option("--words-alone", is_flag=True, help="Load no model to compare WORDS by similarity.")
@click.option(
    "--page", type=UserPath(), metavar="FILE.html", help="Write what was found as a page with thumbnails, too."
)
@click.option("--index", type=UserPath(), metavar="FILE", help="Keep the index here [default: in icekit's cache]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def find(
    words: str,
    run_dirs: Sequence[Path],
    attributes: Sequence[str],
    like: str | None,
    n: int,
    words_alone: bool,
    page: Path | None,
    index: Path | None,
    as_json: bool,
) -> None:
    """Find concepts by WORDS in the runs below DIR [default: runs].

    DIR is a run, a folder with runs in it, a batch, or hub:user/run. Those that have more of the words come first, in
    their label or among an attribute's words; then those that are more similar, if the CLIP that the runs' retriever
    had is on this machine. What is printed first can be pasted to `icekit compose`.

    icekit find "red glass" runs

    icekit find "" runs --like runs/photo:0 --attribute material=glass --page found.html
    """
    conditions = {}
    for one in attributes:
        name, equals, word = one.partition("=")
        if not equals or not name.strip() or not word.strip():
            raise InputError(f"{one!r}: expected NAME=WORD, as in --attribute material=glass")
        if name.strip() in conditions:
            raise InputError(f"{one!r}: the attribute {name.strip()!r} is given twice")
        conditions[name.strip()] = word.strip()

    from icekit.concept_library import ConceptLibrary
    from icekit.concept_library.page import check_page, write_page

    with aside():
        if page is not None:
            check_page(page)
        library = ConceptLibrary(*(run_dirs or [Path(DEFAULT_DIR)]), index=index)
        found = library.find(words, attributes=conditions, like=like, n=n, similar=not words_alone)
        if page is not None:
            write_page(page, _asked(words, conditions, like), found)
    for note in found.notes:
        click.echo(note, err=True)
    if as_json:
        print_json(_as_json(found))
        return
    if not found.hits:
        click.echo("nothing was found", err=True)
        return
    _print_hits(found)
    if page is not None:
        click.echo(page)


def _asked(words: str, conditions: dict[str, str], like: str | None) -> str:
    """What was looked for, in words."""
    parts = [
        words.strip(),
        *(f"{name}: {word}" for name, word in conditions.items()),
        *([f"like {like}"] if like else []),
    ]
    return printable(", ".join(part for part in parts if part), 200)


def _as_json(found: Found) -> dict[str, object]:
    hits = [
        {
            "reference": hit.reference,
            "run": str(hit.run_dir),
            "index": hit.index,
            "label": hit.label,
            "words": hit.words,
            "matched": hit.matched,
            "similarity": None if hit.similarity is None else round(hit.similarity, 6),
        }
        for hit in found
    ]
    return {"found": hits, "notes": list(found.notes)}


def _print_hits(found: Found) -> None:
    names = list(dict.fromkeys(name for hit in found for name in hit.words))
    table = table_of("concept", "label", *(printable(name) for name in names), "words", "similarity")
    for hit in found:
        words = [printable(", ".join(hit.words.get(name, [])) or "–") for name in names]
        similarity = "–" if hit.similarity is None else f"{hit.similarity:.2f}"
        reference = printable(shlex.quote(hit.reference), 4096)
        table.add_row(f"a={reference}", printable(hit.label), *words, str(hit.matched), similarity)
    print_table(table)
