"""megamm: pretrain and fine-tune vision-audio-language models with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
