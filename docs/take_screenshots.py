"""Takes the README's screenshots of a real run in JupyterLab: python docs/take_screenshots.py [--dark] [FOLDER]."""

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

from hynb.config import Config  # noqa: E402
from hynb.demo import demo_config, write_demo  # noqa: E402
from hynb.launch import Run  # noqa: E402

# The step at which the loss has a shape to show and the run is still live.
SHOWN_STEP = 60
HEIGHT = 1000


def main() -> None:
    """Runs the demo's training and merge in the notebooks, and takes pictures of form, samples, panel and answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs", help="where the pictures are saved")
    parser.add_argument("--dark", action="store_true", help="JupyterLab's dark theme")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="hynb-screenshots-"))
    notebooks = work / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks)
    _set_parameters(notebooks / "02_finetune.ipynb", _training(notebooks))
    _set_parameters(
        notebooks / "03_merge_lora.ipynb", {"run_dir": "runs/cars", "question_file": "data/held_out.jsonl"}
    )
    run = Run(notebooks / "runs" / "cars")
    try:
        with jupyter_lab(notebooks, work / "settings", dark=args.dark) as lab:
            _picture_training(lab, args.folder, run)
            page = lab.open("03_merge_lora.ipynb", height=HEIGHT)
            lab.run_all(page)
            page.wait_for_selector(".jp-OutputArea >> text=merged and adapter agree")
            _save(page, 'h2:has-text("4. Ask")', args.folder / "merge.png")
    finally:
        if run.dir.launch.exists():
            run.kill()
        shutil.rmtree(work)


def _training(notebooks: Path) -> dict[str, Any]:
    """The parameters of the demo's training that differ from their defaults, with paths relative to the notebooks."""
    default = Config()
    config = demo_config(write_demo(notebooks / "data"), "runs/cars")
    values = {name: value for name, value in config.values().items() if value != getattr(default, name)}
    values |= {"model_name_or_path": "data/base_model", "train_data_file": "data/train.jsonl", "num_processes": 1}
    return values | {"eval_data_file": "data/held_out.jsonl", "eval_steps": 20}


def _set_parameters(path: Path, values: dict[str, Any]) -> None:
    papermill.execute_notebook(path, path, values, prepare_only=True, progress_bar=False)


def _picture_training(lab: Lab, folder: Path, run: Run) -> None:
    page = lab.open("02_finetune.ipynb", height=HEIGHT)
    lab.run_all(page)
    page.wait_for_selector(".widget-tab")
    page.click('.lm-TabBar-tab:has-text("ZeRO")')
    page.wait_for_selector(".widget-tab table.hynb-table")
    _save(page, 'h2:has-text("1. Choose")', folder / "form.png")
    page.wait_for_selector(".hynb-sample")
    _save(page, 'h2:has-text("3. Look at what")', folder / "preview.png")
    page.wait_for_selector("img.hynb-plot")
    for status, _ in run.follow(timeout_seconds=3600):
        if status.global_step >= SHOWN_STEP:
            break
    _save(page, 'h2:has-text("6. Train")', folder / "finetune.png")
    run.wait(timeout_seconds=3600, check=True)


def _save(page: Any, top: str, path: Path) -> None:
    """Saves a picture of the page, scrolled so that an element is at the top."""
    # Cells that scroll into view change their height, which moves the element again.
    for _ in range(3):
        page.locator(top).first.evaluate("element => element.scrollIntoView({block: 'start'})")
        page.wait_for_timeout(700)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
