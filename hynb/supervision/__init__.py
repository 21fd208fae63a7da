"""Plans, starts, watches and ends the ranks of a run on all of its hosts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
