"""Tokenizers of models from scratch: characters or bytes as they come, or a BPE trained on the text itself.

A name of the configuration and some text -> a `Tokenizer` that is saved and served like any other. Pieces are written
in the byte-level alphabet of GPT-2, so every text comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jaxllm.tokenizer import Tokenizer

END, PAD = "<|endoftext|>", "<|padding|>"
_ROLES = ("<|im_start|>", "<|im_end|>")


def make_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `kind` names: char, byte or bpe:SIZE.

    Args:
        texts: what it is to know: every character of it, or what the pairs are counted in; read once.

    Raises:
        ValueError: no such kind, or a size that does not work.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if kind == "char":
        return _characters(texts)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "byte")
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "byte":
        backend.model = models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])
    else:
        _train(backend, _size(kind), alphabet, texts)
    return _finished(backend)


def _size(kind: str) -> int:
    name, _, size = kind.partition(":")
    if name != "bpe" or not size.isdecimal() or not 300 <= int(size) <= 1 << 20:
        raise ValueError(f"tokenizer={kind!r}; use char, byte, bpe:SIZE with SIZE from 300 on, or a model's name")
    return int(size)


def _train(backend, size: int, alphabet: list[str], texts: Iterable[str]) -> None:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(_ROLES), initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator(_pieces(texts), trainer)


def _pieces(texts: Iterable[str], size: int = 1 << 16) -> Iterator[str]:
    """Pieces that the trainer can take: a whole book as one text would keep it from using every core."""
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start : start + size]


def _characters(texts: Iterable[str]) -> Tokenizer:
    """A token for every character that occurs; any other becomes the padding token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    characters = sorted(set().union(*map(set, texts)))
    vocab = {text: i for i, text in enumerate((*characters, END, PAD))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _finished(backend, roles=())


def _finished(backend, roles: tuple[str, ...] = _ROLES) -> Tokenizer:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (END, PAD, *roles)])
    special = {"eos_token": END, "bos_token": END, "pad_token": PAD}
    end = backend.token_to_id(END)
    ends = (end, *(backend.token_to_id(role) for role in roles[1:]))
    return Tokenizer(backend, bos_token_id=end, eos_token_ids=ends, chat_templates={}, special_tokens=special)
