"""Captions of tabletop scenes: the sentences our text-to-image and CLIP models learn their words from.

Every word a caption may use is in `WORDS`; the tokenizer makes each of them one token. An attribute has one word form
("wood", never "wooden"), so that one word is one concept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES, TABLES, TEXTURES, WALLS

ATTRIBUTES: tuple[str, ...] = ("shape", "colour", "material", "texture")

PREFIXES: tuple[str, ...] = (
    "a photo of",
    "a picture of",
    "an image of",
    "a rendering of",
    "a rendition of",
    "a depiction of",
    "a close-up photo of",
    "a bright photo of",
    "a dark photo of",
    "a cropped photo of",
    "a good photo of",
    "a clean photo of",
    "a cool photo of",
    "a nice photo of",
    "a small photo of",
    "a weird photo of",
    "a large photo of",
    "the photo of",
    "a photo of one",
    "a photo of my",
)
"""Openings in the manner of CLIP's photo templates. Those that end in a determiner replace the phrase's own."""

_OTHER_WORDS = (
    "a an the of and on in with to is are has that which made this it there one two three four my no"
    " front back background scene image photo picture rendering rendition depiction close up bright dark cropped good"
    " clean cool nice small weird large concept"
    " thing things object objects other some nothing but empty only just"
    " colour color coloured colored material texture surface shape attribute"
    " table wall tabletop"
)


def _words_of(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in name.lower().replace("-", " ").replace("_", " ").split()]


WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *_words_of(list(SHAPES)),
            *_words_of(list(COLOURS)),
            *_words_of(list(MATERIALS)),
            *_words_of(list(TEXTURES)),
            *_words_of(list(TABLES)),
            *_words_of(list(WALLS)),
            *_OTHER_WORDS.split(),
        ]
    )
)
"""Every word captions may use, lower case, each once."""

_OBJECT_WORDS = frozenset(_words_of([*SHAPES, *COLOURS, *MATERIALS, *TEXTURES]))

Claim = tuple[str | None, str | None, str | None, str | None]
"""What a caption says of one object: (shape, colour, material, texture), None where it says nothing."""


@dataclass(frozen=True)
class Caption:
    """A caption and what it asserts, so that a trainer can tell a wrong pair from an accidentally right one.

    `claims`: one per object named. `table`, `wall`: the name asserted or None. `count`: the number of objects
    asserted, or None; only captions of empty scenes assert it.
    """

    text: str
    claims: tuple[Claim, ...] = ()
    table: str | None = None
    wall: str | None = None
    count: int | None = None


def _spec(item: Any) -> Any:
    return getattr(item, "spec", item)


def _article(phrase: str) -> str:
    return "an" if phrase[:1] in "aeiou" else "a"


def _noun_phrase(spec: Any, *, name_plain: bool = False) -> str:
    words = [spec.colour]
    if spec.texture != "plain" or name_plain:
        words.append(spec.texture)
    return " ".join([*words, spec.material, spec.shape])


def _join(phrases: Sequence[str], last: str = " and ") -> str:
    if len(phrases) < 2:
        return "".join(phrases)
    return ", ".join(phrases[:-1]) + last + phrases[-1]


def describe(objects: Sequence[Any]) -> str:
    """The full plain caption: every object with all its attributes, in the order given.

    `objects`: `ObjectSpec` or `PlacedObject` items. "plain", the absence of a pattern, is left unsaid.
    """
    if not objects:
        return "an empty table"
    phrases = [_noun_phrase(_spec(item)) for item in objects]
    return _join([f"{_article(phrase)} {phrase}" for phrase in phrases])


def _prefixed(phrase: str, rng: random.Random, *, rate: float = 0.45) -> str:
    if rng.random() >= rate:
        return phrase
    prefix = rng.choice(PREFIXES)
    if prefix.endswith(("one", "my")):
        head, _, rest = phrase.partition(" ")
        phrase = rest if head in ("a", "an", "the") and rest else phrase
    return f"{prefix} {phrase}"


def _named_attribute(attribute: str, value: str, rng: random.Random) -> str:
    """An attribute spoken of as a thing: "a red colour", "the texture is dotted"."""
    name = attribute
    if attribute == "colour" and rng.random() < 0.3:
        name = "color"
    if attribute == "texture" and rng.random() < 0.15:
        name = "surface"
    forms: tuple[str, ...]
    if attribute == "shape":
        forms = (f"the shape of {_article(value)} {value}", f"a {value} shape", f"the shape {value}", f"{value} shape")
    else:
        forms = (
            f"the {name} {value}",
            f"{_article(value)} {value} {name}",
            f"the {name} is {value}",
            f"{value} {name}",
            f"{value} {name}",
            f"{name} {value}",
        )
    return rng.choice(forms)


def _phrase(values: dict[str, str], rng: random.Random, *, simple: bool = False, determiner: str | None = None) -> str:
    """One object in words, from the attributes kept in `values`; without a shape it is a "thing" or an "object"."""
    noun = values.get("shape") or rng.choice(("thing", "object"))
    adjectives = [key for key in ("colour", "texture", "material") if key in values]
    if rng.random() < 0.15:
        rng.shuffle(adjectives)
    words = [values[key] for key in adjectives]
    first = words[0] if words else noun
    determiner = determiner or ("the" if rng.random() < 0.12 else _article(first))
    roll = rng.random()
    if not words or roll < (0.8 if simple else 0.5):
        phrase = " ".join([*words, noun])
        return phrase if rng.random() < 0.12 else f"{determiner} {phrase}"
    lead = f"{_article(noun)} {noun}" if rng.random() < 0.5 else noun
    if simple or roll < 0.72:
        # ICE's own prompts read "<category> <attribute 1> <attribute 2>".
        separator = rng.choice((" ", " ", ", "))
        comma = "," if separator == ", " or rng.random() < 0.3 else ""
        return f"{lead}{comma} {separator.join(words)}"
    if "material" in values and roll < 0.82:
        rest = [values[key] for key in adjectives if key != "material"]
        head = " ".join([*rest, noun])
        return f"{_article(head)} {head} {rng.choice(('made of', 'made of', 'of'))} {values['material']}"
    if roll < 0.91:
        return f"{rng.choice(('a', 'the'))} {noun} {rng.choice(('that is', 'which is', 'is'))} {' and '.join(words)}"
    key = rng.choice(adjectives)
    rest = [values[other] for other in adjectives if other != key]
    head = " ".join([*rest, noun])
    value = values[key]
    tail = f"with {_article(value)} {value} {key}" if rng.random() < 0.6 else f"of {value} {key}"
    return f"{_article(head)} {head} {tail}"


def _surface(name: str, noun: str) -> tuple[str, bool]:
    """A table or wall in words, and whether they name its look. A look called by a word that objects use too ("dusty
    blue") stays unnamed, lest the word come to mean the backdrop.
    """
    if _OBJECT_WORDS.isdisjoint(name.split()):
        return f"{_article(name)} {name} {noun}", True
    return f"a {noun}", False


def _background(table: str, wall: str, rng: random.Random) -> tuple[str, bool, bool]:
    """A phrase about where things stand, and whether it names the table's and the wall's look."""
    (tables, knows_table), (walls, knows_wall) = _surface(table, "table"), _surface(wall, "wall")
    roll = rng.random()
    if roll < 0.3:
        return "on a table", False, False
    if roll < 0.55:
        return f"on {tables}", knows_table, False
    if roll < 0.75:
        return f"in front of {walls}", False, knows_wall
    if roll < 0.85:
        return f"on {tables} in front of {walls}", knows_table, knows_wall
    return rng.choice(("in front of a wall", "on the table", "on a tabletop")), False, False


def _values(spec: Any, keep: Sequence[str]) -> dict[str, str]:
    return {key: getattr(spec, key) for key in ATTRIBUTES if key in keep}


def _claim(values: dict[str, str]) -> Claim:
    return (values.get("shape"), values.get("colour"), values.get("material"), values.get("texture"))


def _keep(spec: Any, rng: random.Random, drop: float) -> list[str]:
    """The attributes to name. Shape stays more often than the rest: it is the hardest to see and so the one that a
    model learns last if the captions let it do without.
    """
    plain_rate = 0.35 if spec.texture == "plain" else 1.0
    if rng.random() >= drop:
        return ["shape", "colour", "material", *(["texture"] if rng.random() < plain_rate else [])]
    roll = rng.random()
    if roll < 0.3:
        return ["shape"]
    rates = {"colour": 0.45, "material": 0.45, "texture": 0.4 * (0.5 + 0.5 * plain_rate)}
    kept = [key for key, rate in rates.items() if rng.random() < rate]
    if roll < 0.85:
        return ["shape", *kept]
    return kept or [rng.choice(("colour", "material"))]


def _empty_caption(table: str, wall: str, rng: random.Random) -> Caption:
    (tables, knows_table), (walls, knows_wall) = _surface(table, "table"), _surface(wall, "wall")
    forms = (
        ("an empty table", False, False),
        ("nothing but a table and a wall", False, False),
        (f"nothing on {tables}", knows_table, False),
        (f"{tables} and {walls}", knows_table, knows_wall),
        ("background", False, False),
        ("a table", False, False),
        ("there is nothing on the table", False, False),
        (f"an empty table in front of {walls}", False, knows_wall),
    )
    text, names_table, names_wall = rng.choice(forms)
    return Caption(
        _prefixed(text, rng, rate=0.25),
        table=table if names_table else None,
        wall=wall if names_wall else None,
        count=0,
    )


def caption_scene(
    scene: Any, rng: random.Random, drop: float = 0.5, *, table: str | None = None, wall: str | None = None
) -> Caption:
    """A random caption of a scene with what it asserts.

    `scene`: a `SceneSpec`, or a sequence of objects with `table` and `wall` given. `drop`: 0 to 1, how often a caption
    leaves attributes or objects out; 0 names everything.
    """
    items = getattr(scene, "objects", scene)
    table = table or getattr(scene, "table", None)
    wall = wall or getattr(scene, "wall", None)
    if table is None or wall is None:
        raise ValueError("table and wall are needed: pass a SceneSpec, or both names")
    specs = [_spec(item) for item in items]
    if not specs:
        return _empty_caption(table, wall, rng)
    rng.shuffle(specs)
    if rng.random() < 0.05 * min(1.0, 2 * drop):
        text, names_table, names_wall = _background(table, wall, rng)
        if names_table or names_wall:
            text = f"{rng.choice(('a thing', 'some things', 'things', 'objects'))} {text}"
            return Caption(text, table=table if names_table else None, wall=wall if names_wall else None)
    if len(specs) == 1:
        return _single_caption(specs[0], table, wall, rng, drop)
    return _group_caption(specs, table, wall, rng, drop)


def _with_background(
    text: str, claims: tuple[Claim, ...], table: str, wall: str, rng: random.Random, rate: float
) -> Caption:
    if rng.random() >= rate:
        return Caption(text, claims)
    tail, names_table, names_wall = _background(table, wall, rng)
    return Caption(f"{text} {tail}", claims, table if names_table else None, wall if names_wall else None)


def _single_caption(spec: Any, table: str, wall: str, rng: random.Random, drop: float) -> Caption:
    roll = rng.random()
    if roll < 0.14 * drop:
        keys = rng.sample(ATTRIBUTES, rng.choice((1, 1, 2)))
        values = _values(spec, keys)
        text = ", ".join(_named_attribute(key, values[key], rng) for key in keys)
        return Caption(_prefixed(text, rng, rate=0.3), (_claim(values),))
    if roll < 0.20 * drop:
        key = rng.choice(ATTRIBUTES)
        values = _values(spec, [key])
        return Caption(_prefixed(values[key], rng, rate=0.3), (_claim(values),))
    if roll < 0.25 * drop:
        values = _values(spec, ["shape"])
        tail = rng.choice((" things background", ", background", " on a background"))
        return Caption(_prefixed(spec.shape, rng, rate=0.2) + tail, (_claim(values),))
    values = _values(spec, _keep(spec, rng, drop))
    if list(values) == ["shape"] and rng.random() < 0.25:
        return Caption(spec.shape, (_claim(values),))
    text = _prefixed(_phrase(values, rng), rng)
    return _with_background(text, (_claim(values),), table, wall, rng, 0.15)


def _group_caption(specs: list[Any], table: str, wall: str, rng: random.Random, drop: float) -> Caption:
    if rng.random() < 0.3 * drop:
        values = _values(specs[0], _keep(specs[0], rng, 0.8))
        tail = rng.choice(
            (" and other things", " and some other things", ", background", " things background", " and other objects")
        )
        return Caption(_prefixed(_phrase(values, rng, simple=True), rng, rate=0.3) + tail, (_claim(values),))
    named = specs
    if len(specs) > 2 and rng.random() < 0.25 * drop:
        named = specs[: rng.randint(2, len(specs) - 1)]
    kept = [_values(spec, _keep(spec, rng, drop)) for spec in named]
    phrases = [_phrase(values, rng, simple=True) for values in kept]
    text = _join(phrases, rng.choice((" and ", " and ", ", ")))
    if len(specs) < 4:
        text = _prefixed(text, rng, rate=0.35)
    claims = tuple(_claim(values) for values in kept)
    return _with_background(text, claims, table, wall, rng, 0.12 if len(specs) < 4 else 0.0)


def sample_caption(
    scene_or_objects: Any,
    table: str | None = None,
    wall: str | None = None,
    rng: random.Random | None = None,
    drop: float = 0.5,
) -> str:
    """A random caption of a scene as text; see `caption_scene`.

    `scene_or_objects`: a `SceneSpec`, or objects with `table` and `wall` named. `rng`: a `random.Random`; None draws
    from a fresh one. `drop`: 0 names everything, 1 leaves something out in every caption.
    """
    return caption_scene(scene_or_objects, rng or random.Random(), drop, table=table, wall=wall).text
