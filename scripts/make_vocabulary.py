"""Make the vocabulary of things that icekit ships: WordNet's names of what can be seen, the frequent ones.

    apt-get install wordnet-base         # WordNet 3.0's database, under /usr/share/wordnet
    pip install wordfreq==3.1.1
    python scripts/make_vocabulary.py    # writes icekit/vocabulary/things.txt; --check only compares

The same two sources give the same file. Chosen by hand is what stands in this file as a list, and ``nouns.txt``, whose
words are all among the result.

Licences: WordNet's permits redistribution with its notice, which is in the head of the file. wordfreq's data is CC
BY-SA 4.0: taken from it is whether a word is frequent enough; no frequency is in the file, nor an order by it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

VOCABULARY = Path(__file__).parents[1] / "icekit" / "vocabulary"

ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PLANT = 5, 6, 8, 13, 17, 18, 20
KINDS = (ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PLANT)
"""WordNet's lexicographer files of what can be seen, by number."""
SHARE = 0.3
"""A word is called by a sense that has this share of its tagged occurrences, as any part of speech."""
ENOUGH_TAGS = 3
"""Of a word with fewer tagged occurrences the first sense counts."""
LEAST, LEAST_IN_PAIR = 1.6, 3.3
"""Zipf frequencies (log10 per billion words) of a word, and of each of two words."""
LEAST_PAIR = {ANIMAL: 3.8, ARTIFACT: 3.5, BODY: 3.8, FOOD: 3.4, OBJECT: 3.8, PERSON: 9.0, PLANT: 3.9}
"""Zipf frequency of two words together, which wordfreq guesses from both: a species is rarer than its name's words."""
COMMON = 3.3
"""A word of which nobody tagged a sense, and which is an adjective or a verb too, is a thing's if it is rarer."""
MOST_KINDS, MOST_KINDS_OF_PAIR = 150, 6
"""A name of more kinds of things than this is too general for a concept; of two words already of a few."""

GENERAL = (
    "animal", "bag", "bird", "boat", "bottle", "box", "building", "cake", "chair", "clothing", "dog", "drink", "fish",
    "flower", "food", "fruit", "furniture", "hat", "house", "insect", "machine", "man", "plant", "room", "ship", "shop",
    "shrub", "table", "tool", "toy", "tree", "vegetable", "vehicle", "weapon", "woman",
)  # fmt: skip
"""General names that people give all the same."""
PEOPLE = (
    "skilled_worker", "professional", "entertainer", "athlete", "serviceman", "musician", "artist", "juvenile", "woman",
    "man", "child", "ruler", "clergyman", "craftsman", "laborer", "lawman", "attendant", "servant", "religious", "cook",
    "farmer", "rider", "dancer", "combatant", "mythical_monster", "bride", "bridegroom", "hunter", "fisherman", "diver",
)  # fmt: skip
"""People of these kinds look it."""
PARTS = ("external_body_part", "hairdo", "hair", "beard", "sense_organ", "tooth", "body_covering", "skeleton", "horn")
"""Parts of a body that are on its outside, or are seen alone."""
NOT_SEEN = (
    "drug", "medicine", "drug_of_abuse", "microorganism", "unit", "agent", "particle", "body_substance", "relative",
    "bad_person", "unwelcome_person", "nutriment_", "diet", "helping", "reproductive_organ", "genitalia", "opening",
    "software", "representation_", "anus", "buttocks", "breast", "pubic_hair", "toxin", "chemical_weapon",
    "controlled_substance", "embryo", "imaginary_place", "component_", "memory_device", "nonworker", "system",
    "waterway_", "communication_system", "surface", "decedent", "homosexual", "groin", "land", "bacteria_", "location",
)  # fmt: skip
"""What has a sense of this kind above it is left out."""
USAGE = ("slang", "disparagement", "ethnic_slur", "obscenity", "trade_name", "trademark", "archaism", "colloquialism")
"""What WordNet says of how a word is used, so that it is left out."""
RUDE = re.compile(
    r"offensive|\bslurs?\b|slang|obscen|vulgar|disparag|derogat|informal|euphemis|sexual|genital|excre|f[a]?eces|"
    r"prostitut|copulat|penis|vagina|urin|scrot|testic|menstru|contracept|condom|intercourse|erotic|slave|negro|"
    r"insult|stupid|contempt|shit|mistress|virgin|mental|retard|cripple|colou?red person|concubine|castrat|geisha"
)
"""In a gloss: nobody's photograph should be named so."""
LEFT_OUT = """
    affiliate amenity appliance area article assembly attachment base body building block bulk business
    center centre chassis cog complex compound constituent contents copy core creation creature decoration domain
    element end entity equipment estate exterior facility feature fixture flat form foundation gadget gear good goods
    ground grounds head home hardware holding host individual infrastructure instrument interior invention item
    layer level line main makeup material mean means measure member model module mount native object opening output
    part piece place point position post product production prop property prototype range record resource section
    series set setting side single site solid space stage standard stock store stuff substance supply support
    surface surrounding system thing top transplant unit upgrade upright utility variable work works world
    asset backing backup basic binary cadaver carcass caller commodity corpse crack cross cut dead demo
    development draft edge equivalent exhibit face fact facing fill filling fitting front half heap implant import
    inside installation insert institution joint junk launch left loop machination mark mass medium mess middle
    mix model moderator network original outside outlet passage past pattern pass patent pit prime principal
    process profile provision rear recording release replacement right root sample seal second service shape shot
    slide slot source spot spread springs sticker stop store structure style subject survivor target terminal text
    token total track trap turn type vent void watch waste whole withdrawal yield rest stand number hold cover
    abortionist foreskin endoderm mesoderm ectoderm whiteface blackface requirement nonessential supernatant adjunct
    commemorative perishable minimus hooks crus polymorph commensal punky innovation shortcut backspace eyeful sang
    acumen allgood universe quasar bonanza vagabond remains earth broody stayer das webbing conqueror
    beat buzz bit keep lead lot mains novelty period pole prison rally spare stage state tack bimbo
    noose swinger prepuce beefcake
    """
