"""A backbone whose evaluations are counted: see ``evaluations``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

from PIL import Image
from torch import Tensor

from icekit.protocols import Backbone, ConceptBackbone, Conditioning, Look, Prediction
from icekit.run.evaluations import Counter, Evaluations


def counted(backbone: Backbone, counter: Counter, settings: Any) -> Backbone:
    """The same backbone, with the same weights, whose evaluations are counted; the one handed in stays as it is.

    A prediction is one evaluation for each of its latents. A picture that is generated is as many as the backbone
    says it is (``passes``), or one for each step, and two where classifier-free guidance is above 1.

    settings: the backbone's own: its ``steps`` and ``guidance_scale`` hold where a call does not say otherwise.
    """
    one = copy.copy(backbone)

    def predict(noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        prediction = backbone.predict(noisy, shares, prompts, look)
        count = len(noisy)
        counter.add(Evaluations(count, count if prediction.output.requires_grad else 0))
        return prediction

    def generate(
        prompts: Sequence[str],
        *,
        on_image: Callable[[int, Image.Image], None] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        each = _passes(backbone, settings, options.get("steps"), options.get("guidance_scale"))

        def made(place: int, picture: Image.Image) -> None:
            counter.add(Evaluations(each))
            if on_image is not None:
                on_image(place, picture)

        return backbone.generate(prompts, on_image=made, **options)

    def concept_maps(noisy: Tensor, *given: Any, **named: Any) -> Tensor:
        counter.add(Evaluations(len(noisy)))
        maps: Tensor = cast(ConceptBackbone, backbone).concept_maps(noisy, *given, **named)
        return maps

    # In its own dictionary, which is found before the class's methods, whatever kind of class it is.
    vars(one).update(predict=predict, generate=generate)
    if isinstance(backbone, ConceptBackbone):
        vars(one).update(concept_maps=concept_maps)
    return one


def _passes(backbone: Backbone, settings: Any, steps: int | None, guidance: float | None) -> int:
    """How many evaluations one picture takes. steps, guidance: as ``Backbone.generate`` is handed them."""
    steps = getattr(settings, "steps", 0) if steps is None else steps
    guidance = getattr(settings, "guidance_scale", 0.0) if guidance is None else guidance
    says = getattr(backbone, "passes", None)
    if says is not None:
        return int(says(steps, guidance))
    return (steps or 0) * (2 if guidance > 1 else 1)
