"""Tokenizer of a Hugging Face folder.

Inputs: `tokenizer.json` and, where present, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json, config.json, and the files of chat templates. Output: a `Tokenizer`.
No code from the folder is run; formats other than `tokenizer.json` are not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.tokenizer.added_tokens import add_outside_tokens
from jaxllm.tokenizer.end_tokens import with_named_end_tokens
from jaxllm.tokenizer.folder_templates import folder_templates
from jaxllm.tokenizer.json_file import read_json
from jaxllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Read a folder; raises ValueError with one line when it cannot."""
    backend = _read_backend(folder)
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    special_tokens = {name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name)))}
    special_texts = [*special_tokens.values(), *_extra_special_texts(settings)]
    add_outside_tokens(backend, settings, read_json(folder / "added_tokens.json"), special_texts)
    return Tokenizer(
        backend,
        bos_token_id=_bos_token_id(folder, backend, special_tokens),
        eos_token_ids=_eos_token_ids(folder, backend, special_tokens),
        chat_templates=folder_templates(folder, settings),
        special_tokens=special_tokens,
    )


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a readable tokenizer.json: {error}; download it again") from None
    # A file saved by a training script may cut or pad every text.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_text(value: Any) -> str | None:
    """A token is written as its text or as an object that has `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _extra_special_texts(settings: dict[str, Any]) -> list[str]:
    """`additional_special_tokens`, or `extra_special_tokens` as newer files call them (a list, or an object)."""
    found: list[str] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(name) or []
        texts = map(_token_text, value.values() if isinstance(value, dict) else value)
        found += [text for text in texts if text is not None]
    return found


def _model_configs(folder: Path) -> list[dict[str, Any]]:
    """The files that name token ids, the most authoritative first."""
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    nested = [text_config] if isinstance(text_config, dict) else []
    return [read_json(folder / "generation_config.json"), config, *nested]


def _bos_token_id(folder: Path, backend: tokenizers.Tokenizer, special: dict[str, str]) -> int | None:
    if "bos_token" in special:
        return backend.token_to_id(special["bos_token"])
    found = [config["bos_token_id"] for config in _model_configs(folder) if _ids(config.get("bos_token_id"))]
    return _ids(found[0])[0] if found else None


def _eos_token_ids(folder: Path, backend: tokenizers.Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    generation, *others = [_ids(config.get("eos_token_id")) for config in _model_configs(folder)]
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    own = [] if eos is None else [eos]
    if generation:  # the model's author listed what ends an answer: nothing is guessed
        return tuple(dict.fromkeys([*generation, *own]))
    listed = [*own, *(i for ids in others for i in ids)]
    added = backend.get_added_tokens_decoder()
    by_text = {token.content: i for i, token in added.items() if token.special}
    return with_named_end_tokens(listed, by_text.get)


def _ids(value: Any) -> list[int]:
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
