"""A segmentor that asks CLIPSeg where a word is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.protocols import Backbone, InputError, View
from icekit_detector.loading import CLIPSEG, eight_bit, load
from icekit_detector.settings import ClipSegSettings


class ClipSeg:
    """CLIPSeg's heat map of the word, cut at a threshold (Lüddecke and Ecker, CVPR 2022).

    Raises:
        InputError: no such model, or one that is of another class, damaged or has files missing.
        RunError: it gives NaN or infinity.
    """

    Settings = ClipSegSettings

    def __init__(self, settings: ClipSegSettings, backbone: Backbone) -> None:
        self.settings = settings
        self._device = backbone.device
        self._loaded = load(CLIPSEG, settings.model, "segmentor.model", backbone.device)
        with self._loaded.tried_out():
            self.heat(torch.zeros(3, 64, 64), "cup")

    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The visible pixels whose heat is above both thresholds: bool ``[H, W]`` on the CPU. Nothing is random."""
        if not bool(view.visible.any()):
            return torch.zeros_like(view.visible)
        heat = self.heat(view.pixels, word)
        least = max(self.settings.threshold, self.settings.of_peak * float(heat[view.visible].max()))
        return (heat > least) & view.visible

    @torch.no_grad()
    def heat(self, pixels: Tensor, word: str) -> Tensor:
        """How sure the model is that a pixel shows the word.

        The picture is squeezed to the model's square, as in training, and the map brought back to its shape.

        Args:
            pixels: ``[3, H, W]`` in [0, 1].
            word: is put into the template.

        Returns:
            float32 ``[H, W]`` in [0, 1] on the CPU.

        Raises:
            InputError: the word is too long for the model.
            RunError: the model gives NaN or infinity.
        """
        processor, model = self._loaded.processor, self._loaded.model
        text = processor.tokenizer(self.settings.template.replace("{}", word), return_tensors="pt")
        pieces, most = text["input_ids"].shape[1], model.config.text_config.max_position_embeddings
        if pieces > most:
            raise InputError(
                f"segmentor 'clipseg': {word[:40]!r} is {pieces} pieces of words long, with the template, and CLIPSeg "
                f"reads {most}"
            )
        picture = processor.image_processor(
            images=eight_bit(pixels), input_data_format="channels_first", return_tensors="pt"
        )
        logits = model(
            pixel_values=picture["pixel_values"].to(self._device),
            input_ids=text["input_ids"].to(self._device),
            attention_mask=text["attention_mask"].to(self._device),
        ).logits
        self._loaded.check_numbers(logits)
        square = logits.float().cpu().reshape(1, 1, *logits.shape[-2:])
        shape = (pixels.shape[1], pixels.shape[2])
        return F.interpolate(square, shape, mode="bilinear", align_corners=False)[0, 0].sigmoid()
