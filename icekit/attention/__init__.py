"""The public room of segmentors that read a model's attention: from a look at the picture to a mask.

The way that ``xattn`` and ``diffseg`` go, and that a segmentor of your own may go as far as it likes:

1. ``look_at`` asks the model where it looks: maps of the prompt's positions over the picture, and of places over
   places, on the grids nearest to those that a ``Look`` names. ``require_similarity`` refuses a model without them.
2. The maps are brought together: ``upsample`` and ``on_grid`` between grids, ``normalise_over_space`` between words,
   ``aggregate`` between grids of places, ``flat`` to a row a place.
3. A soft map of the picture's size becomes a mask: ``heaviest_part`` keeps one peak of it (``Joining`` says which
   belong together), ``refine`` lets its edges follow the picture's, ``without_islands`` takes the crumbs away.

``AttentionSegmentor`` is all of it with settings: inherit from it, read ``word_maps``, end with ``to_mask``. With a
soft map of your own, ``SoftMapSegmentor`` is the last step with its settings.
``LookingSettings`` are those of a look alone, ``Shares`` and ``Grids`` types for settings. Grids have two sides,
(height, width), and no picture has to be a square.
"""

import lazy_loader

# What there is to import is in __init__.pyi; each name is imported when it is first used, for torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
