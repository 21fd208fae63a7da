from .examine import examine_hosts as examine_hosts  # for users
from .examine import run_preflight as run_preflight
from .report import Cell as Cell
from .report import Report as Report
