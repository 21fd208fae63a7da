from .plan import plan_merge as plan_merge
from .verify import verify_merge as verify_merge
from .write import RECEIPT as RECEIPT
from .write import MergeProgress as MergeProgress
from .write import merge_lora as merge_lora
