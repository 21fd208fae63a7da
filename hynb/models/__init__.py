"""Model folders: what one is, how it can be trained here, and which servers load it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
