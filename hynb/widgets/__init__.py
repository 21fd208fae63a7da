"""Forms, live panels and plots for notebooks; the only package that imports ipywidgets and matplotlib."""

import lazy_loader

from hynb.extras import require_notebook

require_notebook()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
