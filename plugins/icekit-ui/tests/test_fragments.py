"""What the page says of a run, as HTML."""

from html.parser import HTMLParser

import numpy as np
from icekit_ui import fragments
from icekit_ui.looking import COMPLETE, Seen, Thing
from icekit_ui.studio import LEARNING, Job
from PIL import Image

EVIL = '"><script>alert(1)</script>{{value}}${value}'
MASK = np.zeros((8, 8), dtype=bool)
MASK[2:6, 1:4] = True
PICTURE = Image.new("RGB", (8, 8), "white")


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_words_of_a_run_are_text_and_nothing_else() -> None:
    thing = Thing(0, EVIL, 0.5, MASK, {EVIL: [EVIL]}, {"category": "<a-0>", EVIL: "<a-0-b>"})
    step = {"phase": EVIL, "losses": {EVIL: 1.0}}
    seen = Seen(EVIL, COMPLETE, PICTURE, (thing,), (step, step), {f"samples/0-{EVIL}-0.png": PICTURE}, EVIL)
    html = "".join(
        [
            fragments.with_outlines(PICTURE, [(0, EVIL, MASK)], 0),
            fragments.legend([(0, EVIL, None)]),
            fragments.progress(Job(LEARNING, EVIL, stage=EVIL)),
            fragments.message(EVIL),
            fragments.curves(seen.steps),
            fragments.samples(seen),
            fragments.concepts(seen),
            fragments.run_list([(EVIL, EVIL, PICTURE)], EVIL),
            fragments.chips(EVIL, seen.things, PICTURE),
            fragments.mixed([(EVIL, PICTURE)], EVIL),
        ]
    )
    assert "script" not in Tags(html).tags
    assert not any(name.startswith("on") for name, _ in Tags(html).attributes)
    assert "{" not in html and "${" not in html
    assert html.count("alert(1)") >= 10


def test_every_picture_has_a_word_for_those_who_do_not_see_it() -> None:
    thing = Thing(0, "cup", 0.5, MASK, {"colour": ["red"]}, {"category": "<cup-0>", "colour": "<cup-0-colour>"})
    seen = Seen("photo", COMPLETE, PICTURE, (thing,), (), {"samples/0-colour-0.png": PICTURE})
    assert 'alt="Sample: cup, colour"' in fragments.samples(seen)
    assert 'aria-label="Object 0: cup"' in fragments.with_outlines(PICTURE, [(0, "cup", MASK)])
    assert 'aria-label="Put the colour of cup of photo into the prompt"' in fragments.chips("photo", (thing,), PICTURE)


def test_an_outline_goes_around_the_pixels() -> None:
    path = fragments.outline(MASK)
    numbers = [float(one) for one in path.replace("M", " ").replace("L", " ").replace("Z", " ").split()]
    columns, rows = numbers[::2], numbers[1::2]
    assert (min(columns), max(columns), min(rows), max(rows)) == (1, 4, 2, 6)
    assert fragments.outline(~MASK).count("M") == 2  # around the picture, and around the hole
    assert fragments.outline(np.zeros((8, 8), dtype=bool)) == ""


def test_curves_leave_out_what_is_no_number() -> None:
    html = fragments.curves(
        [{"phase": "words", "losses": {"total": value, "b": "x"}} for value in (2.0, float("nan"), 1.0)]
    )
    assert "words, total: 1 after 2 steps, 2 at first" in html
    assert html.count("<svg") == 1
    assert fragments.curves([{"losses": 3}, {}]) == ""
