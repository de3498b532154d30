"""A tokenizer with one token for each byte, for tests that need text but no real vocabulary.

Output: the files of a Hugging Face folder. Token ids: byte b is b; `<|bos|>` is 256, `<|eos|>` is 257; the
vocabulary size is 258. Nothing is added around a text.

Example:
    write_byte_tokenizer(tmp_path)
    load_tokenizer(tmp_path).encode("hi")  # [104, 105]
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxllm.tokenizer.token_bytes import byte_to_unicode

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID, VOCAB_SIZE = 256, 257, 258
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role + '\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def byte_tokenizer_json() -> str:
    """The text of `tokenizer.json`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {char: byte for byte, char in byte_to_unicode().items()}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in ((BOS_ID, BOS), (EOS_ID, EOS))],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return json.dumps(content)


def byte_tokenizer_config() -> str:
    """The text of `tokenizer_config.json`."""
    return json.dumps({"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE})


def write_byte_tokenizer(folder: Path) -> Path:
    """Write both files into `folder` (made when missing) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(byte_tokenizer_config(), encoding="utf-8")
    return folder
