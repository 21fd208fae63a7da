"""Training data: files, chat template and labels, data set, packing, check and report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
