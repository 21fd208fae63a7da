"""What a widget needs to tell the notebook's kernel."""

from __future__ import annotations

from IPython.core.getipython import get_ipython


def acknowledge_edit() -> None:
    """Tells the page that an edit has been taken, from inside the edit's callback.

    The page holds back further edits of an input until then, and ipykernel 7.4 does not send the message while a cell
    awaits: all but the first of them would be lost.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is not None:
        kernel._publish_status("idle", "shell")
        # The kernel itself is still busy; its own idle message follows.
        kernel._publish_status("busy", "shell", parent={"header": {}})
