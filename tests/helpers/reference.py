"""An independent Llama: a naive NumPy forward pass without cache, batching or any code of the project.

It reads GGUF through the `gguf` package and undoes its row order itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


class ReferenceLlama:
    """Float32 weights of a Llama GGUF under Hugging Face names, and the textbook forward pass over them."""

    def __init__(self, path: Path):
        import gguf

        reader = gguf.GGUFReader(path)

        def field(name: str) -> float:
            return reader.fields[name].contents()

        self.layers = int(field("llama.block_count"))
        self.heads = int(field("llama.attention.head_count"))
        self.kv_heads = int(field("llama.attention.head_count_kv"))
        self.theta = float(field("llama.rope.freq_base"))
        self.eps = float(field("llama.attention.layer_norm_rms_epsilon"))
        self.w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        self.width = self.w["blk.0.attn_q.weight"].shape[0] // self.heads

    def hf_state(self) -> dict[str, np.ndarray]:
        """The same weights under Hugging Face names and in Hugging Face row order."""
        names = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
        state = {
            "model.embed_tokens.weight": self.w["token_embd.weight"],
            "model.norm.weight": self.w["output_norm.weight"],
        }
        for layer in range(self.layers):
            for ours, theirs in names.items():
                value = self.w[f"blk.{layer}.{ours}.weight"]
                if ours in ("attn_q", "attn_k"):
                    value = self._half_split(value)
                state[f"model.layers.{layer}.{theirs}.weight"] = value
        return state

    def _half_split(self, w: np.ndarray) -> np.ndarray:
        """Rows of each head from interleaved rotary pairs (0, 1), (2, 3)... to halves (0, H/2), (1, H/2 + 1)..."""
        heads = w.reshape(-1, self.width, w.shape[1])
        return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(w.shape)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits `[T, V]` of a whole sequence, everything recomputed."""
        x = self.w["token_embd.weight"][tokens]
        for layer in range(self.layers):
            x = x + self._attention(layer, self._norm(x, f"blk.{layer}.attn_norm.weight"))
            h = self._norm(x, f"blk.{layer}.ffn_norm.weight")
            gate = h @ self.w[f"blk.{layer}.ffn_gate.weight"].T
            up = h @ self.w[f"blk.{layer}.ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{layer}.ffn_down.weight"].T
        return self._norm(x, "output_norm.weight") @ self.w["token_embd.weight"].T

    def likeliest(self, prompt: list[int], output: list[int]) -> list[int]:
        """The likeliest token at each place of `output`, given all before it: the greedy loop says the same if equal.

        One pass over the whole sequence instead of one for every token.
        """
        return self.logits([*prompt, *output[:-1]])[len(prompt) - 1 :].argmax(-1).tolist()

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def _attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        length = len(x)
        q, k, v = ((x @ self.w[f"blk.{layer}.attn_{name}.weight"].T).reshape(length, -1, self.width) for name in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        out = np.empty_like(q)
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            scores = q[:, head] @ k[:, group].T / np.sqrt(self.width)
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        return out.reshape(length, -1) @ self.w[f"blk.{layer}.attn_output.weight"].T

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding on interleaved pairs, as GGUF stores Q and K."""
        angles = np.arange(len(x))[:, None] / self.theta ** (np.arange(0, self.width, 2) / self.width)
        cos, sin = np.cos(angles)[:, None].astype(np.float32), np.sin(angles)[:, None].astype(np.float32)
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
        return out
