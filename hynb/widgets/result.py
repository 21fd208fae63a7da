"""What is shown of a run at its end: a picture and a table that stay in a saved notebook."""

from __future__ import annotations

from IPython.display import Image, display

from hynb.launch import Run
from hynb.runs import RunStatus, duration_text
from hynb.widgets.curve import Curve
from hynb.widgets.plot import png
from hynb.widgets.table import Table


def show_result(run: Run) -> None:
    """Shows the plot of the whole run as a picture, and its numbers as a table."""
    status, curve = run.status(), Curve.of(run.events())
    if curve.steps:
        picture = png(curve, status.max_steps, transparent=False)
        display(Image(picture, format="png", width=900, alt=curve.alt_text(status)))
    display(result_table(run, status, curve))


def result_table(run: Run, status: RunStatus, curve: Curve) -> Table:
    """State, numbers and checkpoints of a run, and the folder of the adapter or model that it trained."""
    rows = [("state", str(status)), *curve.facts()]
    if (lowest := curve.lowest_loss()) is not None:
        rows.insert(2, ("lowest loss", f"{lowest[0]:.4f} at step {lowest[1]}"))
    events = run.events()
    starts = [event["time"] for event in events if event["kind"] in ("start", "resume")]
    if starts and not status.live:
        rows.append(
            ("time", f"{duration_text(events[-1]['time'] - starts[-1])} from the first step to the last save")
        )
    checkpoints = run.checkpoints()
    rows.append(("checkpoints", ", ".join(path.name for path in checkpoints) or "none"))
    if checkpoints:
        is_adapter = (checkpoints[-1] / "adapter_config.json").is_file()
        rows.append(("LoRA adapter" if is_adapter else "trained model", str(checkpoints[-1])))
    return Table(columns=("what", "value"), rows=rows, title=f"Run {run.output_dir.name}")