"""Words that name nothing that one could draw, or that pictures are seldom meant by."""
HEAD = """\
# Things that can be seen, by name, in the order of the alphabet: {count} words.
#
# Made by scripts/make_vocabulary.py from WordNet 3.0: names of animals, plants, food, artifacts, natural objects, parts
# of bodies and kinds of people, in the sense in which they are mostly used; and the nouns of nouns.txt, chosen by hand.
# Which words are frequent was looked up with wordfreq (Robyn Speer, 2022; its data is CC BY-SA 4.0); no frequency is
# in here.
#
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.
#
# Permission to use, copy, modify and distribute this software and database and its documentation for any purpose and
# without fee or royalty is hereby granted, provided that you agree to comply with the following copyright notice and
# statements, including the disclaimer, and that the same appear on ALL copies of the software, database and
# documentation, including modifications that you make for internal use or for distribution.
#
# THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES,
# EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES
# OF MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR
# DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.
#
# The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution
# of the software and/or database. Title to copyright in this software, database and any associated documentation shall
# at all times remain with Princeton University and LICENSEE agrees to preserve same.
"""


@dataclass(frozen=True)
class Synset:
    """A sense of WordNet: the words that share it, as they are spelled, the first one preferred.

    kind: its lexicographer file. above: what it is a kind of. usage: of how its words are used, by sense.
    """

    words: list[str]
    lex_ids: list[int]
    kind: int
    above: list[str]
    usage: list[str]
    gloss: str


class WordNet:
    """The nouns of WordNet's database files (wndb(5WN), senseidx(5WN))."""

    def __init__(self, folder: Path) -> None:
        self.synsets = dict(_synsets(folder / "data.noun"))
        self.senses = {f[0]: f[-int(f[2]) :] for f in _lines(folder / "index.noun")}
        self.others = {f[0] for part in ("adj", "verb", "adv") for f in _lines(folder / f"index.{part}")}
        self.below: dict[str, list[str]] = defaultdict(list)
        for key, synset in self.synsets.items():
            for above in synset.above:
                self.below[above].append(key)
        self.tags: dict[tuple[str, int, int], int] = {}
        self.all_tags: dict[str, int] = defaultdict(int)
        for key, _, count in _lines(folder / "cntlist.rev"):
            word, _, place = key.partition("%")
            part, kind, lex_id, *_ = place.split(":")
            self.all_tags[word] += int(count)
            if part == "1":
                self.tags[word, int(kind), int(lex_id)] = int(count)

    def named(self, words: Iterable[str]) -> set[str]:
        """The senses whose preferred word is one of these, in small letters."""
        wanted = set(words)
        return {key for key, synset in self.synsets.items() if synset.words[0].lower() in wanted}

    def closure(self, keys: Iterable[str], of: Callable[[str], Iterable[str]]) -> set[str]:
        """The senses, and all that is reached from them."""
        found: set[str] = set()
        todo = list(keys)
        while todo:
            key = todo.pop()
            if key not in found:
                found.add(key)
                todo += of(key)
        return found

    def under(self, words: Iterable[str]) -> set[str]:
        """The senses of these words, and all that are kinds of them."""
        return self.closure(self.named(words), lambda key: self.below[key])

    def kinds_of(self, key: str) -> int:
        """How many senses are kinds of this one."""
        return len(self.closure([key], lambda one: self.below[one])) - 1

    def meant(self, word: str) -> str | None:
        """The sense in which a word is mostly used, if it is of ``KINDS``."""
        total = self.all_tags[word]
        for place, key in enumerate(self.senses[word]):
            synset = self.synsets[key]
            if synset.kind not in KINDS:
                if place == 0 and total < ENOUGH_TAGS:
                    return None
                continue
            if total < ENOUGH_TAGS:
                return key
            lex_id = synset.lex_ids[[one.lower() for one in synset.words].index(word)]
            if self.tags.get((word, synset.kind, lex_id), 0) >= SHARE * total:
                return key
        return None


