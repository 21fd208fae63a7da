"""Hunyuan-Large for transformers 5: importing this registers model_type `hunyuan` with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from hynb.hunyuan_large.configuration import HunYuanLargeConfig
from hynb.hunyuan_large.loss import LanguageModelHead, causal_loss
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
    "LanguageModelHead",
    "causal_loss",
]


class _TokenizerName(PreTrainedConfig):
    """A config that no model has: transformers finds HYTokenizer by the name in tokenizer_config.json.

    Registered for HunYuanLargeConfig itself, it would give way to the model folder's own code where that is trusted.
    """

    model_type = "hunyuan_tokenizer"


AutoConfig.register("hunyuan", HunYuanLargeConfig, exist_ok=True)
AutoModel.register(HunYuanLargeConfig, HunYuanLargeModel, exist_ok=True)
AutoModelForCausalLM.register(HunYuanLargeConfig, HunYuanLargeForCausalLM, exist_ok=True)
AutoTokenizer.register(_TokenizerName, tokenizer_class=HYTokenizer, exist_ok=True)
register_checkpoint_conversion_mapping("hunyuan", get_checkpoint_conversion_mapping("hunyuan_v1_moe"), overwrite=True)
