from .pretrain import write_tokenizer as write_tokenizer
from .run import demo_config as demo_config
from .run import write_demo as write_demo
from .texts import car_samples as car_samples
from .texts import write_jsonl as write_jsonl
