"""A CLIP text encoder with extra tokens: new words whose embedding rows belong to whoever learns them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from icekit.protocols import InputError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

_EXTRA_TOKEN = re.compile(r"<[^<>\s]+>")


class ExtendedEmbedding(nn.Module):
    """An embedding table with extra rows beside it, looked up by token id.

    The rows are not copied when they are set: they stay the caller's tensors, read anew at every call, and gradients
    flow to those that require them. The table itself never sees the id of an extra row.
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self._rows: tuple[Tensor, ...] = ()
        self._row_of_id = torch.full((table.num_embeddings,), -1)

    @property
    def weight(self) -> Tensor:
        """The table's own rows ``[vocabulary, D]``."""
        return self.table.weight

    def set_rows(self, rows: Mapping[int, Tensor]) -> None:
        """Make these the extra rows, replacing earlier ones: token id -> ``[D]``."""
        self._rows = tuple(rows.values())
        row_of_id = torch.full((max([self.table.num_embeddings - 1, *rows]) + 1,), -1)
        for index, token_id in enumerate(rows):
            row_of_id[token_id] = index
        self._row_of_id = row_of_id.to(self.table.weight.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids, int64 of any shape ``[...]`` -> rows ``[..., D]``."""
        if not self._rows:
            return self.table(ids)
        row = self._row_of_id.to(ids.device)[ids]
        extra = row >= 0
        base = self.table(ids.masked_fill(extra, 0))
        rows = torch.stack([tensor.to(base) for tensor in self._rows])
        return torch.where(extra.unsqueeze(-1), rows[row.clamp(min=0)], base)


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


def _short(prompt: str, length: int = 80) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."


class TextEncoder:
    """A CLIP tokenizer and text model, with extra tokens.

    Takes the model over: its token embedding is replaced by an ``ExtendedEmbedding`` around the same table.
    """

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self._embedding = ExtendedEmbedding(model.get_input_embeddings())
        # The text model keeps its embeddings in `embeddings`, older transformers one level down in `text_model`.
        getattr(model, "text_model", model).embeddings.token_embedding = self._embedding
        self._own_tokens = frozenset(tokenizer.get_added_vocab())
        self._rows: dict[str, Tensor] = {}
        # Learning encodes the same few prompts at every step, and tokenizing takes milliseconds.
        self._padded_ids = lru_cache(maxsize=1024)(self._tokenise)
        self.length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        """Positions of an encoded prompt, start and end included."""

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @property
    def embedding_dim(self) -> int:
        """Length of one token's row."""
        return self._embedding.table.embedding_dim

    def set_tokens(self, rows: Mapping[str, Tensor]) -> None:
        """Make these the extra tokens, replacing earlier ones: ``<name>`` -> ``[embedding_dim]``.

        Raises:
            InputError: a name that is not ``<...>`` without spaces, or a row of another length.
        """
        from tokenizers import AddedToken

        for name, row in rows.items():
            if not _EXTRA_TOKEN.fullmatch(name):
                raise InputError(f"token {name!r}: a token's name is one word in angle brackets, such as <cup-0>")
            if tuple(row.shape) != (self.embedding_dim,):
                raise InputError(
                    f"token {name}: its row has shape {list(row.shape)}, this model's have [{self.embedding_dim}]"
                )
        if list(rows) != list(self._rows):  # else only the rows are new, as in every step of some learners
            # Not normalised: found in the prompt exactly as written, before the tokenizer makes all letters lower case.
            self.tokenizer.add_tokens([AddedToken(name, normalized=False) for name in rows])
            self._padded_ids.cache_clear()
        self._rows = dict(rows)
        self._embedding.set_rows({self.tokenizer.convert_tokens_to_ids(name): row for name, row in rows.items()})

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> int64 ``[B, length]`` with start, end and padding.

        Raises:
            InputError: a prompt that is too long, or has a ``<token>`` that is not known.
        """
        return torch.tensor([self._padded_ids(prompt) for prompt in prompts], device=self.device)

    def _tokenise(self, prompt: str) -> list[int]:
        self._check(prompt)
        return self.tokenizer(prompt, padding="max_length", max_length=self.length, truncation=True).input_ids

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (sequence ``[B, length, D]``, pooled ``[B, D]`` of length one); gradients flow to extra rows.

        Raises:
            InputError: see ``token_ids``.
        """
        ids = self.token_ids(prompts)
        attention_mask = None
        if getattr(self.model.config, "use_attention_mask", False):  # a flag of diffusers' pipelines
            attention_mask = (torch.arange(self.length, device=ids.device) <= self._end(ids)[:, None]).long()
        sequence = self.model(ids, attention_mask=attention_mask).last_hidden_state
        return sequence, pool_at_end(sequence, ids, self.tokenizer.eos_token_id)

    def encode_words(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """As ``encode``, without the positions after the longest prompt's end, and with a mask of the words.

        Returns:
            Sequence ``[B, L, D]``, pooled ``[B, D]``, and the positions of the start token and the words, bool
            ``[B, L]``: False at the end token and after it.

        Raises:
            InputError: see ``token_ids``.
        """
        ids = self._unpadded_ids(prompts)
        sequence = self.model(ids).last_hidden_state
        words = torch.arange(ids.shape[1], device=ids.device) < self._end(ids)[:, None]
        return sequence, pool_at_end(sequence, ids, self.tokenizer.eos_token_id), words

    def _end(self, ids: Tensor) -> Tensor:
        """The place of each prompt's first end token: int64 ``[B]``."""
        return (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)

    def _unpadded_ids(self, prompts: Sequence[str]) -> Tensor:
        """``token_ids`` up to the longest prompt's end. Attention is causal: nothing before depends on what follows."""
        ids = self.token_ids(prompts)
        return ids[:, : int(self._end(ids).max()) + 1]

    def embed(self, texts: Sequence[str], pool: Literal["end", "highest"] = "end") -> Tensor:
        """The pooled part of ``encode``, ``[B, D]`` of length one, without the positions after the longest text's end.

        pool: where E is read, ``pool_at_end`` or ``pool_at_highest``.

        Raises:
            InputError: see ``token_ids``.
        """
        ids = self._unpadded_ids(texts)
        hidden = self.model(ids).last_hidden_state
        return (
            pool_at_highest(hidden, ids) if pool == "highest" else pool_at_end(hidden, ids, self.tokenizer.eos_token_id)
        )

    def word_embedding(self, word: str, pieces: Literal["mean", "first"] = "mean") -> Tensor:
        """The row of a plain word or extra token, ``[embedding_dim]``, detached: of its pieces the mean or the first.

        Raises:
            InputError: an empty word, or a ``<token>`` that is not known.
        """
        self._check(word)
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"word {word!r}: it is empty, a word has at least one letter")
        with torch.no_grad():
            rows = self._embedding(torch.tensor(ids, device=self.device)).float()
        return rows[0] if pieces == "first" else rows.mean(dim=0)

    def token_positions(self, prompt: str, words: Sequence[str]) -> list[list[int]]:
        """For each word (or extra token) its positions in the encoded prompt, all of its occurrences.

        Raises:
            InputError: a word that the prompt does not have, or see ``token_ids``.
        """
        self._check(prompt)
        spans = self.tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        # The "cup" of <cup-0> is no word of the prompt.
        plain = _EXTRA_TOKEN.sub(lambda match: "<" * len(match[0]), prompt)
        found = []
        for word in words:
            # Whole words only: "cup" is not in "cupboard". Spaces between the words of a name may differ.
            pattern = r"\s+".join(re.escape(part) for part in word.split())
            if not pattern:
                raise InputError(f"word {word!r}: it is empty, a word has at least one letter")
            if _EXTRA_TOKEN.fullmatch(word):
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

    def _check(self, prompt: str) -> None:
        """Refuse what the tokenizer would silently cut off or spell out letter by letter."""
        for name in _EXTRA_TOKEN.findall(prompt):
            if name not in self._rows and name not in self._own_tokens:
                known = ", ".join(self._rows) or "none"
                raise InputError(f"unknown token {name} in {_short(prompt)!r}; known: {known}")
        length = len(self.tokenizer(prompt).input_ids)
        if length > self.length:
            raise InputError(f"prompt too long, {length} tokens of at most {self.length}: {_short(prompt)!r}")
