"""Answers to questions from a base model, an adapter or a merged model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
