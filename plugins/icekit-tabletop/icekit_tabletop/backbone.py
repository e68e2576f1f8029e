"""The tabletop's own text-to-image model as an icekit backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens, World
from icekit_tabletop.captions import WORDS
from icekit_tabletop.settings import OWN_MODEL, TabletopSettings
from icekit_tabletop.weights import model_dir
from icekit_tabletop.world import COLOURS, MATERIALS, TABLES, TEXTURES, WALLS

_SURFACE_WORDS = frozenset(word for name in [*TABLES, *WALLS] for word in name.split())
_OBJECT_WORDS = frozenset([*COLOURS, *MATERIALS, *TEXTURES])
_KNOWN = frozenset(WORDS) - (_SURFACE_WORDS - _OBJECT_WORDS)


WORLD = World("ten shapes on a table", share=0.2, error=0.25)
"""At most 0.247 in 360 scenes, more in 37 of 38 photographs and the like: ``docs/tabletop.md``."""


class Tabletop(StableDiffusion):
    """Stable Diffusion in small: 64-pixel scenes of objects on a table, with a vocabulary of some hundred words."""

    Settings = TabletopSettings

    preset = "tabletop"
    world: World | None = None
    _settings: TabletopSettings

    def __init__(self, settings: TabletopSettings, device: torch.device | str) -> None:
        if settings.model == OWN_MODEL:
            settings = settings.model_copy(update={"model": str(_own(model_dir))})
            self.world = WORLD
        super().__init__(settings, device)

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """As Stable Diffusion's, or, with ``words_only``, with a mask of the words; see ``protocols.Backbone``."""
        if not self._settings.words_only:
            return super().encode_prompts(prompts, tokens)
        states, mask = self._text.encode_words(prompts, self._own_rows(tokens))
        return Conditioning({"sequence": states, "mask": mask})

    def knows(self, word: str) -> bool:
        """Whether captions say this word of objects; "beige" and "slate" were only ever said of walls and tables."""
        return word.lower() in _KNOWN


def _own(folder: Callable[[], Path]) -> Path:
    """A folder of the package; when it was never trained, that is the user's to know."""
    try:
        return folder()
    except FileNotFoundError as error:
        raise InputError(f"backbone.model = {OWN_MODEL!r}: {error}") from error
