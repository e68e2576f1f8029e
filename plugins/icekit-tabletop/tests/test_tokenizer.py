"""The tokenizer: one token a word, a token for everything else, and the same through every loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from icekit_tabletop.captions import WORDS
from icekit_tabletop.tokenizer import END, MAX_LENGTH, START, build_vocabulary, save_tokenizer
from icekit_tabletop.train.clip import clip_config
from transformers import AutoTokenizer, CLIPTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    (path / "open_clip_config.json").write_text(json.dumps(clip_config()))
    return path


@pytest.fixture(scope="module", params=[CLIPTokenizer, AutoTokenizer])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Any:
    return request.param.from_pretrained(str(folder))


def test_every_word_is_one_token(tokenizer: Any) -> None:
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    for word in WORDS:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, word
        assert (ids[0], ids[2]) == (start, end)
        assert tokenizer(word.upper()).input_ids == ids


def test_a_word_is_the_same_token_inside_a_sentence(tokenizer: Any) -> None:
    cup = tokenizer("cup", add_special_tokens=False).input_ids
    assert tokenizer("a red,cup on it", add_special_tokens=False).input_ids[3:4] == cup


def test_the_end_token_is_the_highest(tokenizer: Any) -> None:
    vocabulary, _ = build_vocabulary()
    assert tokenizer.eos_token_id == len(vocabulary) - 1 == max(vocabulary.values())
    assert tokenizer.bos_token_id == len(vocabulary) - 2
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == MAX_LENGTH
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


@pytest.mark.parametrize("text", ["zebra", "Zürich", "木のコップ", "🎈", "x" * 30, "a\tb\n<>&%$#", "na\u0308ive"])
def test_any_text_has_tokens(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids
    assert tokenizer.unk_token_id not in ids


def test_open_clip_reads_the_folder(folder: Path, tokenizer: Any) -> None:
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red cup", "ball " * 60])
    assert tuple(tokens.shape) == (2, MAX_LENGTH)
    ids = tokenizer("a red cup").input_ids
    assert tokens[0, : len(ids)].tolist() == ids
    # open_clip pools at the first highest id: the end of the text, cut or not.
    assert tokens.argmax(-1).tolist() == [len(ids) - 1, MAX_LENGTH - 1]


def test_new_tokens_can_be_added(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new>"]) == 1
    assert tokenizer("a <new> cup", add_special_tokens=False).input_ids[1] == size


def test_only_plain_words_are_accepted() -> None:
    with pytest.raises(ValueError, match="lower-case"):
        build_vocabulary(["close-up"])
