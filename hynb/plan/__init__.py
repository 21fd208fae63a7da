"""What a run will need: ZeRO presets, DeepSpeed's settings and memory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
