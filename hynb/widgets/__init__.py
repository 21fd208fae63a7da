"""Forms, live panels and pictures for notebooks; the only room that knows ipywidgets and matplotlib."""

from hynb.launch import attach
from hynb.widgets.cluster_view import check_hosts, set_up_hosts
from hynb.widgets.costs import memory_plan, preset_costs
from hynb.widgets.form import ConfigForm
from hynb.widgets.machine import machine_table, versions_table
from hynb.widgets.merge_view import ask_all, check, merge
from hynb.widgets.panel import RunPanel
from hynb.widgets.plan import check_data, deepspeed_plan, sample
from hynb.widgets.runs import MergeForm, RunChooser, runs_table
from hynb.widgets.session import (
    check_names,
    finished,
    read_parameters,
    show_result,
    start_or_attach,
    watch,
)

__all__ = [
    "ConfigForm",
    "MergeForm",
    "RunChooser",
    "RunPanel",
    "ask_all",
    "attach",
    "check",
    "check_data",
    "check_hosts",
    "check_names",
    "deepspeed_plan",
    "finished",
    "machine_table",
    "memory_plan",
    "merge",
    "preset_costs",
    "read_parameters",
    "runs_table",
    "sample",
    "set_up_hosts",
    "show_result",
    "start_or_attach",
    "versions_table",
    "watch",
]
