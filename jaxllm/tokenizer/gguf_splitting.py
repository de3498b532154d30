r"""How byte-level vocabularies of GGUF files cut a text into words, by the name in `tokenizer.ggml.pre`.

Pure data: the rules are those of the published tokenizers, the names that llama.cpp treats as equal share one.
Patterns are applied one after the other, each to the pieces that the one before it left; what matches and what lies
between matches become pieces. A name that is not here is refused: a guessed rule gives plausible but wrong ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Splitting:
    """How text becomes words before merges apply."""

    patterns: tuple[str, ...]
    nfc: bool = False  # compose accents first
    ignore_merges: bool = False  # a whole word that is in the vocabulary is taken as it is
    add_bos: bool = False  # unless the file says otherwise


_SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"  # English contractions
_ANY_CASE = rf"(?i:{_SHORT})"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_DIGIT = r"\p{N}"
_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
_HAN = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_MARKED_WORD = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
# Letters that have a case, as DeepSeek-LLM lists them.
_CASED = (
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}"
    r"\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}"
    r"\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}"
    r"\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}"
    r"\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}\x{1f5f}-\x{1f7d}"
    r"\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}"
    r"\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}"
    r"\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}"
    r"\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}"
    r"\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}"
    r"\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}"
    r"\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_PUNCTUATION = r"!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}"
_CLAUSE = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+"


def _cl100k(
    digits: str = _DIGIT, *, short: str = _ANY_CASE, word: str = _WORD, signs: str = _SIGNS, ends: str = _ENDS
) -> str:
    return "|".join((short, word, digits, signs, ends))


def _by_case(short: str, digits: str, signs: str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*", but: str = "") -> str:
    """A word begins where small letters are followed by a capital."""
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    return "|".join((f"{lead}{upper}*{lower}+{short}", f"{lead}{upper}+{lower}*{short}", digits, signs, _ENDS))


_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_DEEPSEEK3 = "|".join((_ASCII_SIGN, _MARKED_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", _ENDS))
_SPARK = "|".join((_ASCII_SIGN, _MARKED_WORD, r" ?[\p{P}\p{S}]+", r"[\r\n]", r"\s+(?!\S)|\s+"))
_CASCADE = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"|\s"
_YOUTU = (
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+"
    r"|[\x{ff01}\x{2026}\x{201c}\x{201d}\x{2018}\x{2019}\x{2014}\x{ff1a}\x{ff1b}\x{ff0c}\x{3001}-\x{303f}\x{fe30}-\x{fe4f}]+"
    rf"|[\x{{3105}}-\x{{312f}}]+|{_KANA}"
)

_GPT2_STYLE = Splitting((_GPT2,))
_DIGITS_APART = Splitting((_DIGIT, _GPT2))
_THREE_DIGITS = Splitting((_cl100k(r"\p{N}{1,3}"),))
_LLAMA3 = replace(_THREE_DIGITS, ignore_merges=True, add_bos=True)
_ONE_DIGIT = Splitting((_cl100k(),))
_QWEN2 = replace(_ONE_DIGIT, nfc=True)
_DEEPSEEK_V3 = Splitting((r"\p{N}{1,3}", _KANA, _DEEPSEEK3))
_GPT4O = Splitting((_by_case(f"{_ANY_CASE}?", r"\p{N}{1,3}"),))
_THOUSANDS = Splitting((r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O.patterns))
_BAILING = Splitting((_cl100k(short=r"'(?i:[sdmt]|ll|ve|re)", ends=r"\s*[\r\n]|\s+(?!\S)|\s+"),))
_LETTERS_WITH_SPACES = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"

_RULES: dict[str, Splitting] = {
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion "
    "granite-docling exaone4": _GPT2_STYLE,
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _DIGITS_APART,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": _LLAMA3,
    "dbrx smaug-bpe glm4 chatglm-bpe": _THREE_DIGITS,
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": _QWEN2,
    "stablelm2 hunyuan solar-open grok-2": _ONE_DIGIT,
    "qwen35": Splitting(
        (_cl100k(word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),), nfc=True
    ),
    "deepseek-llm": Splitting((r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", _HAN, r"\p{N}+")),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK_V3,
    "spark2_5": Splitting((r"\p{N}{1,3}", _KANA, _SPARK, _DIGIT)),
    "youtu": Splitting((_YOUTU, _by_case(f"{_ANY_CASE}?", _DIGIT)), ignore_merges=True),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": Splitting((_CLAUSE,)),
    "viking": Splitting((_CLAUSE, _DIGIT)),
    "tekken": Splitting((_by_case("", _DIGIT),), ignore_merges=True, add_bos=True),
    "chameleon": Splitting(
        (r"<sentinel:[0-9]+>", r"(IMGIMG)([A-I]{1,4})Z", r"[\t\n]|    |  ", _DIGIT, r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        add_bos=True,
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
    "granite-embed-multi-97m": replace(_GPT4O, ignore_merges=True),
    "tiny_aya cohere2moe": _THOUSANDS,
    "kimi-k2": Splitting((r"\p{Han}+|" + _by_case(f"{_ANY_CASE}?", r"\p{N}{1,3}", signs=_SIGNS, but=r"&&[^\p{Han}]"),)),
    "superbpe": Splitting((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bailingmoe bailingmoe2 llada-moe": _BAILING,
    "seed-coder": Splitting((_cl100k(signs=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "ufakzeka": Splitting(("|".join((_WORD, _DIGIT, _SIGNS, _ENDS)),)),
    "laguna": Splitting((r"[^\n]+|[\n]+", _cl100k())),
    "exaone-moe": Splitting(
        (_cl100k(word=_LETTERS_WITH_SPACES, signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?", ends=r"\s*[\r\n]|\s+(?!\S)|\s+"),)
    ),
    "minicpm5": Splitting((r"\p{N}{1,3}", _cl100k(r"\p{N}+")), ignore_merges=True),
    "jais-2": Splitting((_cl100k(r"\p{N}{1,3}", ends=rf"\s*[\r\n]+|{_CASCADE}"),)),
}
SPLITTINGS: dict[str, Splitting] = {name: rule for names, rule in _RULES.items() for name in names.split()}
