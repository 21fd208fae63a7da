from .pretrain import write_tokenizer as write_tokenizer
from .run import demo_config as demo_config  # for users
from .run import write_demo as write_demo  # for users
from .texts import car_samples as car_samples
