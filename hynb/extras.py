"""The packages of the extra `notebook`, which a host that only trains does not have."""

from __future__ import annotations

from importlib.util import find_spec

from hynb.errors import HynbError

# By the name under which each is imported.
NOTEBOOK = ("jupyterlab", "ipykernel", "ipywidgets", "papermill", "matplotlib")


def require_notebook() -> None:
    """Checks that Jupyter and the packages that forms and plots are made of are installed.

    Raises:
        HynbError: some of them are missing; names them and the command that installs them.
    """
    missing = [name for name in NOTEBOOK if find_spec(name) is None]
    if missing:
        raise HynbError(
            f"notebooks and `hynb demo` need {', '.join(missing)}, not installed here; "
            "run: pip install 'hynb[notebook]'"
        )
