"""Text to token ids and back, and conversations to prompts.

Inputs: a Hugging Face folder or a GGUF file. Outputs: a `Tokenizer`. Knows nothing of models, arrays or
requests; importing it loads neither JAX nor the tokenizer and template libraries.
"""

from __future__ import annotations

from jaxllm.tokenizer.chat import ChatOptions
from jaxllm.tokenizer.detokenizer import IncrementalDetokenizer
from jaxllm.tokenizer.load import load_tokenizer
from jaxllm.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatOptions", "IncrementalDetokenizer", "Tokenizer", "load_tokenizer"]
