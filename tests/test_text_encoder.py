"""Extra tokens in a CLIP text encoder."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from icekit.backbones.text_encoder import ExtendedEmbedding, TextEncoder, pool_at_end, pool_at_highest
from icekit.protocols import InputError
from icekit.testing import tiny


@pytest.fixture(params=[1, 2])
def encoder(request) -> TextEncoder:
    pipeline = tiny.tiny_pipeline(version=request.param)
    return TextEncoder(pipeline.tokenizer, pipeline.text_encoder.requires_grad_(False))


@pytest.fixture
def t5_encoder() -> TextEncoder:
    tokenizer = tiny_models.tiny_t5_tokenizer()
    return TextEncoder(tokenizer, tiny_models.tiny_t5_encoder(tokenizer).requires_grad_(False), length=12)


def row(seed: int, *, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def test_every_word_of_the_tiny_tokenizer_is_one_token():
    tokenizer = tiny.tiny_tokenizer()
    for word in tiny.WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    text = "naïve “café” 北京 🙂!"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).replace(" ", "") == text.replace(
        " ", ""
    )


def test_extended_embedding_looks_up_rows_by_id():
    table = nn.Embedding(4, 2)
    embedding = ExtendedEmbedding(table)
    far, inside = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    ids = torch.tensor([[0, 9], [2, 3]])
    expected = torch.stack([torch.stack([table.weight[0], far]), torch.stack([inside, table.weight[3]])])
    with embedding.extended({9: far, 2: inside}):  # an id beyond the table, and one within it that is taken over
        assert torch.equal(embedding(ids), expected)
        with embedding.extended({9: inside}):
            assert torch.equal(embedding(torch.tensor([9, 2])), torch.stack([inside, table.weight[2]]))
        assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding(torch.tensor([2])), table.weight[[2]])


def test_gradient_goes_to_the_row_and_nowhere_else(encoder):
    first, second, unused = (row(seed, requires_grad=True) for seed in range(3))
    tokens = {"<cup-0>": first, "<cup-0-colour>": second, "<ball-1>": unused}
    prompts = ["a <cup-0> of <cup-0-colour>"]
    (encoder.encode(prompts, tokens).sum() + encoder.embed(prompts, tokens).square()[0, 0]).backward()
    assert first.grad.abs().sum() > 0
    assert second.grad.abs().sum() > 0
    assert unused.grad is None or unused.grad.abs().sum() == 0
    assert all(parameter.grad is None for parameter in encoder.model.parameters())


def test_rows_stay_the_callers(encoder):
    mine = row(0, requires_grad=True)
    before = encoder.encode(["a <cup-0>"], {"<cup-0>": mine}).detach()
    with torch.no_grad():
        mine += 1
    assert not torch.equal(encoder.encode(["a <cup-0>"], {"<cup-0>": mine}), before)


def test_plain_prompts_are_the_models_own(encoder):
    """Without extra tokens the sequence is what the text model itself returns, with them too."""
    prompts = ["a photo of a red cup", ""]
    pipeline = tiny.tiny_pipeline(version=2 if encoder.tokenizer.pad_token == "!" else 1)
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = pipeline.text_encoder(ids).last_hidden_state
    assert torch.equal(encoder.encode(prompts), expected)
    assert torch.equal(encoder.encode(prompts, {"<cup-0>": row(0)}), expected)


def test_a_row_equal_to_a_words_is_that_word(encoder):
    tokens = {"<cup-0>": encoder.word_row("cup")}
    for read in (encoder.encode, encoder.embed):
        torch.testing.assert_close(read(["a red <cup-0> on a table"], tokens), read(["a red cup on a table"]))


def test_pooled_at_the_first_end_token():
    hidden = torch.arange(16.0).reshape(2, 4, 2) + 1
    ids = torch.tensor([[5, 9, 7, 7], [5, 7, 0, 0]])  # 7 ends; 9, an extra token, has the highest id
    expected = nn.functional.normalize(torch.stack([hidden[0, 2], hidden[1, 1]]), dim=-1)
    assert torch.equal(pool_at_end(hidden, ids, 7), expected)


def test_pooled_at_the_highest_id():
    hidden = torch.arange(16.0).reshape(2, 4, 2) + 1
    ids = torch.tensor([[5, 9, 7, 7], [5, 7, 7, 0]])  # 7 ends; 9 is an extra token
    expected = nn.functional.normalize(torch.stack([hidden[0, 1], hidden[1, 1]]), dim=-1)
    assert torch.equal(pool_at_highest(hidden, ids), expected)


def test_embed_at_the_highest_id(encoder):
    """A new token's own state, and a plain text's at its end, as where the end is the highest id there is."""
    tokens = {"<cup-0>": row(0), "<cup-0-colour>": row(1)}
    texts = ["a <cup-0> cup", "<cup-0> <cup-0-colour> cup", "a red cup"]
    sequence = encoder.encode(texts, tokens)
    expected = nn.functional.normalize(torch.stack([sequence[0, 2], sequence[1, 2], sequence[2, 4]]), dim=-1)
    torch.testing.assert_close(encoder.embed(texts, tokens, "highest"), expected)
    torch.testing.assert_close(encoder.embed(texts, tokens, "highest")[2], encoder.embed(texts, tokens)[2])


def test_extra_tokens_need_no_space_between_them(encoder):
    """Prompts of the literature join them without: the ids are the same."""
    spaced, joined = encoder.token_ids(
        ["a photo of a <cup-0-instance> <cup-0>", "a photo of a <cup-0-instance><cup-0>"],
        {"<cup-0>": row(0), "<cup-0-instance>": row(1)},
    )
    assert torch.equal(spaced, joined)


def test_texts_are_read_at_the_end_of_the_prompt_with_extra_tokens_too(encoder):
    tokens = {"<cup-0>": row(0), "<cup-0-colour>": row(1)}
    texts = ["a <cup-0> <cup-0-colour> on a table", "cup", ""]
    sequence = encoder.encode(texts, tokens)
    expected = nn.functional.normalize(torch.stack([sequence[0, 7], sequence[1, 2], sequence[2, 1]]), dim=-1)
    pooled = encoder.embed(texts, tokens)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(3))


def test_a_call_knows_the_tokens_it_was_handed_and_no_others(encoder):
    first = encoder.encode(["a <cup-0>"], {"<cup-0>": row(0)})
    other = encoder.encode(["a <cup-0>"], {"<cup-0>": row(1)})
    assert not torch.equal(first, other)
    assert torch.equal(encoder.encode(["a <cup-0>"], {"<ball-1>": row(1), "<cup-0>": row(0)}), first)
    with pytest.raises(InputError, match=r"unknown token <cup-0> in 'a <cup-0>'; known: <ball-1>"):
        encoder.encode(["a <cup-0>"], {"<ball-1>": row(1)})
    for call in (encoder.encode, encoder.embed, encoder.encode_words):
        with pytest.raises(InputError, match="known: none"):
            call(["<ball-1>"])
    with pytest.raises(InputError, match="known: none"):
        encoder.token_positions("<ball-1>", ["<ball-1>"])


def test_rows_are_there_for_the_call_alone_also_when_it_fails(encoder):
    plain = encoder.encode(["a cup"])
    with pytest.raises(TypeError):
        encoder.outputs(["a <cup-0>"], {"<cup-0>": row(0)}, no_such_option=True, attention_mask=None)
    assert torch.equal(encoder.encode(["a cup"]), plain)


def test_a_t5_encoder(t5_encoder):
    """Another tokenizer, another model: the same tokens."""
    learned = row(0, requires_grad=True)
    prompt = "a <cup-0> on a red table"
    assert t5_encoder.token_positions(prompt, ["<cup-0>", "red table"], {"<cup-0>": learned}) == [[1], [4, 5]]
    t5_encoder.encode([prompt], {"<cup-0>": learned}).square().sum().backward()
    assert learned.grad.abs().sum() > 0
    word = {"<cup-0>": t5_encoder.word_row("cup")}
    torch.testing.assert_close(t5_encoder.encode([prompt], word), t5_encoder.encode(["a cup on a red table"]))
    with pytest.raises(InputError, match=r"prompt too long, 13 tokens of at most 12"):
        t5_encoder.encode(["cup " * 12])


def test_tokens_are_whole_wherever_they_stand(encoder):
    tokens = {f"<cup-{index}>": row(index) for index in range(12)} | {"<cup-1-colour>": row(20)}
    ids = encoder.token_ids(["red<cup-1><cup-11>cup,<cup-1-colour>!"], tokens)[0]
    names = encoder.tokenizer.convert_ids_to_tokens(ids[1:7])
    assert names == ["red</w>", "<cup-1>", "<cup-11>", "cup</w>", ",</w>", "<cup-1-colour>"]
    with pytest.raises(InputError, match="<tasse-0>"):
        encoder.token_ids(["<tasse-0>"], {"<Tasse-0>": row(0)})
    assert encoder.token_positions("a <Tasse-0>", ["<Tasse-0>"], {"<Tasse-0>": row(0)}) == [[2]]


def test_wrong_tokens(encoder):
    for name in ("cup", "<a cup>", "<>", "<<cup>"):
        with pytest.raises(InputError, match="angle brackets"):
            encoder.encode(["a cup"], {name: row(0)})
    with pytest.raises(InputError, match=r"<cup-0>: its row has shape \[5\], this model's have \[32\]"):
        encoder.encode(["a <cup-0>"], {"<cup-0>": torch.zeros(5)})
    with pytest.raises(InputError, match="has a token of this name already"):
        encoder.encode(["a cup"], {"<|endoftext|>": row(0)})


def test_token_positions(encoder):
    tokens = {"<cup-0>": row(0)}
    prompt = "a zebra cup and a cupboard, <cup-0> red  Cup"
    ids = encoder.token_ids([prompt], tokens)[0]
    words = ["zebra", "cup", "<cup-0>", "red cup"]
    positions = dict(zip(words, encoder.token_positions(prompt, words, tokens), strict=True))
    names = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert [names[position] for position in positions["zebra"]] == ["z", "e", "b", "r", "a</w>"]
    assert [names[position] for position in positions["cup"]] == ["cup</w>", "cup</w>"]
    assert [names[position] for position in positions["<cup-0>"]] == ["<cup-0>"]
    assert [names[position] for position in positions["red cup"]] == ["red</w>", "cup</w>"]
    with pytest.raises(InputError, match=r"'ball': it is not in the prompt 'a cup'"):
        encoder.token_positions("a cup", ["ball"])
    with pytest.raises(InputError, match="it is empty"):
        encoder.token_positions("a cup", [" "])


def test_word_row(encoder):
    table = encoder.model.get_input_embeddings().weight
    ids = encoder.tokenizer("wood cup", add_special_tokens=False).input_ids
    assert len(ids) == 2
    torch.testing.assert_close(encoder.word_row("wood cup"), table[ids].mean(0))
    assert torch.equal(encoder.word_row("wood cup", pieces="first"), table[ids[0]])
    assert not encoder.word_row("cup").requires_grad
    with pytest.raises(InputError, match="empty"):
        encoder.word_row("")
    encoder.encode(["a <cup-0>"], {"<cup-0>": row(3)})
    with pytest.raises(InputError, match="unknown token <cup-0>"):  # a token's row is the caller's own
        encoder.word_row("<cup-0>")


def test_encode_words_is_encode_without_the_padding(encoder):
    prompts = ["cup", "a photo of a cup"]
    words, mask = encoder.encode_words(prompts)
    assert words.shape[1] == 7 < encoder.length  # start, five words, end
    torch.testing.assert_close(words, encoder.encode(prompts)[:, :7])
    assert mask.tolist() == [[True] * 2 + [False] * 5, [True] * 6 + [False]]


def test_a_prompt_too_long_is_refused(encoder):
    encoder.encode(["cup " * 75])
    with pytest.raises(InputError, match=r"prompt too long, 78 tokens of at most 77: 'cup cup .*\.\.\.'"):
        encoder.encode(["a cup", "cup " * 76])
