"""What rounding a model's linears costs on held-out text: `python scripts/quantization_quality.py --model FOLDER
--calibration FILE --text FILE` prints a Markdown table.

Each kind is written by `jaxllm convert` and read back; all are computed in float32, a block at a time, so that weights
are the only difference. Perplexity, and the mean Kullback-Leibler divergence of the next token's distribution from that
of the model as it was.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from jaxllm.checkpoints import open_checkpoint, resolve_model
from jaxllm.families.tensor_names import named
from jaxllm.tokenizer import load_tokenizer
from jaxllm.weights.calibration import DEFAULT_TOKENS, Calibration
from jaxllm.weights.convert import convert
from jaxllm.weights.layerwise import LayerwiseDecoder

KINDS = ("int8", "fp8", "int4", "int4 calibrated")


class Evaluated:
    """A model's hidden states on a text `[S, T]`."""

    def __init__(self, path: Path, tokens: np.ndarray):
        self._decoder = LayerwiseDecoder(named(open_checkpoint(path)), tokens.shape[1])
        states = [self._decoder.embedded(batch) for batch in self._decoder.batches(tokens)]
        for layer in range(self._decoder.cfg.num_layers):
            values = self._decoder.block(layer)
            states = [self._decoder.run(layer, values, x)[0] for x in states]
        self._states = states

    def logprobs(self) -> Iterator[jax.Array]:
        """Batch by batch, of every token of the vocabulary after every token of the text."""
        yield from (jax.nn.log_softmax(self._decoder.logits(x)) for x in self._states)


def compare(base: Evaluated, other: Evaluated, tokens: np.ndarray) -> tuple[float, float, float]:
    """Perplexity of `other`, mean divergence from `base` in nats, share of equal likeliest tokens."""
    losses, divergences, same = [], [], []
    batches = zip(base.logprobs(), other.logprobs(), strict=True)
    first, span = 0, tokens.shape[1]
    for p_TV, q_TV in batches:
        spans = tokens[first : first + p_TV.shape[0] // span]
        first += len(spans)
        targets = jnp.asarray(np.pad(spans[:, 1:], ((0, 0), (0, 1))).reshape(-1))
        is_known = np.arange(p_TV.shape[0]) % span < span - 1
        losses.append(-np.asarray(jnp.take_along_axis(q_TV, targets[:, None], 1)[:, 0])[is_known])
        divergences.append(np.asarray(jnp.sum(jnp.exp(p_TV) * (p_TV - q_TV), axis=1)))
        same.append(np.asarray(jnp.argmax(p_TV, 1) == jnp.argmax(q_TV, 1)))
    mean = [float(np.concatenate(parts).astype(np.float64).mean()) for parts in (losses, divergences, same)]
    return math.exp(mean[0]), mean[1], mean[2]


def _folder(kind: str, args: argparse.Namespace, parent: Path) -> Path:
    """Where the model is, rounded as the kind says."""
    if Path(kind).is_dir():
        return Path(kind)
    name, _, is_calibrated = kind.partition(" ")
    if is_calibrated and args.calibration is None:
        raise SystemExit(f"{kind!r} needs --calibration FILE")
    calibration = Calibration(args.calibration, args.calibration_tokens) if is_calibrated else None
    return convert(args.model, parent / "q", to="safetensors", quantize=name, calibration=calibration)


def main() -> None:
    """The model as it is, then each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="another text, for the calibrated kinds")
    parser.add_argument("--calibration-tokens", type=int, default=DEFAULT_TOKENS)
    parser.add_argument("--num-tokens", type=int, default=50_000)
    parser.add_argument("--span", type=int, default=512, help="tokens that see each other")
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, help="as --quantize has them, 'int4 calibrated', or a folder"
    )
    args = parser.parse_args()
    path = resolve_model(args.model)
    ids = load_tokenizer(path).encode(args.text.read_text(encoding="utf-8"))[: args.num_tokens]
    batch = max(args.span, 2048 // args.span * args.span)
    tokens = np.asarray(ids[: len(ids) // batch * batch], np.int32).reshape(-1, args.span)
    base = Evaluated(path, tokens)
    start, _, _ = compare(base, base, tokens)
    print(f"{tokens.size} tokens in spans of {args.span}\n", file=sys.stderr)
    print("| weights | perplexity | change | loss added | KL (nats) | same likeliest token |\n|" + " --- |" * 6)
    print(f"| as they were | {start:.4f} | | | | |", flush=True)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as parent:
            perplexity, divergence, same = compare(base, Evaluated(_folder(kind, args, Path(parent)), tokens), tokens)
        change, added = perplexity / start - 1, math.log(perplexity / start)
        print(
            f"| {kind} | {perplexity:.4f} | {change:+.2%} | {added:+.4f} | {divergence:.5f} | {same:.2%} |", flush=True
        )


if __name__ == "__main__":
    main()
