"""The form of a merge: which run, which checkpoint, which dtype, which output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from hynb.config import load_yaml
from hynb.errors import ConfigError, RunError
from hynb.merge import SAVE_DTYPES
from hynb.runs import RunDir, find_base
from hynb.widgets.markup import STYLE, element
from hynb.widgets.runs import NOTHING, find_runs


@dataclass(kw_only=True, frozen=True)
class MergeChoice:
    """Which adapter is merged into which base, where, and in which dtype.

    Args:
        train_data_file: the data that the adapter was trained on.
    """

    base_model_path: str
    adapter_model_path: str
    output_path: str
    save_dtype: str
    train_data_file: str | None


class MergeForm(widgets.VBox):
    """Run, checkpoint, dtype and output folder of a merge; `value` is the MergeChoice.

    Args:
        run_dir: the run that is chosen at first; the other runs in its parent folder can be chosen too.
        checkpoint: name of one of its checkpoints, or "last".
        save_dtype: one of SAVE_DTYPES; "keep" leaves each tensor in the base's dtype.
        output_path: folder of the merged model; "auto" for one beside the run folder.

    Raises:
        ConfigError: an unknown dtype.
        RunError: the folder has no run, or the run has no such checkpoint.
    """

    def __init__(self, *, run_dir: str, checkpoint: str, save_dtype: str, output_path: str) -> None:
        chosen = RunDir(run_dir).path
        if save_dtype not in SAVE_DTYPES:
            raise ConfigError(f"save_dtype = {save_dtype!r}: must be one of {', '.join(SAVE_DTYPES)}")
        if chosen not in (found := find_runs(chosen.parent)):
            known = ", ".join(path.name for path in found) or "none"
            raise RunError(f"run_dir = {run_dir}: there is no run in {chosen}; runs in the same folder: {known}")
        self._first_checkpoint = checkpoint
        look = {"layout": {"width": "560px"}, "style": {"description_width": "100px"}}
        options = [(path.name, str(path)) for path in found]
        self.run = widgets.Dropdown(description="run", options=options, value=str(chosen), **look)
        self.checkpoint = widgets.Dropdown(description="checkpoint", options=[NOTHING], **look)
        self.save_dtype = widgets.Dropdown(
            description="save_dtype", options=list(SAVE_DTYPES), value=save_dtype, **look
        )
        self.output_path = widgets.Text(description="output_path", value=output_path, **look)
        self._note = widgets.HTML()
        self.run.observe(self._list_checkpoints, names="value")
        super().__init__(
            [widgets.HTML(STYLE), self.run, self.checkpoint, self.save_dtype, self.output_path, self._note]
        )
        self._list_checkpoints()
        if checkpoint != "last" and checkpoint not in self.checkpoint.options:
            known = ", ".join(self.checkpoint.options)
            raise RunError(f"checkpoint = {checkpoint}: not a checkpoint of {run_dir}; its checkpoints: {known}")

    @property
    def value(self) -> MergeChoice:
        """What the form shows.

        Raises:
            RunError: the run has no LoRA checkpoint.
            ModelError: the base of the checkpoint is missing, or is not the one that it was trained on.
        """
        run_dir = self._run_dir
        if self.checkpoint.value == NOTHING:
            raise RunError(
                f"{run_dir.path}: has no LoRA checkpoint. A run with use_lora saves them; "
                "a full fine-tuning needs no merge: its checkpoint is the model"
            )
        adapter = run_dir.path / str(self.checkpoint.value)
        output = str(self.output_path.value).strip()
        automatic = run_dir.path.with_name(f"{run_dir.path.name}-merged")
        return MergeChoice(
            base_model_path=str(find_base(adapter)),
            adapter_model_path=str(adapter),
            output_path=str(automatic if output in ("", "auto") else Path(output).expanduser().absolute()),
            save_dtype=str(self.save_dtype.value),
            train_data_file=load_yaml(run_dir.config).train_data_file,
        )

    @property
    def _run_dir(self) -> RunDir:
        return RunDir(str(self.run.value))

    def _list_checkpoints(self, _: Any = None) -> None:
        checkpoints = self._run_dir.checkpoints()
        found = [path.name for path in checkpoints if (path / "adapter_config.json").is_file()]
        self.checkpoint.options = found or [NOTHING]
        last = found[-1] if found else NOTHING
        self.checkpoint.value = self._first_checkpoint if self._first_checkpoint in found else last
        automatic = element("code", f"{self._run_dir.path.name}-merged")
        self._note.value = (
            f'<div class="hynb faint">auto: the folder {automatic} beside the run folder. The merged model needs as '
            "much disk space as the base; the free space is checked first.</div>"
        )
