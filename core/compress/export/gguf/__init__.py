"""GGUF, the file format of llama.cpp. It has a module each for the layouts of blocks, the families, the vocabulary and the file."""

from nightpress.core.compress.export.gguf.file import CONSUMER, FILE_NAME, save
from nightpress.core.compress.export.gguf.layers import compare_layers
from nightpress.core.compress.export.gguf.tokens import check_tokens

__all__ = ["CONSUMER", "FILE_NAME", "check_tokens", "compare_layers", "save"]
