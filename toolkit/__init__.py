"""Pretrain and fine-tune speech models from recipes: wav2vec 2.0, data2vec and CTC, on any device."""

__version__ = "0.1.0"
