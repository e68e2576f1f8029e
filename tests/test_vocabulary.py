"""The words that icekit brings: things, colours, materials, patterns; and that a vocabulary is read once."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from icekit import clip
from icekit.builtin.attributes import COLOUR, MATERIAL, PATTERN
from icekit.cache import cache_folder, cached, digest_of
from icekit.clip import ClipModel, encode_text
from icekit.protocols import Attribute
from icekit.words import read_vocabulary


def shipped(name: str) -> list[str]:
    return files("icekit").joinpath("vocabulary", name).read_text(encoding="utf-8").splitlines()


def test_the_things_are_clean_and_in_order() -> None:
    words = [line for line in shipped("things.txt") if not line.startswith("#")]
    assert len(words) == 9150
    assert words == sorted(set(words)) == read_vocabulary(None)
    assert all(re.fullmatch(r"[a-z0-9'&.-]+( [a-z0-9'&.-]+){0,2}", word) for word in words)
    assert {word for word in shipped("nouns.txt") if word} <= set(words)
    assert {"dog", "cat", "woman", "car", "mug", "sofa", "laptop", "tulip", "bread", "mountain", "hand"} <= set(words)
    assert not {"idea", "happiness", "week", "paris", "run", "red"} & set(words)


def test_the_things_come_with_the_notice_that_their_source_asks_for() -> None:
    head = "\n".join(line for line in shipped("things.txt") if line.startswith("#"))
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in head
    assert "provided that you agree to comply with the following copyright notice" in head
    assert "wordfreq" in head and "scripts/make_vocabulary.py" in head


@pytest.mark.parametrize(("attribute", "least"), [(COLOUR, 40), (MATERIAL, 80), (PATTERN, 50)])
def test_attributes_have_many_words_each_once(attribute: Attribute, least: int) -> None:
    assert len(attribute.vocabulary) >= least
    assert len(set(attribute.vocabulary)) == len(attribute.vocabulary)
    assert all(re.fullmatch(r"[a-z]+", word) for word in attribute.vocabulary)


def test_a_text_is_read_to_its_end_alone() -> None:
    """What CLIP makes of a text does not depend on the empty places behind it."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        16, {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    ).eval()  # fmt: skip
    ids = open_clip.SimpleTokenizer()(["a photo of a dog", "cup", "! !", ""])
    lengths: list[int] = []
    model.transformer.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    with torch.no_grad():
        whole = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
        assert torch.allclose(encode_text(model, ids), whole, atol=1e-6)
        assert lengths == [77, 7]
        model.attn_mask = torch.zeros_like(model.attn_mask)  # a model in which all places see all
        assert torch.equal(encode_text(model, ids), model.encode_text(ids))


def test_a_vocabulary_is_read_once(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(clip, "CACHED_FROM", 4)
    reads: list[int] = []

    def counting(model: Any, ids: torch.Tensor) -> torch.Tensor:
        reads.append(len(ids))
        return encode_text(model, ids)

    monkeypatch.setattr(clip, "encode_text", counting)

    def embedded(words: list[str], template: str = "a {}") -> torch.Tensor:
        return ClipModel(str(clip_folder), "", torch.device("cpu")).embed_words(words, [template])

    words = ["cup", "ball", "bowl", "vase"]
    first = embedded(words)
    assert sum(reads) == 4
    assert torch.equal(embedded(words), first) and sum(reads) == 4
    embedded(words[:3])  # few words are not kept
    embedded(words, "the {}")
    embedded([*words, "cone"])
    assert sum(reads) == 4 + 3 + 4 + 5
    kept = sorted((tmp_path / "icekit" / "words").iterdir())
    assert len(kept) == 3 and all(path.suffix == ".safetensors" for path in kept)
    for path in kept:
        path.write_bytes(b"damaged")
    assert torch.equal(embedded(words), first)
    assert sum(reads) == 4 + 3 + 4 + 5 + 4


def test_where_nothing_can_be_kept_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "icekit").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = torch.rand(2, 3)
    assert torch.equal(cached("words", "a" * 64, 2, lambda: values), values)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() != Path("relative/icekit")


def test_a_digest_tells_values_types_and_shapes_apart() -> None:
    one = torch.arange(6)
    others = [one.float(), one.view(2, 3), one.flip(0), "0"]
    assert len({digest_of([one]), *(digest_of([other]) for other in others), digest_of([one, one])}) == 6
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert digest_of([one]) == digest_of([one.clone()])
