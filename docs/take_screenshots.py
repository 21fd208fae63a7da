"""Takes the README's pictures of a real run in JupyterLab: python docs/take_screenshots.py [--dark] [FOLDER]."""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import papermill
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Lab, jupyter_lab  # noqa: E402

from hynb.demo import write_demo  # noqa: E402
from hynb.demo.run import demo_config
from hynb.launch import Run  # noqa: E402

# The step at which the loss has a shape to show and the run is still live.
SHOWN_STEP = 60


def main() -> None:
    """Starts the demo's training from the notebook and pictures form, data, live panel and merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs", help="where the pictures go")
    parser.add_argument("--dark", action="store_true", help="JupyterLab's dark theme")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="hynb-screenshots-"))
    notebooks = work / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks)
    files = write_demo(notebooks / "data")
    given = demo_config(files, "runs/cars")
    values = {name: getattr(given, name) for name in given.given or _changed(given)}
    values |= {"model_name_or_path": "data/base_model", "train_data_file": "data/train.jsonl", "num_processes": 1}
    values |= {"eval_data_file": "data/held_out.jsonl", "eval_steps": 20}
    _prepare(notebooks / "02_finetune.ipynb", values)
    _prepare(notebooks / "03_merge_lora.ipynb", {"run_dir": "runs/cars", "question_file": "data/held_out.jsonl"})
    try:
        with jupyter_lab(notebooks, work / "settings", dark=args.dark) as lab:
            _finetune(lab, args.folder, Run(notebooks / "runs" / "cars"))
            page = lab.open("03_merge_lora.ipynb", height=1000)
            lab.run_all(page)
            page.wait_for_selector(".jp-OutputArea >> text=merged and adapter agree", timeout=120_000)
            _save(page, 'h2:has-text("4. Ask")', args.folder / "merge.png")
    finally:
        if (notebooks / "runs" / "cars" / "launch.json").exists():
            Run(notebooks / "runs" / "cars").kill()
        shutil.rmtree(work)


def _changed(config: Any) -> list[str]:
    default = type(config)()
    return [name for name, value in config.values().items() if value != getattr(default, name)]


def _prepare(path: Path, values: dict[str, Any]) -> None:
    papermill.execute_notebook(path, path, values, prepare_only=True, progress_bar=False)


def _finetune(lab: Lab, folder: Path, run: Run) -> None:
    page = lab.open("02_finetune.ipynb", height=1000)
    lab.run_all(page)
    page.wait_for_selector(".widget-tab", timeout=60_000)
    page.click('.lm-TabBar-tab:has-text("ZeRO")')
    page.wait_for_selector(".widget-tab table.hynb-table")
    _save(page, 'h2:has-text("1. Choose")', folder / "form.png")
    page.wait_for_selector(".hynb-sample", timeout=60_000)
    _save(page, 'h2:has-text("3. Look at what")', folder / "preview.png")
    page.wait_for_selector("img.hynb-plot", timeout=180_000)
    for status, _ in run.follow(timeout_seconds=600):
        if status.global_step >= SHOWN_STEP:
            break
    _save(page, 'h2:has-text("6. Train")', folder / "finetune.png")
    run.wait(timeout_seconds=900, check=True)


def _save(page: Any, at_top: str, path: Path) -> None:
    """A picture of the page with an element at its top."""
    # Cells that come into sight change their height, which moves what was scrolled to.
    for _ in range(3):
        page.locator(at_top).first.evaluate("element => element.scrollIntoView({block: 'start'})")
        page.wait_for_timeout(700)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
