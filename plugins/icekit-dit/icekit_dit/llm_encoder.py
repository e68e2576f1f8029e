"""A language model as a text encoder: what it thinks of a prompt, position by position, is what the picture is made of.

The prompt is put between fixed words (an instruction, the marks of a chat), as the family's pipeline does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from icekit.backbones.text_encoder import EXTRA_TOKEN, NO_ROWS, TextEncoder
from icekit.model_files import check_vocabulary, one_line
from icekit.protocols import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lower_plain(prompt: str) -> str:
    """The plain words in lower case, without spaces around them; tokens ``<...>`` as they are written."""
    lowered, end = "", 0
    for token in EXTRA_TOKEN.finditer(prompt):
        lowered += prompt[end : token.start()].lower() + token[0]
        end = token.end()
    return (lowered + prompt[end:].lower()).strip()


def mean_of_words(states: Tensor, words: Tensor) -> Tensor:
    """Texts as points: the mean of the states at their words, of length one.

    Args:
        states: of a language model's last layer, float ``[B, L, D]``.
        words: bool ``[B, L]``, the positions of the text's own pieces; at least one in each.

    Returns:
        ``[B, D]``, rows of length one.
    """
    weights = words.to(states).unsqueeze(-1)
    return normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


class LanguageModel(TextEncoder):
    """A causal language model of transformers (Gemma's, Qwen's) that reads extra tokens.

    Its vocabulary has words with the space before them, and so has an extra token: the space in ``a <cup-0>`` is part
    of the token, as it would be of ``cup``. Who adds tokens to such a model's tokenizer elsewhere does the same:
    ``AddedToken(name, lstrip=True, normalized=False)``.
    """

    takes_space = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        length: int,
        *,
        before: str = "",
        after: str = "",
        hidden: int = 0,
        lower: bool = False,
        layer: int = -1,
    ) -> None:
        """Take the model over.

        Args:
            tokenizer: of the model.
            model: without its head.
            length: positions at most of a prompt with all that is around it.
            before: words before every prompt.
            after: words after it.
            hidden: so many positions after the first one are read by the language model alone: the noise predictor is
                not shown them.
            lower: whether plain words are read in lower case.
            layer: whose states are handed out, as in the model's ``hidden_states``; -1: what the model returns.

        Raises:
            InputError: the tokenizer is not the one that the model was trained with, or has files missing.
        """
        self._before, self._after, self._hidden, self._lower, self._layer = before, after, hidden, lower, layer
        super().__init__(tokenizer, model, length)

    def _check_tokenizer(self) -> None:
        try:
            one, other = self._tokenise("cup"), self._tokenise("ball")
        except InputError:
            raise
        except Exception as error:  # the tokenizer's files are whatever a folder holds
            raise InputError(f"its tokenizer cannot be used: {one_line(error)}") from error
        check_vocabulary(len(self.tokenizer), len(self.table), one, other)
        if self.tokenizer.pad_token_id is None:
            raise InputError("its tokenizer has no padding token: its tokenizer files are missing or another model's")
        self._first = one[0]

    # --- Prompts ------------------------------------------------------------------------------------------------------

    def _clean(self, prompt: str) -> str:
        return lower_plain(prompt) if self._lower else prompt

    def _whole(self, prompt: str) -> str:
        return f"{self._before}{self._clean(prompt)}{self._after}"

    def _tokenise(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(self._whole(prompt)).input_ids
        if len(ids) > self.length:
            self._refuse_long(prompt, len(ids))
        return ids

    def _check_length(self, prompt: str) -> None:
        self._tokenise(prompt)

    def _refuse_long(self, prompt: str, length: int) -> None:
        around = len(self.tokenizer(self._whole("")).input_ids)
        shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
        raise InputError(f"prompt too long, {length - around} tokens of at most {self.length - around}: {shown!r}")

    def token_ids(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> Tensor:
        """Prompts with what is around them -> int64 ``[B, L]``, L the longest's; padding follows.

        Raises:
            InputError: see ``TextEncoder.token_ids``.
        """
        return self._padded(self._pieces(prompts, rows))

    def _pieces(self, prompts: Sequence[str], rows: Mapping[str, Tensor]) -> list[list[int]]:
        self._learn_to_spell(rows)
        for prompt in prompts:
            self._check_tokens(prompt, rows)
        return [self._padded_ids(prompt) for prompt in prompts]

    def _padded(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        longest, padding = max(map(len, pieces), default=0), self.tokenizer.pad_token_id
        return torch.tensor(
            [[*one, *[padding] * (longest - len(one))] for one in pieces], dtype=torch.long, device=self.device
        )

    def outputs(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS, **options: Any) -> Any:
        """All that the model returns for ``token_ids``. Attention is causal: nothing depends on the padding.

        options: of the model's call, such as ``output_hidden_states``.

        Raises:
            InputError: see ``token_ids``.
        """
        return self._read(self.token_ids(prompts, rows), rows, **options)

    def _read(self, ids: Tensor, rows: Mapping[str, Tensor], **options: Any) -> Any:
        self.arrive()
        with self._knowing(rows):
            outputs = self.model(ids, use_cache=False, **options)
        self._check(outputs.last_hidden_state, rows)
        return outputs

    def encode_words(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> tuple[Tensor, Tensor]:
        """What the noise predictor is shown of prompts: states ``[B, L, D]``, L the longest's; gradients flow to extra
        rows. And which positions are a prompt's, not padding: bool ``[B, L]``.

        Raises:
            InputError: see ``token_ids``.
        """
        pieces = self._pieces(prompts, rows)
        ids = self._padded(pieces)
        if self._layer == -1:
            states = self._read(ids, rows).last_hidden_state
        else:
            states = self._read(ids, rows, output_hidden_states=True).hidden_states[self._layer]
        lengths = torch.tensor([len(one) for one in pieces], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        shown = [0, *range(1 + self._hidden, ids.shape[1])]
        return states[:, shown], mask[:, shown]

    def encode_nothing(self) -> tuple[Tensor, Tensor]:
        """The empty prompt with nothing around it, as ``encode_words`` does others."""
        ids = torch.tensor([self.tokenizer("").input_ids], dtype=torch.long, device=self.device)
        return self._read(ids, NO_ROWS).last_hidden_state, torch.ones_like(ids, dtype=torch.bool)

    def encode(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> Tensor:
        """The states of ``encode_words``."""
        return self.encode_words(prompts, rows)[0]

    def _spans(self, prompt: str) -> list[tuple[int, int]]:
        """Of the positions that the noise predictor is shown; what is before the prompt has negative places."""
        spans = self.tokenizer(self._whole(prompt), return_offsets_mapping=True).offset_mapping
        shown = [spans[0], *spans[1 + self._hidden :]]
        start = len(self._before)
        return [(first - start, last - start) for first, last in shown]

    def token_positions(
        self, prompt: str, words: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS
    ) -> list[list[int]]:
        """For each word (or extra token) its positions among those that the noise predictor is shown.

        Raises:
            InputError: see ``TextEncoder.token_positions``.
        """
        return super().token_positions(self._clean(prompt), words, rows)

    # --- Words and texts alone ----------------------------------------------------------------------------------------

    def word_row(self, word: str, pieces: Literal["mean", "first"] = "mean") -> Tensor:
        """The row of a plain word as it is inside of a sentence, float32 ``[dim]``: see ``TextEncoder.word_row``.

        Raises:
            InputError: an empty word, or a ``<token>``.
        """
        self._check_tokens(word, ())
        ids = self._alone(word)
        if not ids or not word.strip():
            raise InputError(f"word {word!r}: it is empty, a word has at least one letter")
        rows = self.table.detach()[torch.tensor(ids, device=self.device)].float()
        return rows[0] if pieces == "first" else rows.mean(dim=0)

    def _alone(self, text: str) -> list[int]:
        """A text in pieces as it would be inside of a sentence, with nothing around it."""
        ids: list[int] = self.tokenizer(f" {self._clean(text).strip()}", add_special_tokens=False).input_ids
        return ids

    def embed(
        self,
        texts: Sequence[str],
        rows: Mapping[str, Tensor] = NO_ROWS,
        pool: Literal["end", "highest"] = "end",
    ) -> Tensor:
        """Texts as points ``[B, D]`` of length one: ``mean_of_words`` of the last layer's states.

        They are read without what is around a prompt, after the first piece alone, to which language models give a
        state like no other.

        Raises:
            InputError: see ``token_ids``; or another ``pool`` than "end", for there is no end token.
        """
        if pool != "end":
            raise InputError(f"pooling {pool!r}: a language model's texts are read in one way (none)")
        self._learn_to_spell(rows)
        for text in texts:
            self._check_tokens(text, rows)
            self._check_length(text)
        pieces = [[self._first, *(self._alone(text) or [self.tokenizer.pad_token_id])] for text in texts]
        ids = self._padded(pieces)
        places = torch.arange(ids.shape[1], device=ids.device)
        lengths = torch.tensor([len(one) for one in pieces], device=ids.device)
        words = (places > 0) & (places < lengths[:, None])
        return mean_of_words(self._read(ids, rows).last_hidden_state.float(), words)


class PaddedLanguageModel(LanguageModel):
    """A language model whose prompts are padded to one length, and whose padding the noise predictor is shown, too.

    The padding reads the prompt, and the prompt does not read the padding. Handed out are the states after some of the
    layers, side by side.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        length: int,
        layers: Sequence[int],
        *,
        before: str = "",
        after: str = "",
    ) -> None:
        """Take the model over.

        Args:
            tokenizer: of the model.
            model: without its head.
            length: positions of a prompt with all that is around it, and of its padding.
            layers: after which of the model's layers the states are handed out; the first is 1.
            before: words before every prompt.
            after: words after it.

        Raises:
            InputError: the tokenizer is not the one that the model was trained with, or has files missing; the model
                has too few layers.
        """
        count = int(model.config.num_hidden_layers)
        if count < max(layers):
            raise InputError(f"its text encoder has {count} layers; it should have {max(layers)} or more")
        self._layers = tuple(layers)
        super().__init__(tokenizer, model, length, before=before, after=after)

    def encode_words(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> tuple[Tensor, Tensor]:
        """What the noise predictor is shown of prompts: states ``[B, length, layers * D]``; gradients flow to extra
        rows. And which positions are a prompt's, not padding: bool ``[B, length]``.

        Raises:
            InputError: see ``token_ids``.
        """
        pieces = self._pieces(prompts, rows)
        lengths = torch.tensor([len(one) for one in pieces], device=self.device)[:, None]
        ids = pad(self._padded(pieces), (0, self.length - max(map(len, pieces))), value=self.tokenizer.pad_token_id)
        mask = torch.arange(self.length, device=self.device) < lengths
        if self._at_left:
            places = (torch.arange(self.length, device=self.device) + lengths) % self.length
            ids, mask = ids.gather(1, places), mask.flip(1)
        states = self._read(ids, rows, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        return torch.cat([states[layer] for layer in self._layers], dim=-1), mask

    @property
    def _at_left(self) -> bool:
        """Whether the padding is before the prompt."""
        return str(self.tokenizer.padding_side) == "left"

    def _spans(self, prompt: str) -> list[tuple[int, int]]:
        spans = super()._spans(prompt)
        return [(0, 0)] * (self.length - len(spans)) + spans if self._at_left else spans


def chat_around(tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[str, str]:
    """What a tokenizer's chat template puts before and after what a user says.

    options: of ``apply_chat_template``.

    Raises:
        InputError: the tokenizer has no template, or one that does not repeat what is said.
    """
    mark = "a-word-that-nobody-says"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, **options)
    except Exception as error:  # a template is a program, and in the model's folder
        raise InputError(f"its tokenizer has no chat template that can be used: {one_line(error)}") from error
    before, found, after = str(text).partition(mark)
    if not found or mark in after:
        raise InputError("its tokenizer's chat template does not repeat once what is said")
    return before, after


def same_length(parts: Iterable[Tensor]) -> Tensor:
    """Sequences ``[B_i, L_i, ...]`` one after the other, ``[sum B_i, max L_i, ...]``, with zeros after the shorter."""
    every = list(parts)
    longest = max(part.shape[1] for part in every)

    def longer(part: Tensor) -> Tensor:
        more = part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])
        return torch.cat([part, more], dim=1)

    return torch.cat([longer(part) for part in every])
