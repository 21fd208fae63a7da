from .receipt import RECEIPT as RECEIPT
from .receipt import find_merge as find_merge
from .shards import SAVE_DTYPES as SAVE_DTYPES
from .verify import verify_merge as verify_merge
from .write import merge_lora as merge_lora
