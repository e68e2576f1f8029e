"""A text encoder with extra tokens: new words whose embedding rows belong to whoever learns them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from icekit.model_files import check_finite, check_vocabulary, one_line
from icekit.protocols import InputError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA_TOKEN = re.compile(r"<[^<>\s]+>")
NO_ROWS: Mapping[str, Tensor] = MappingProxyType({})


class ExtendedEmbedding(nn.Module):
    """An embedding table with extra rows beside it, looked up by token id, for the length of a ``with`` block.

    The rows are not copied: gradients flow to those that require them. The table itself never sees the id of an extra
    row.
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self._rows: Mapping[int, Tensor] = {}

    @property
    def weight(self) -> Tensor:
        """The table's own rows ``[vocabulary, D]``."""
        return self.table.weight

    @contextmanager
    def extended(self, rows: Mapping[int, Tensor]) -> Iterator[None]:
        """With these extra rows and no others: token id -> ``[D]``."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def forward(self, ids: Tensor) -> Tensor:
        """Ids, int64 of any shape ``[...]`` -> rows ``[..., D]``."""
        if not self._rows:
            return self.table(ids)
        known = torch.tensor(list(self._rows), device=ids.device)
        matches = ids.unsqueeze(-1) == known
        extra = matches.any(dim=-1)
        base = self.table(ids.masked_fill(extra, 0))
        # Gemma's table, for one, multiplies its rows on the way out.
        scale = torch.as_tensor(getattr(self.table, "embed_scale", 1.0)).to(base)
        rows = torch.stack([tensor.to(base) for tensor in self._rows.values()]) * scale
        return torch.where(extra.unsqueeze(-1), rows[matches.int().argmax(dim=-1)], base)


def pool_at_end(hidden: Tensor, ids: Tensor, end_id: int) -> Tensor:
    """The hidden state at the first end token of each prompt, L2-normalised (the paper's text encoder E).

    By id, not by the highest id as CLIP did at first: extra tokens have higher ids than the end token.

    Args:
        hidden: ``[B, L, P]``.
        ids: int64 ``[B, L]``, each row with at least one ``end_id`` (prompts may be padded with it).
        end_id: the end token's id.

    Returns:
        ``[B, P]``, rows of length one.
    """
    first = (ids == end_id).int().argmax(dim=-1)
    return nn.functional.normalize(hidden[torch.arange(len(ids), device=hidden.device), first], dim=-1)


def pool_at_highest(hidden: Tensor, ids: Tensor) -> Tensor:
    """The hidden state at the highest id of each prompt, L2-normalised: how ICE's published code reads E.

    The end token has the highest id of CLIP's own vocabulary and extra tokens have higher ones. So this is the state
    at an extra token (the one added last, if there are several; its first occurrence), and at the first end token
    where the prompt has none. Attention is causal: at an extra token the state knows nothing of what follows it.

    Args:
        hidden: ``[B, L, P]``.
        ids: int64 ``[B, L]``.

    Returns:
        ``[B, P]``, rows of length one.
    """
    return nn.functional.normalize(hidden[torch.arange(len(ids), device=hidden.device), ids.argmax(dim=-1)], dim=-1)


def pooling_of(pool: str | None) -> Literal["end", "highest"]:
    """Where a CLIP text encoder is read, as ``Backbone.embed_texts`` is told: at the end, or at the highest token id.

    Raises:
        InputError: it is told otherwise.
    """
    if pool not in (None, "highest"):
        raise InputError(f"pooling {pool!r}: texts of this model are read at their end (none), or at 'highest'")
    return "end" if pool is None else "highest"


def _short(prompt: str, length: int = 80) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."


class TextEncoder:
    """A tokenizer and a text model of transformers (CLIP's, T5's) that read extra tokens.

    Takes the model over: its token embedding is replaced by an ``ExtendedEmbedding`` around the same table. Extra
    tokens are handed to every call, ``<name>`` -> ``[dim]``; a name in angle brackets that was not is refused.
    """

    takes_space = False
    """Whether the space before a token is part of it, as it is of a word where the vocabulary's words have a space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int | None = None) -> None:
        """Take the model over.

        length: positions of an encoded prompt; None for as many as the tokenizer and the model were made for.

        Raises:
            InputError: the tokenizer is not the one that the model was trained with, or has files missing.
        """
        self.tokenizer = tokenizer
        self.model = model
        self.arrive: Callable[[], None] = lambda: None
        """Called before the model reads a prompt: a backbone may have to bring it to its device first."""
        self._embedding = ExtendedEmbedding(model.get_input_embeddings())
        model.set_input_embeddings(self._embedding)
        self._own_tokens = frozenset(tokenizer.get_added_vocab())
        self._spelled: set[str] = set()
        # Learning encodes the same few prompts at every step, and tokenizing takes milliseconds.
        self._padded_ids = lru_cache(maxsize=1024)(self._tokenise)
        longest = tokenizer.model_max_length
        if not isinstance(longest, int | float) or not longest >= 3:
            raise InputError(f"its tokenizer's model_max_length is {longest!r}; it should be a number such as 77")
        self.length = length or int(min(longest, model.config.max_position_embeddings))
        """Positions of an encoded prompt, start and end included."""
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        try:
            one, other = self._tokenise("cup"), self._tokenise("ball")
            end = self.tokenizer.eos_token_id
            ends = end is not None and end in one
        except Exception as error:  # the tokenizer's files are whatever a folder holds
            raise InputError(f"its tokenizer cannot be used: {one_line(error)}") from error
        check_vocabulary(len(self.tokenizer), len(self.table), one, other)
        if not ends:
            raise InputError("its tokenizer has no end token: its tokenizer files are missing or another model's")

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @property
    def dim(self) -> int:
        """Length of one token's row."""
        return self._embedding.table.embedding_dim

    @property
    def table(self) -> Tensor:
        """The rows of its own vocabulary, ``[vocabulary, dim]``."""
        return self._embedding.weight

    def token_ids(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> Tensor:
        """Prompts -> int64 ``[B, length]`` with start, end and padding.

        Raises:
            InputError: a prompt that is too long, or has a ``<token>`` that was not handed in; a token with a name that
                is not ``<...>`` without spaces or is the model's own, or with a row of another length.
        """
        self._learn_to_spell(rows)
        for prompt in prompts:
            self._check_tokens(prompt, rows)
        return torch.tensor([self._padded_ids(prompt) for prompt in prompts], device=self.device)

    def _learn_to_spell(self, rows: Mapping[str, Tensor]) -> None:
        """Give the tokenizer the tokens' names, each its id for good: what they mean comes with every call."""
        from tokenizers import AddedToken

        for name, row in rows.items():
            if not EXTRA_TOKEN.fullmatch(name):
                raise InputError(f"token {name!r}: a token's name is one word in angle brackets, such as <cup-0>")
            if name in self._own_tokens:
                raise InputError(f"token {name}: the model has a token of this name already")
            if tuple(row.shape) != (self.dim,):
                raise InputError(f"token {name}: its row has shape {list(row.shape)}, this model's have [{self.dim}]")
        new = [name for name in rows if name not in self._spelled]
        if new:
            # Not normalised: found in the prompt exactly as written, before the tokenizer makes all letters lower case.
            self.tokenizer.add_tokens([AddedToken(name, normalized=False, lstrip=self.takes_space) for name in new])
            self._spelled.update(new)
            self._padded_ids.cache_clear()

    def _tokenise(self, prompt: str) -> list[int]:
        self._check_length(prompt)
        return self.tokenizer(prompt, padding="max_length", max_length=self.length, truncation=True).input_ids

    @contextmanager
    def _knowing(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with these tokens' rows."""
        with self._embedding.extended({self.tokenizer.convert_tokens_to_ids(name): row for name, row in rows.items()}):
            yield

    def encode(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> Tensor:
        """Prompts -> the last layer's states ``[B, length, P]``; gradients flow to extra rows.

        Raises:
            InputError: see ``token_ids``.
        """
        return self.outputs(prompts, rows).last_hidden_state

    def outputs(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS, **options: Any) -> Any:
        """As ``encode``, and returns all that the model does: other layers' states, a pooled vector.

        options: of the model's call, such as ``output_hidden_states``.

        Raises:
            InputError: see ``token_ids``.
        """
        self.arrive()
        ids = self.token_ids(prompts, rows)
        attention_mask = None
        if getattr(self.model.config, "use_attention_mask", False):  # a flag of diffusers' pipelines
            attention_mask = (torch.arange(self.length, device=ids.device) <= self.ends(ids)[:, None]).long()
        with self._knowing(rows):
            outputs = self.model(ids, attention_mask=attention_mask, **options)
        self._check(outputs.last_hidden_state, rows)
        return outputs

    def _check(self, states: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Refuse states that are not finite, and say whose fault it is."""
        dtype = str(states.dtype).removeprefix("torch.")
        advice = (
            "its weights are damaged or another model's: get the model again"
            if dtype == "float32"
            else f"{dtype} is too narrow for it: use float32"
        )
        try:
            check_finite(states, f"text encoder in {dtype}", advice)
        except RunError:
            for name, row in rows.items():
                check_finite(row, f"token {name}", "its row was learned wrongly or is damaged")
            largest = max(rows, key=lambda name: float(rows[name].detach().abs().max()), default=None)
            if largest is not None and self._reads_plain_words():
                raise RunError(
                    f"the token {largest} makes the text encoder give numbers that are NaN or infinite: its row goes "
                    f"up to {float(rows[largest].detach().abs().max()):.1e}, where the model's own go up to "
                    f"{float(self.table.abs().max()):.1e}; learn it anew, at a lower learning rate"
                ) from None
            raise

    @torch.no_grad()
    def _reads_plain_words(self) -> bool:
        """Whether the model gives finite numbers where no extra token is in the prompt."""
        with self._knowing({}):
            states = self.model(self.token_ids(["a cup"])).last_hidden_state
        return bool(states.isfinite().all())

    def encode_words(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> tuple[Tensor, Tensor]:
        """As ``encode``, without the positions after the longest prompt's end, and with a mask of the words.

        Returns:
            States ``[B, L, P]``, and the positions of the start token and the words, bool ``[B, L]``: False at the end
            token and after it.

        Raises:
            InputError: see ``token_ids``.
        """
        ids, states = self._unpadded(prompts, rows)
        return states, torch.arange(ids.shape[1], device=ids.device) < self.ends(ids)[:, None]

    def ends(self, ids: Tensor) -> Tensor:
        """The place of each prompt's first end token: int64 ``[B]``."""
        return (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)

    def _unpadded(self, prompts: Sequence[str], rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``token_ids`` up to the longest prompt's end, ``[B, L]``, and the states there, ``[B, L, P]``.

        Attention is causal: nothing before depends on what follows.
        """
        self.arrive()
        ids = self.token_ids(prompts, rows)
        ids = ids[:, : int(self.ends(ids).max()) + 1]
        with self._knowing(rows):
            states = self.model(ids).last_hidden_state
        self._check(states, rows)
        return ids, states

    def embed(
        self, texts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS, pool: Literal["end", "highest"] = "end"
    ) -> Tensor:
        """Texts as points ``[B, P]`` of length one, without the positions after the longest text's end.

        pool: where they are read, ``pool_at_end`` or ``pool_at_highest``.

        Raises:
            InputError: see ``token_ids``.
        """
        ids, states = self._unpadded(texts, rows)
        if pool == "highest":
            return pool_at_highest(states, ids)
        return pool_at_end(states, ids, self.tokenizer.eos_token_id)

    def word_row(self, word: str, pieces: Literal["mean", "first"] = "mean") -> Tensor:
        """The row of a plain word, float32 ``[dim]``, detached: of its pieces the mean or the first.

        Raises:
            InputError: an empty word, or a ``<token>``.
        """
        self._check_tokens(word, ())
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"word {word!r}: it is empty, a word has at least one letter")
        rows = self._embedding.weight.detach()[torch.tensor(ids, device=self.device)].float()
        return rows[0] if pieces == "first" else rows.mean(dim=0)

    def token_positions(
        self, prompt: str, words: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS
    ) -> list[list[int]]:
        """For each word (or extra token) its positions in the encoded prompt, all of its occurrences.

        Raises:
            InputError: a word that the prompt does not have, or see ``token_ids``.
        """
        self._learn_to_spell(rows)
        self._check_tokens(prompt, rows)
        self._check_length(prompt)
        spans = self._spans(prompt)
        # The "cup" of <cup-0> is no word of the prompt.
        plain = EXTRA_TOKEN.sub(lambda match: "<" * len(match[0]), prompt)
        found = []
        for word in words:
            # Whole words only: "cup" is not in "cupboard". Spaces between the words of a name may differ.
            pattern = r"\s+".join(re.escape(part) for part in word.split())
            if not pattern:
                raise InputError(f"word {word!r}: it is empty, a word has at least one letter")
            if EXTRA_TOKEN.fullmatch(word):
                matches = [match.span() for match in re.finditer(re.escape(word), prompt)]
            else:
                matches = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", plain, re.IGNORECASE)]
            if not matches:
                raise InputError(f"word {word!r}: it is not in the prompt {_short(prompt)!r}")
            found.append(
                [
                    position
                    for position, (start, end) in enumerate(spans)
                    if start < end and any(start < last and first < end for first, last in matches)
                ]
            )
        return found

    def _spans(self, prompt: str) -> list[tuple[int, int]]:
        """For each position of the encoded prompt, from where to where its piece goes, in letters of the prompt."""
        spans: list[tuple[int, int]] = self.tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        return spans

    def _check_tokens(self, prompt: str, known: Collection[str]) -> None:
        """Refuse a token that the tokenizer would spell out letter by letter."""
        for name in EXTRA_TOKEN.findall(prompt):
            if name not in known and name not in self._own_tokens:
                names = ", ".join(known) or "none"
                raise InputError(f"unknown token {name} in {_short(prompt)!r}; known: {names}")

    def _check_length(self, prompt: str) -> None:
        """Refuse what the tokenizer would silently cut off."""
        length = len(self.tokenizer(prompt).input_ids)
        if length > self.length:
            raise InputError(f"prompt too long, {length} tokens of at most {self.length}: {_short(prompt)!r}")
