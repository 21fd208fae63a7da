"""Hunyuan-Large for transformers 5: importing this registers model_type `hunyuan` with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from hynb.hunyuan_large.configuration import HunYuanLargeConfig
from hynb.hunyuan_large.modeling import (
    HunYuanLargeDecoderLayer,
    HunYuanLargeForCausalLM,
    HunYuanLargeModel,
    HunYuanLargeMoE,
)
from hynb.hunyuan_large.tokenization import HYTokenizer

__all__ = [
    "HYTokenizer",
    "HunYuanLargeConfig",
    "HunYuanLargeDecoderLayer",
    "HunYuanLargeForCausalLM",
    "HunYuanLargeMoE",
    "HunYuanLargeModel",
]

AutoConfig.register("hunyuan", HunYuanLargeConfig, exist_ok=True)
AutoModelForCausalLM.register(HunYuanLargeConfig, HunYuanLargeForCausalLM, exist_ok=True)
AutoTokenizer.register(HunYuanLargeConfig, tokenizer_class=HYTokenizer, exist_ok=True)
register_checkpoint_conversion_mapping("hunyuan", get_checkpoint_conversion_mapping("hunyuan_v1_moe"), overwrite=True)
