"""Grounding DINO: words in, boxes and scores out. The segmentor and the retriever look through it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icekit.protocols import InputError
from icekit_detector.loading import GROUNDING_DINO, eight_bit, load

PHRASE_ENDS = ".?"
"""What Grounding DINO takes as the end of a phrase: words of different phrases do not see one another."""

NOTHING = -30.0
"""The logit of a word that has no piece in the text: a score of 1e-13."""


@dataclass(frozen=True)
class Prompt:
    """Phrases that are asked for in one pass, "a cup. a bowl.", and where each word is among the text's pieces.

    words: as they were given.
    text: what the model reads.
    inputs: the same as tensors.
    places: for each word the positions of its own pieces, without those of the template; none where the tokenizer
        knows none of its characters.
    """

    words: tuple[str, ...]
    text: str
    inputs: dict[str, Tensor]
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Detections:
    """What the model found, one box a query.

    scores: float32 ``[words, queries]`` in [0, 1].
    boxes: float32 ``[queries, 4]``: left, top, right, bottom in pixels, within the picture.
    """

    scores: Tensor
    boxes: Tensor


class GroundingDino:
    """A frozen Grounding DINO (Liu et al., ECCV 2024).

    Args:
        model: a folder, ``package:NAME/FOLDER`` or OWNER/NAME of the hub.
        setting: its key, for messages.
        template: what each word is put into.
        device: where it runs.

    Raises:
        InputError: no such model, or one that is of another class, damaged or has files missing.
        RunError: it gives NaN or infinity.
    """

    def __init__(self, model: str, setting: str, template: str, device: torch.device) -> None:
        self._template, self._device = template, device
        self._loaded = load(GROUNDING_DINO, model, setting, device)
        self._tokenizer = self._loaded.processor.tokenizer
        configuration = self._loaded.model.config
        self._most = min(configuration.max_text_len, configuration.text_config.max_position_embeddings)
        self._check_phrase_ends()
        with self._loaded.tried_out():
            [prompt] = self.prompts(["cup", "ball"])
            self.detect(torch.zeros(3, 64, 64), prompt)

    def prompts(self, words: Sequence[str], at_once: int = 1000) -> list[Prompt]:
        """Words as few prompts, in their order. A word of nothing but dots and question marks is in none.

        Args:
            words: the words.
            at_once: most words of a prompt.

        Raises:
            InputError: a word is too long for the model.
        """
        groups: list[list[tuple[str, str]]] = []
        room = 0
        for word in words:
            plain = _plain(word)
            if not plain:
                continue
            phrase = self._template.replace("{}", plain) + "."
            pieces = len(self._tokenizer(phrase, add_special_tokens=False)["input_ids"])
            if pieces > self._most - 2:
                raise InputError(
                    f"{word[:40]!r} is {pieces} pieces of words long, with the template, and Grounding DINO reads "
                    f"{self._most - 2}"
                )
            if not groups or pieces > room or len(groups[-1]) == at_once:
                groups.append([])
                room = self._most - 2  # the text begins and ends with pieces of its own
            groups[-1].append((word, plain))
            room -= pieces
        return [self._prompt(group) for group in groups]

    def _prompt(self, words: Sequence[tuple[str, str]]) -> Prompt:
        """words: each as it was given, and as it is asked for."""
        text, spans = "", []
        before, after = self._template.lower().split("{}")
        for _, plain in words:
            text += f"{' ' if text else ''}{before}"
            spans.append((len(text), len(text) + len(plain)))
            text += f"{plain}{after}."
        encoded = self._tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        offsets: list[list[int]] = encoded.pop("offset_mapping")[0].tolist()
        places = tuple(
            tuple(place for place, (first, end) in enumerate(offsets) if first < end and first < stop and end > start)
            for start, stop in spans
        )
        return Prompt(tuple(word for word, _ in words), text, dict(encoded), places)

    @torch.no_grad()
    def detect(self, pixels: Tensor, prompt: Prompt) -> Detections:
        """Look for the words of a prompt.

        A box's score for a word is the mean, over the word's pieces, of how sure the model is that the box shows it.

        Args:
            pixels: ``[3, H, W]`` in [0, 1].
            prompt: from ``prompts``.

        Raises:
            RunError: the model gives NaN or infinity.
        """
        picture = self._loaded.processor.image_processor(
            images=eight_bit(pixels), input_data_format="channels_first", return_tensors="pt"
        )
        inputs = {name: tensor.to(self._device) for name, tensor in [*picture.items(), *prompt.inputs.items()]}
        output = self._loaded.model(**inputs)
        logits, boxes = output.logits[0].float().cpu(), output.pred_boxes[0].float().cpu()
        self._loaded.check_numbers(boxes)
        # What is no piece of the text has the logit -infinity, and is not looked at.
        nowhere = logits.new_full((len(logits), 1), NOTHING)
        scores = [logits[:, list(places)] if places else nowhere for places in prompt.places]
        for score in scores:
            self._loaded.check_numbers(score)
        height, width = pixels.shape[1:]
        return Detections(torch.stack([score.sigmoid().mean(dim=1) for score in scores]), corners(boxes, height, width))

    def _check_phrase_ends(self) -> None:
        """Whether the model takes this tokenizer's dot as the end of a phrase: it knows it by its number."""
        ends: Any = getattr(self._loaded.model.model, "special_tokens", None)
        known = set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())
        if known and not {self._tokenizer.convert_tokens_to_ids(end) for end in PHRASE_ENDS} <= known:
            raise InputError(
                f"{self._loaded.named}: its tokenizer has other numbers for . and ? than Grounding DINO reads: its "
                "tokenizer files are another model's"
            )


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes as the model gives them -> left, top, right, bottom in pixels, cut at the picture's edges.

    Args:
        boxes: ``[N, 4]``: middle across and down, width, height, shares of the picture's.
        height: of the picture, pixels.
        width: likewise.

    Returns:
        ``[N, 4]``.
    """
    middle, size = boxes[:, :2], boxes[:, 2:]
    limits = boxes.new_tensor([width, height])
    first, last = (middle - size / 2) * limits, (middle + size / 2) * limits
    return torch.cat([first.clamp(min=0).minimum(limits), last.clamp(min=0).minimum(limits)], dim=1)


def visible_shares(boxes: Tensor, visible: Tensor) -> Tensor:
    """How much of each box is visible.

    Args:
        boxes: ``[N, 4]``: left, top, right, bottom in pixels, within the picture; pixels that they touch are theirs.
        visible: bool ``[H, W]``.

    Returns:
        float ``[N]`` in [0, 1].
    """
    height, width = visible.shape
    sums = torch.zeros(height + 1, width + 1, dtype=torch.int64)
    sums[1:, 1:] = visible.long().cumsum(0).cumsum(1)
    left, top = boxes[:, 0].floor().long().clamp(max=width - 1), boxes[:, 1].floor().long().clamp(max=height - 1)
    right, bottom = boxes[:, 2].ceil().long().maximum(left + 1), boxes[:, 3].ceil().long().maximum(top + 1)
    seen = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return seen / ((right - left) * (bottom - top))


def _plain(word: str) -> str:
    """A word as one phrase: lower-case, without what ends phrases."""
    return " ".join(re.sub(f"[{re.escape(PHRASE_ENDS)}]", " ", word.lower()).split())
