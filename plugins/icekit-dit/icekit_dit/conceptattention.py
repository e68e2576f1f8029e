"""The segmentor of ConceptAttention: what a diffusion transformer's attention gives out, the word against rivals.

Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features" (ICML 2025). The picture
is noised a little and its flow predicted once; meanwhile the word and its rivals go along as concepts, which see the
picture and are seen by nobody. Each place of the picture is divided among them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from icekit.attention import SoftMapSegmentor, normalise_over_space, otsu, upsample
from icekit.model_files import check_finite
from icekit.protocols import Backbone, Capability, ConceptBackbone, InputError, View
from icekit_dit.settings import ConceptAttentionSettings


class ConceptAttentionSegmentor(SoftMapSegmentor):
    """A word's mask from what a diffusion transformer's attention gives out (Helbling et al., ICML 2025).

    Raises:
        InputError: the backbone does not tell where concepts are.
    """

    Settings = ConceptAttentionSettings

    needs: tuple[Capability, ...] = ("concepts",)

    settings: ConceptAttentionSettings

    def __init__(self, settings: ConceptAttentionSettings, backbone: Backbone) -> None:
        if not isinstance(backbone, ConceptBackbone):
            raise InputError(
                "this segmentor needs a model that tells where concepts are, as Stable Diffusion 3.x and FLUX do: "
                "choose another backbone, or another segmentor"
            )
        self.settings = settings
        self.backbone = backbone

    @torch.no_grad()
    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The word's mask, bool ``[H, W]`` on the CPU, within what is visible; all False when nothing is."""
        soft = self.soft_map(view, word, generator)
        if not bool((soft > 0).any()):
            return torch.zeros_like(view.visible)
        threshold = self.settings.threshold
        return self.mask_of(soft, otsu(soft, view.visible) if threshold == "otsu" else float(threshold), view)

    @torch.no_grad()
    def soft_map(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """How much each pixel is the word's, before any threshold: float32 ``[H, W]`` in [0, 1], 0 where erased."""
        size = (view.visible.shape[0], view.visible.shape[1])
        soft = upsample(self.concept_map(view, word, generator)[None], size)
        # Every word has some of every place, whatever is there: the least of it means "not here".
        return normalise_over_space(soft.flatten(1), "minmax", view.visible.flatten()).reshape(size)

    @torch.no_grad()
    def concept_map(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The word's share of each place against its rivals, mean over shares of the schedule and draws of the noise.

        Returns:
            float32 ``[h, w]`` in [0, 1] on the CPU, on the backbone's finest grid.

        Raises:
            RunError: it is NaN or infinite.
        """
        settings, backbone = self.settings, self.backbone
        rivals = [rival for rival in settings.rivals if rival.lower() != word.lower()]
        prompt = backbone.encode_prompts([settings.prompt.replace("{}", word)])
        latents = backbone.encode_images(self.seen(view)[None].to(backbone.device))
        passes = [share for share in settings.shares for _ in range(settings.draws if settings.noise else 1)]
        total = torch.zeros(backbone.word_grids[0])
        for share in passes:
            noisy, at = latents, torch.tensor([share], device=backbone.device)
            if settings.noise:
                drawn = torch.randn(latents.shape, generator=generator).to(latents)
                noisy = backbone.add_noise(latents, drawn, at)
            # What a type checker cannot know of a backbone that has both protocols.
            maps = cast(ConceptBackbone, backbone).concept_maps(noisy, at, prompt, [word, *rivals])
            total += maps[0, 0].float().cpu()
        check_finite(total, "backbone's attention", "the model is damaged, or its number format too narrow")
        return total / len(passes)
