"""A CLIP tokenizer whose vocabulary is the tabletop's words, one token each, and every byte, for any other text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from icekit_tabletop.captions import WORDS

MAX_LENGTH = 40
"""Tokens of a prompt, start and end included."""

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of CLIP's own vocabulary: the printable
    bytes as themselves, the others moved past U+00FF.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(256 + offset) for offset in range(len(rest))]


def build_vocabulary(words: Iterable[str] = WORDS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (token to id) and merges (best first) under which every word is exactly one token.

    Words of lower-case ASCII letters. Specials come last and the end token is the highest id of all, because open_clip
    pools a text at the position of its highest id.
    """
    alphabet = byte_alphabet()
    tokens = {token: None for token in [*alphabet, *(character + "</w>" for character in alphabet)]}
    merges: list[tuple[str, str]] = []
    # Spell each word left to right by the merges so far, as BPE would, and add merges for what stays apart. A later
    # merge ranks lower, so it can never split a word that is already whole.
    for word in sorted(set(words), key=lambda item: (len(item), item)):
        if not (word.isascii() and word.isalpha() and word.islower()):
            raise ValueError(f"not a word of lower-case letters: {word!r}")
        pieces = _spell(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens[pieces[0] + pieces[1]] = None
            pieces = _spell(word, merges)
    ordered = [*tokens, START, END]
    return {token: index for index, token in enumerate(ordered)}, merges


def _spell(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces that BPE with these merges leaves of a word."""
    rank = {pair: index for index, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        best = min(pairwise(pieces), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        merged: list[str] = []
        index = 0
        while index < len(pieces):
            if index + 1 < len(pieces) and (pieces[index], pieces[index + 1]) == best:
                merged.append(pieces[index] + pieces[index + 1])
                index += 2
            else:
                merged.append(pieces[index])
                index += 1
        pieces = merged
    return pieces


def build_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """The tokenizer itself: 40 tokens at most, padded with the end token as Stable Diffusion's CLIP tokenizers are."""
    vocabulary, merges = build_vocabulary(words)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def save_tokenizer(folder: Path | str, words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """Builds the tokenizer and writes its files to `folder`, for transformers and for open_clip alike."""
    tokenizer = build_tokenizer(words)
    tokenizer.save_pretrained(str(folder))
    return tokenizer
