"""The form of notebook 03: which run, which checkpoint, which dtype."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from hynb.errors import ConfigError, RunError
from hynb.runs import RunDir
from hynb.widgets.runs import _NO_RUN, find_runs
from hynb.widgets.table import STYLE

SAVE_DTYPES = ("keep", "bf16", "fp16", "fp32")


@dataclass(kw_only=True, frozen=True)
class MergeChoice:
    """Which adapter is merged, into what, and how it is written."""

    base_model_path: str
    adapter_model_path: str
    output_path: str
    save_dtype: str
    train_data_file: str | None


class MergeForm(widgets.VBox):
    """Run, checkpoint, dtype and output folder of a merge; `value` is the MergeChoice.

    Args:
        run_dir: the run that is chosen at first; others of its parent folder can be chosen.
        checkpoint: name of one of its checkpoints, or "last".
        save_dtype: one of SAVE_DTYPES; "keep" leaves each tensor in the base's dtype.
        output_path: folder of the merged model; "auto" for one beside the run folder.
    """

    def __init__(self, *, run_dir: str, checkpoint: str, save_dtype: str, output_path: str) -> None:
        chosen = RunDir(run_dir).path
        if save_dtype not in SAVE_DTYPES:
            raise ConfigError(f"save_dtype = {save_dtype!r}: must be one of {', '.join(SAVE_DTYPES)}")
        if chosen not in (found := find_runs(chosen.parent)):
            known = ", ".join(path.name for path in found) or "none"
            raise RunError(f"run_dir = {run_dir}: there is no run in {chosen}; runs beside it: {known}")
        self._first_checkpoint = checkpoint
        wide = {"width": "560px"}
        style = {"description_width": "100px"}
        options = [(path.name, str(path)) for path in found]
        self.run = widgets.Dropdown(description="run", options=options, value=str(chosen), layout=wide, style=style)
        self.checkpoint = widgets.Dropdown(description="checkpoint", options=[_NO_RUN], layout=wide, style=style)
        self.save_dtype = widgets.Dropdown(
            description="save_dtype", options=SAVE_DTYPES, value=save_dtype, layout=wide, style=style
        )
        self.output_path = widgets.Text(description="output_path", value=output_path, layout=wide, style=style)
        self._note = widgets.HTML()
        self.run.observe(self._list_checkpoints, names="value")
        super().__init__(
            [widgets.HTML(STYLE), self.run, self.checkpoint, self.save_dtype, self.output_path, self._note]
        )
        self._list_checkpoints()
        if checkpoint != "last" and checkpoint not in self.checkpoint.options:
            known = ", ".join(self.checkpoint.options)
            raise RunError(f"checkpoint = {checkpoint}: {run_dir} has none of that name; there are: {known}")

    @property
    def value(self) -> MergeChoice:
        """What the form shows.

        Raises:
            RunError: the run has no LoRA checkpoint.
        """
        from hynb.config import load_yaml
        from hynb.files import read_json

        run_dir = RunDir(self.run.value)
        if self.checkpoint.value == _NO_RUN:
            raise RunError(
                f"{run_dir.path}: has no LoRA checkpoint. A run with use_lora saves one; "
                "a full fine-tuning needs no merge: its checkpoint is the model"
            )
        adapter = run_dir.path / self.checkpoint.value
        config = load_yaml(run_dir.config)
        base = (read_json(adapter / "adapter_config.json") or {}).get("base_model_name_or_path")
        output = self.output_path.value.strip()
        automatic = run_dir.path.with_name(f"{run_dir.path.name}-merged")
        return MergeChoice(
            base_model_path=str(base or config.model_name_or_path),
            adapter_model_path=str(adapter),
            output_path=str(automatic if output in ("", "auto") else Path(output).expanduser().absolute()),
            save_dtype=self.save_dtype.value,
            train_data_file=config.train_data_file,
        )

    def _list_checkpoints(self, _: Any = None) -> None:
        found = [
            path.name for path in RunDir(self.run.value).checkpoints() if (path / "adapter_config.json").is_file()
        ]
        self.checkpoint.options = found or [_NO_RUN]
        last = found[-1] if found else _NO_RUN
        self.checkpoint.value = self._first_checkpoint if self._first_checkpoint in found else last
        beside = f"{RunDir(self.run.value).path.name}-merged"
        self._note.value = (
            f'<div class="hynb faint">auto: the folder <code>{html.escape(beside)}</code> beside the run. It takes '
            "as much disk space as the base; whether that is free is looked at first.</div>"
        )
