"""icekit finds the concepts of one image and learns tokens for them and for their intrinsic attributes.

The public API, with ``icekit.protocols``, ``learning``, ``attention``, ``backbones``, ``plugins`` and ``testing``.
"""

import lazy_loader

# What there is to import is in __init__.pyi; each name is imported when it is first used, for torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
