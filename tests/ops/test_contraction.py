"""Dims are summed over in the order in which they lie in the matrix, and letters mean what they meant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.contraction import contraction

SPECS = "TKGH,KGHD->TD TNH,NHD->TD TD,DKXH->TKXH ETKH,EKHD->ETD TKGH,TD->KGHD".split()


@pytest.mark.parametrize("spec", SPECS)
def test_a_contraction_follows_the_matrix(spec):
    x_dims, w_dims = spec.split("->")[0].split(",")
    sizes = {letter: 2 + i for i, letter in enumerate(sorted({*x_dims, *w_dims}))}
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal([sizes[d] for d in dims]), jnp.float32) for dims in (x_dims, w_dims))
    np.testing.assert_allclose(contraction(spec, x, w), np.einsum(spec, x, w), rtol=1e-5, atol=1e-5)


def test_the_output_projection_is_summed_over_as_it_lies():
    x, w = jnp.zeros((3, 2, 4, 8)), jnp.zeros((2, 4, 8, 5))
    as_it_lies, spec = "(([1, 2, 3], [0, 1, 2])", "TKGH,KGHD->TD"
    assert as_it_lies in str(jax.make_jaxpr(lambda x, w: contraction(spec, x, w))(x, w))
    assert as_it_lies not in str(jax.make_jaxpr(lambda x, w: jnp.einsum(spec, x, w))(x, w))
