"""The tabletop's own text-to-image model as an icekit backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.protocols import InputError
from icekit_tabletop.captions import WORDS
from icekit_tabletop.weights import clip_dir, model_dir
from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES, TABLES, TEXTURES, WALLS

OWN_MODEL = "icekit-tabletop"
"""Name of the model that comes with the package, in ``Tabletop.Settings.model``."""

_SURFACE_WORDS = frozenset(word for name in [*TABLES, *WALLS] for word in name.split())
_OBJECT_WORDS = frozenset([*COLOURS, *MATERIALS, *TEXTURES])
_KNOWN = frozenset(WORDS) - (_SURFACE_WORDS - _OBJECT_WORDS)


class Tabletop(StableDiffusion):
    """Stable Diffusion in small: 64-pixel scenes of objects on a table, with a vocabulary of some hundred words."""

    class Settings(StableDiffusion.Settings):
        """As Stable Diffusion's, with the package's own model as the default."""

        model: str = Field(
            default=OWN_MODEL,
            description=f"{OWN_MODEL}: the model that comes with the package; else a folder in diffusers' format",
        )
        words_only: bool = Field(
            default=True,
            description="let the noise predictor attend to the start token and the words alone, as it was trained",
        )
        images_at_once: int = Field(
            default=8,
            gt=0,
            description="images generated as one batch; the last bits of an image depend on how many are generated "
            "beside it",
        )

    def __init__(self, settings: StableDiffusion.Settings, device: torch.device | str) -> None:
        if settings.model == OWN_MODEL:
            settings = settings.model_copy(update={"model": str(_own(model_dir))})
        super().__init__(settings, device)

    @property
    def suggestions(self) -> Mapping[str, Any]:
        """The CLIP model, the object words and the background of the same world."""
        return {
            "retriever.model": f"local-dir:{_own(clip_dir)}",
            "retriever.vocabulary": list(SHAPES),
            "retriever.background": ["an empty table"],
            "retriever.top": len(SHAPES),
            "retriever.splice.l1_penalty": 0.1,
            "retriever.splice.image_mean": "none",
            "retriever.splice.rerank_model": f"local-dir:{_own(clip_dir)}",
            "segmentor.prompt": "a {word}",
            "segmentor.timestep": [0.15],
            "segmentor.xattn.competition": "none",
            "segmentor.xattn.propagation": 1,
            "segmentor.xattn.threshold": 0.55,
            "segmentor.smoothness": 3.0,
            "segmentor.diffseg.kl_threshold": 0.12,
            "segmentor.xattn.draws": 8,
            "segmentor.one_piece": True,
            "segmentor.xattn.dip": 0.03,
            "segmentor.conceptexpress.caption": "a photo of things on a table",
            "segmentor.conceptexpress.salient_by": "last_word",
            "segmentor.conceptexpress.apart": True,
            "learner.steps": 40,
            "learner.max_batch": 16,
            "learner.ice.word_steps": 16,
            "learner.ice.close_ups": 4,
            "learner.learning_rate": 5e-3,
            "learner.ice.learning_rate": 3e-3,
            "learner.ice.instance_start": "sum",
            "learner.ice.category_learning_rate": 2e-4,
            "learner.word_learning_rate": 0.02,
            "learner.prior_images": 8,
            "learner.prior_guidance": 4.0,
            "learner.timestep_range": [0.35, 0.85],
            "learner.by_area": True,
            "learner.attribute_rows": "words",
            "retriever.crop": False,
            "rename": True,
            "guidance_scale": 4.0,
            "divide": True,
            "describe": True,
        }

    def knows(self, word: str) -> bool:
        """Whether captions say this word of objects; "beige" and "slate" were only ever said of walls and tables."""
        return word.lower() in _KNOWN


def _own(folder: Callable[[], Path]) -> Path:
    """A folder of the package; when it was never trained, that is the user's to know."""
    try:
        return folder()
    except FileNotFoundError as error:
        raise InputError(f"backbone.model = {OWN_MODEL!r}: {error}") from error
