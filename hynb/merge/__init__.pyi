from .plan import plan_merge as plan_merge
from .shard_writer import MergeProgress as MergeProgress
from .shards import SAVE_DTYPES as SAVE_DTYPES
from .verify import verify_merge as verify_merge
from .write import RECEIPT as RECEIPT
from .write import merge_lora as merge_lora
