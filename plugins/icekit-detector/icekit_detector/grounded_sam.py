"""A segmentor of two models: Grounding DINO finds a word's box, SAM cuts it out."""

from __future__ import annotations

import torch
from torch import Tensor

from icekit.protocols import Backbone, View
from icekit_detector.grounding import GroundingDino, visible_shares
from icekit_detector.loading import SAM, eight_bit, load
from icekit_detector.settings import GroundedSamSettings

BOXES_AT_ONCE = 8


class GroundedSam:
    """Grounding DINO finds the box of the word, SAM cuts it out (Ren et al., 2024).

    Raises:
        InputError: no such model, or one that is of another class, damaged or has files missing.
        RunError: it gives NaN or infinity.
    """

    Settings = GroundedSamSettings

    def __init__(self, settings: GroundedSamSettings, backbone: Backbone) -> None:
        self.settings = settings
        self._device = backbone.device
        self._detector = GroundingDino(settings.detector, "segmentor.detector", settings.template, backbone.device)
        self._sam = load(SAM, settings.sam, "segmentor.sam", backbone.device)
        with self._sam.tried_out():
            self.cut_out(torch.zeros(3, 64, 64), torch.tensor([[16.0, 16.0, 48.0, 48.0]]))

    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The word's object, or all of them (``boxes``): bool ``[H, W]`` on the CPU. Nothing is random."""
        boxes = self.boxes(view, word)
        if not len(boxes):
            return torch.zeros_like(view.visible)
        return self.cut_out(view.pixels, boxes) & view.visible

    def boxes(self, view: View, word: str) -> Tensor:
        """The boxes that are to be cut out, the best first: ``[N, 4]``, left, top, right, bottom in pixels."""
        prompts = self._detector.prompts([word]) if bool(view.visible.any()) else []
        if not prompts:
            return torch.zeros(0, 4)
        found = self._detector.detect(view.pixels, prompts[0])
        shares, scores = visible_shares(found.boxes, view.visible), found.scores[0]
        counts = (scores > self.settings.threshold) & (shares > 0) & (shares >= self.settings.visible_share)
        order = scores.where(counts, torch.tensor(-1.0)).argsort(descending=True, stable=True)
        count = int(counts.sum())
        return found.boxes[order[: min(count, 1) if self.settings.boxes == "best" else count]]

    @torch.no_grad()
    def cut_out(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """What SAM takes as the objects in these boxes, together.

        Args:
            pixels: ``[3, H, W]`` in [0, 1].
            boxes: ``[N, 4]``, at least one: left, top, right, bottom in pixels.

        Returns:
            bool ``[H, W]`` on the CPU.

        Raises:
            RunError: the model gives NaN or infinity.
        """
        model, processor = self._sam.model, self._sam.processor
        inputs = processor(
            images=eight_bit(pixels),
            input_boxes=[boxes.tolist()],
            input_data_format="channels_first",
            return_tensors="pt",
        )
        seen = model.get_image_embeddings(inputs["pixel_values"].to(self._device))
        mask = torch.zeros(pixels.shape[1:], dtype=torch.bool)
        for some in inputs["input_boxes"].float().split(BOXES_AT_ONCE, dim=1):
            # A box says what is meant, so SAM is asked for its one mask and not for three to choose from.
            output = model(image_embeddings=seen, input_boxes=some.to(self._device), multimask_output=False)
            logits = output.pred_masks.float().cpu()
            self._sam.check_numbers(logits)
            [masks] = processor.image_processor.post_process_masks(
                logits, inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )
            mask |= masks.flatten(end_dim=-3).any(dim=0)
        return mask
