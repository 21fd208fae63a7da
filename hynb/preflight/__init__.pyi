from .examine import examine as examine
from .report import Cell as Cell
from .report import Report as Report
from .report import text as text
