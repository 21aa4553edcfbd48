"""Text to token ids and back, read from a checkpoint's own files; nothing of the checkpoint is ever executed."""

from jaxdeploy.tokenizer.detokenizer import Detokenizer
from jaxdeploy.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
