"""GPTQ: codes that make the product's error small on a text, not the weights' (Frantar et al. 2023, arXiv:2210.17323).

The error of a layer is `(w - q) H (w - q)^T` with `H = X^T X` of its inputs. Columns are rounded one after the other,
and what one is off by is taken out of those that follow: `w -= (w - q)_j / U_jj * U_j`, with `H^-1 = U^T U` and U upper
triangular. Columns keep their order, so that groups stay neighbours in memory; 1% of its mean diagonal is added to H. A
group's scale is the one of a few, from its largest weight down, that rounds the group best as each column counts.

Dimension letters: N outputs, K inputs, J groups of them, B columns of a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxllm.config.quantization import Scheme
from jaxllm.weights.rounding import Pieces, codes_of, kept_scales, largest_code, numbers_of, round_to_nearest

_DAMPING = 0.01
_BLOCK = 128  # columns whose errors reach the rest of the matrix together
_ROWS = 1024  # outputs that a thread rounds together: a block of them stays in its cache
_SHRINKING = np.linspace(1.0, 0.65, 15, dtype=np.float32)  # of a scale

Rounding = Callable[[np.ndarray], Pieces]


def rounding_for(hessian_KK: np.ndarray, scheme: Scheme) -> Rounding:
    """What rounds float32 matrices `[N, K]` whose inputs have this Hessian; to nearest where there were no inputs."""
    if not hessian_KK.any():
        return lambda weights_NK: round_to_nearest(weights_NK, scheme, 1)
    upper_KK = _inverse_factor(hessian_KK)

    def run(weights_NK: np.ndarray) -> Pieces:
        starts = range(0, len(weights_NK), _ROWS)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(lambda i: _rounded(weights_NK[i : i + _ROWS], upper_KK, scheme), starts))
        return Pieces(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    return run


def _inverse_factor(hessian_KK: np.ndarray) -> np.ndarray:
    """float32 upper triangular U with `H^-1 = U^T U`: of `H = R R^T` with R upper triangular, U is R's inverse."""
    from jax.scipy.linalg import solve_triangular

    damped = hessian_KK.astype(np.float64)
    diagonal = np.diag_indices(len(damped))
    damped[diagonal] += _DAMPING * damped[diagonal].mean()
    flipped = np.linalg.cholesky(damped[::-1, ::-1])
    factor = np.ascontiguousarray(flipped[::-1, ::-1], np.float32)
    return np.asarray(solve_triangular(factor, np.eye(len(factor), dtype=np.float32), lower=False))


def _rounded(weights_NK: np.ndarray, upper_KK: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[N, K]` and scales `[N, J]`. Inputs come first here: a column of the matrix is a run of memory."""
    w_KN = np.array(weights_NK.T, np.float32, order="C")
    size, group = len(w_KN), scheme.group or len(w_KN)
    counts_K = np.square(1.0 / np.diag(upper_KK))[:, None]
    block = group * max(1, _BLOCK // group) if scheme.group else _BLOCK
    codes, scales = [], []
    for start in range(0, size, block):
        end = min(start + block, size)
        errors_BN = np.empty((end - start, w_KN.shape[1]), np.float32)
        for i in range(start, end):
            if i % group == 0:
                scales.append(_best_scale(w_KN[i : i + group], counts_K[i : i + group], scheme))
            code = codes_of(w_KN[i] / scales[-1], scheme)
            codes.append(code)
            errors_BN[i - start] = (w_KN[i] - numbers_of(code, scheme) * scales[-1]) / upper_KK[i, i]
            w_KN[i + 1 : end] -= upper_KK[i, i + 1 : end, None] * errors_BN[i - start]
        w_KN[end:] -= upper_KK[start:end, end:].T @ errors_BN
    return np.ascontiguousarray(np.stack(codes, axis=1)), np.stack(scales, axis=1)


def _best_scale(w_KN: np.ndarray, counts_K1: np.ndarray, scheme: Scheme) -> np.ndarray:
    """`[N]`: of one group, each output for itself."""
    largest = np.abs(w_KN).max(axis=0) / largest_code(scheme)
    tried = [kept_scales(largest * factor, scheme) for factor in _SHRINKING]
    losses = [_loss(w_KN, counts_K1, scale, scheme) for scale in tried]
    return np.choose(np.argmin(losses, axis=0), tried)


def _loss(w_KN: np.ndarray, counts_K1: np.ndarray, scale_N: np.ndarray, scheme: Scheme) -> np.ndarray:
    off = w_KN - numbers_of(codes_of(w_KN / scale_N, scheme), scheme) * scale_N
    return (np.square(off) * counts_K1).sum(axis=0)
