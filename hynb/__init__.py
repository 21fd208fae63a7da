"""hynb: fine-tune Tencent's Hunyuan models from Jupyter and without a person."""

__version__ = "0.1.0"
