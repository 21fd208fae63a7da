"""JupyterLab in a headless Chromium, for the browser tests and the README's screenshots."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waiting import wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
TOKEN = "hynb"
# A busy machine takes many times as long as an idle one, where each wait is over within seconds.
_WAIT_SECONDS = 240


class Lab:
    """A running JupyterLab and the pages on it.

    Args:
        folder: the folder that JupyterLab shows.
    """

    def __init__(self, url: str, browser: Any, folder: Path) -> None:
        self.url = url
        self.browser = browser
        self.folder = folder

    def open(self, notebook: str, *, width: int = 1280, height: int = 900, scale: float = 1.0) -> Any:
        """A page with a notebook, ready to run, without side bars."""
        view = {"width": width, "height": height}
        page = self.browser.new_page(viewport=view, device_scale_factor=scale)
        page.set_default_timeout(_WAIT_SECONDS * 1000)
        self.load(page, notebook)
        return page

    def load(self, page: Any, notebook: str) -> None:
        """Loads a notebook into a page, or reloads it, and waits until its kernel has nothing to do."""
        page.goto(f"{self.url}doc/tree/{notebook}?token={TOKEN}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.wait_idle(page)

    @staticmethod
    def wait_idle(page: Any) -> None:
        """Waits until the kernel has nothing to do."""
        # The indicator in the notebook's toolbar is idle before there is a kernel; the status bar is not.
        page.wait_for_selector('.jp-StatusBar-TextItem:has-text("| Idle")')

    @staticmethod
    def run_all(page: Any) -> None:
        """Runs all cells, without waiting for them."""
        page.click('.lm-MenuBar-item:has-text("Run")')
        page.click('[data-command="runmenu:run-all"]')

    @classmethod
    def interrupt(cls, page: Any) -> None:
        """Interrupts the cell that runs, and waits until its kernel has nothing to do."""
        page.click('.lm-MenuBar-item:has-text("Kernel")')
        page.click('[data-command="kernelmenu:interrupt"]')
        cls.wait_idle(page)

    @staticmethod
    def run_cell(page: Any, text: str) -> None:
        """Runs the code cell that contains a text."""
        page.locator(f'.jp-CodeCell:has-text("{text}") .jp-InputArea-editor').first.click()
        page.keyboard.press("Control+Enter")


@contextmanager
def jupyter_lab(folder: Path, settings_folder: Path, *, dark: bool = False) -> Iterator[Lab]:
    """JupyterLab on a folder and a browser, which both end with the context.

    Args:
        settings_folder: a folder for its settings and its log, apart from the user's own.
        dark: use the dark theme.
    """
    from playwright.sync_api import sync_playwright

    _write_settings(settings_folder, dark=dark)
    with jupyter_server("lab", folder, settings_folder) as (_, url), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS, timeout=_WAIT_SECONDS * 1000)
        yield Lab(url, browser, folder)
        browser.close()


@contextmanager
def jupyter_server(kind: str, folder: Path, settings_folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process and URL; it ends with the context.

    Args:
        kind: `lab`, or `server` for one without JupyterLab's pages.
        folder: the folder that it shows.
        settings_folder: a folder for its settings and its log, apart from the user's own.
    """
    settings_folder.mkdir(exist_ok=True)
    folders = {f"JUPYTER_{name}_DIR": str(settings_folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(settings_folder / "settings")
    folders["JUPYTERLAB_WORKSPACES_DIR"] = str(settings_folder / "workspaces")
    # With port 0 the server chooses a free port, which no other process can take in between.
    command = [sys.executable, "-m", "jupyter", kind, "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--IdentityProvider.token={TOKEN}"]
    log_path = settings_folder / "server.log"
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | folders, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield server, _wait_until_up(server, settings_folder / "RUNTIME", log_path)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _write_settings(folder: Path, *, dark: bool) -> None:
    """Settings without the boxes that JupyterLab shows at its first start."""
    apputils = folder / "settings" / "@jupyterlab" / "apputils-extension"
    apputils.mkdir(parents=True)
    notification = {"fetchNews": "false", "checkForUpdates": False}
    (apputils / "notification.jupyterlab-settings").write_text(json.dumps(notification))
    theme = {"theme": "JupyterLab Dark" if dark else "JupyterLab Light"}
    (apputils / "themes.jupyterlab-settings").write_text(json.dumps(theme))
    # As it is by default, a page holds no cell that is far from the view.
    notebook = folder / "settings" / "@jupyterlab" / "notebook-extension"
    notebook.mkdir()
    (notebook / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))


def _wait_until_up(server: subprocess.Popen, runtime_folder: Path, log_path: Path) -> str:
    """The URL of the server, which it writes into a file once it knows its port."""

    def answers() -> str:
        assert server.poll() is None, f"JupyterLab did not start:\n{log_path.read_text()[-3000:]}"
        for path in runtime_folder.glob("jpserver-*.json"):
            try:
                url = json.loads(path.read_text())["url"]
                urllib.request.urlopen(f"{url}api/status?token={TOKEN}", timeout=10).close()
            except (OSError, ValueError):
                continue
            urls.append(url)
            return url
        return ""

    urls: list[str] = []
    wait_until(answers, "the start of JupyterLab", seconds=_WAIT_SECONDS)
    return urls[0]
