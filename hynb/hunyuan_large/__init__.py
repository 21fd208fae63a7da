"""Hunyuan-Large for transformers 5, and Hunyuan-A13B's older folders, which have the same model type.

Importing it registers model_type `hunyuan` with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from hynb.hunyuan_large.attention import PACKED_SDPA
from hynb.hunyuan_large.attention import register as _register_attention
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
    "PACKED_SDPA",
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
    """A config that belongs to no model: transformers finds HYTokenizer by its name in tokenizer_config.json.

    A tokenizer registered for HunYuanLargeConfig would be replaced by the model folder's code where that is trusted.
    """

    model_type = "hunyuan_tokenizer"


_register_attention()
AutoConfig.register("hunyuan", HunYuanLargeConfig, exist_ok=True)
AutoModel.register(HunYuanLargeConfig, HunYuanLargeModel, exist_ok=True)
AutoModelForCausalLM.register(HunYuanLargeConfig, HunYuanLargeForCausalLM, exist_ok=True)
AutoTokenizer.register(_TokenizerName, tokenizer_class=HYTokenizer, exist_ok=True)
_mapping = get_checkpoint_conversion_mapping("hunyuan_v1_moe")
assert _mapping is not None
register_checkpoint_conversion_mapping("hunyuan", _mapping, overwrite=True)