def _lines(file: Path) -> Iterator[list[str]]:
    """The fields of a database file's lines, without its licence, which is set in by two blanks."""
    with file.open(encoding="latin-1") as lines:
        yield from (line.split() for line in lines if not line.startswith("  "))


def _synsets(file: Path) -> Iterator[tuple[str, Synset]]:
    with file.open(encoding="latin-1") as lines:
        for line in lines:
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            key, kind, _, count, *rest = data.split()
            words = 2 * int(count, 16)
            pointers = rest[words + 1 :]
            by_symbol = [(pointers[i], pointers[i + 1]) for i in range(0, len(pointers), 4)]
            yield (
                key,
                Synset(
                    words=rest[0:words:2],
                    lex_ids=[int(one, 16) for one in rest[1:words:2]],
                    kind=int(kind),
                    above=[other for symbol, other in by_symbol if symbol in ("@", "@i")],
                    usage=[other for symbol, other in by_symbol if symbol == ";u"],
                    gloss=gloss.strip(),
                ),
            )


def things(wordnet: WordNet, frequency: Callable[[str], float], by_hand: Iterable[str]) -> list[str]:
    """The vocabulary, in the order of the alphabet.

    A word is in it when it is mostly used for a thing that can be seen, frequent enough, neither too general nor rude,
    no name and no abbreviation. Of the words for one sense the most frequent is taken, so that they do not share votes.

    frequency: Zipf frequency of a word or of two. by_hand: words that are in it in any case.
    """
    left_out = set(LEFT_OUT.split())
    people, parts = wordnet.under(PEOPLE), wordnet.under(PARTS)
    not_seen = wordnet.under(NOT_SEEN)
    unwanted = wordnet.named(USAGE)
    kept = set(by_hand)
    best: dict[str, tuple[float, str]] = {}
    for lemma in wordnet.senses:
        word = lemma.replace("_", " ")
        if not re.fullmatch(r"[a-z]{3,}( [a-z]{3,})?", word) or word in left_out:
            continue
        key = wordnet.meant(lemma)
        if key is None or key in not_seen:
            continue
        synset = wordnet.synsets[key]
        if lemma not in synset.words:  # spelled with a capital letter
            continue
        if (synset.kind == PERSON and key not in people) or (synset.kind == BODY and key not in parts):
            continue
        if RUDE.search(f"{word} {synset.gloss}") or unwanted.intersection(synset.usage):
            continue
        often, kinds = frequency(word), wordnet.kinds_of(key)
        if " " in word:
            least = min(frequency(part) for part in word.split())
            enough = often >= LEAST_PAIR[synset.kind] and least >= LEAST_IN_PAIR and synset.words[0] == lemma
            if not enough or kinds > MOST_KINDS_OF_PAIR:
                continue
        else:
            doubtful = wordnet.all_tags[lemma] < ENOUGH_TAGS and lemma in wordnet.others and often >= COMMON
            if often < LEAST or doubtful or (kinds > MOST_KINDS and word not in GENERAL):
                continue
        if key not in best or (often, word) > best[key]:
            best[key] = (often, word)
    return sorted(kept | {word for _, word in best.values()})


@click.command()
@click.option("--wordnet", default="/usr/share/wordnet", show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default=VOCABULARY / "things.txt", show_default=True, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail if the file would be another.")
def main(wordnet: Path, out: Path, check: bool) -> None:
    """Make icekit's vocabulary of things from WordNet and wordfreq."""
    from wordfreq import zipf_frequency

    nouns = (VOCABULARY / "nouns.txt").read_text(encoding="utf-8").split("\n")
    found = things(WordNet(wordnet), lambda word: zipf_frequency(word, "en", "large"), [noun for noun in nouns if noun])
    text = HEAD.format(count=len(found)) + "\n".join(found) + "\n"
    if check:
        if out.read_text(encoding="utf-8") != text:
            raise click.ClickException(f"{out} is not what this recipe makes")
    else:
        out.write_text(text, encoding="utf-8")
    click.echo(f"{len(found)} words")


if __name__ == "__main__":
    main()
