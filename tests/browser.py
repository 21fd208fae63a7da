"""JupyterLab in a headless Chromium: what the browser tests and the README's screenshots share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
_TOKEN = "hynb"


class Lab:
    """A running JupyterLab and the pages on it."""

    def __init__(self, url: str, browser: Any) -> None:
        self.url = url
        self.browser = browser

    def open(self, notebook: str, *, width: int = 1280, height: int = 900, scale: float = 1.0) -> Any:
        """A page on a notebook, ready to run, without side bars."""
        view = {"width": width, "height": height}
        page = self.browser.new_page(viewport=view, device_scale_factor=scale)
        self.load(page, notebook)
        return page

    def load(self, page: Any, notebook: str, *, idle: bool = True) -> None:
        """Loads a notebook into a page, anew where it is there already; waits for its kernel if it is idle."""
        page.goto(f"{self.url}/doc/tree/{notebook}?token={_TOKEN}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=30_000)
        if idle:
            self.wait_idle(page)

    @staticmethod
    def wait_idle(page: Any, seconds: float = 60) -> None:
        """Waits until the kernel has nothing to do."""
        # The indicator says idle before there is a kernel; the status bar doesn't.
        page.wait_for_selector('.jp-StatusBar-TextItem:has-text("| Idle")', timeout=seconds * 1000)

    @staticmethod
    def run_all(page: Any) -> None:
        """Menu Run, Run All Cells; does not wait."""
        page.click('.lm-MenuBar-item:has-text("Run")')
        page.click('[data-command="runmenu:run-all"]')

    @staticmethod
    def run_cell(page: Any, text: str) -> None:
        """Runs the code cell that holds a text."""
        page.locator(f'.jp-CodeCell:has-text("{text}") .jp-InputArea-editor').first.click()
        page.keyboard.press("Control+Enter")


@contextmanager
def jupyter_lab(folder: Path, settings_folder: Path, *, dark: bool = False) -> Iterator[Lab]:
    """JupyterLab on a folder, with settings of its own, and a browser; both end with the context."""
    from playwright.sync_api import sync_playwright

    apputils = settings_folder / "settings" / "@jupyterlab" / "apputils-extension"
    apputils.mkdir(parents=True)
    notification = {"fetchNews": "false", "checkForUpdates": False}
    (apputils / "notification.jupyterlab-settings").write_text(json.dumps(notification))
    theme = {"theme": "JupyterLab Dark" if dark else "JupyterLab Light"}
    (apputils / "themes.jupyterlab-settings").write_text(json.dumps(theme))
    folders = {f"JUPYTER_{name}_DIR": str(settings_folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(settings_folder / "settings")
    folders["JUPYTERLAB_WORKSPACES_DIR"] = str(settings_folder / "workspaces")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={_TOKEN}"]
    with (settings_folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | folders, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _wait_until_up(url, server, settings_folder / "server.log")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
            yield Lab(url, browser)
            browser.close()
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/status?token={_TOKEN}", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
