"""The concepts of many runs: found by word, attribute and similarity, shown on a page, pushed to the hub."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
