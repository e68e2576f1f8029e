"""The public room of segmentors that read a model's attention: from a look at the picture to a mask.

The way that ``xattn`` and ``diffseg`` go, and that a segmentor of your own may go as far as it likes:

1. ``look_at`` asks the model where it looks: maps of the prompt's positions over the picture, and of places over
   places, on the grids nearest to those that a ``Look`` names. ``require_similarity`` refuses a model without them.
2. The maps are brought together: ``upsample`` and ``on_grid`` between grids, ``normalise_over_space`` between words,
   ``aggregate`` between grids of places, ``flat`` to a row a place.
3. A soft map of the picture's size becomes a mask: ``heaviest_part`` keeps one peak of it (``Joining`` says which
   belong together), ``refine`` lets its edges follow the picture's, ``without_islands`` takes the crumbs away.

``AttentionSegmentor`` is all of it with settings: inherit from it, read ``word_maps``, end with ``to_mask``.
``LookingSettings`` are those of a look alone, ``Shares`` and ``Grids`` types for settings. Grids have two sides,
(height, width), and no picture has to be a square.
"""

from icekit.attention.colours import colour_distance, log_likelihood
from icekit.attention.looking import look_at, require_similarity
from icekit.attention.maps import Normalisation, aggregate, flat, normalise_over_space, on_grid, upsample
from icekit.attention.peaks import Joining, heaviest_part
from icekit.attention.refinement import random_walker_with_prior, refine, without_islands
from icekit.attention.segmentor import AttentionSegmentor, Grids, LookingSettings, Shares, one_or_more

__all__ = [
    "AttentionSegmentor",
    "Grids",
    "Joining",
    "LookingSettings",
    "Normalisation",
    "Shares",
    "aggregate",
    "colour_distance",
    "flat",
    "heaviest_part",
    "log_likelihood",
    "look_at",
    "normalise_over_space",
    "on_grid",
    "one_or_more",
    "random_walker_with_prior",
    "refine",
    "require_similarity",
    "upsample",
    "without_islands",
]
