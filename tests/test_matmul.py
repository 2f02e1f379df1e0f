"""The bf16 projection of CPUs: equal to the plain einsum, and really bf16 in every product of the compiled program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.contract import dot_in
from jaxllm.models.matmul import dot_cpu_bfloat16

SPECS = {
    "BTD,DNH->BTNH": ((2, 32, 64), (64, 2, 32)),
    "BTNH,NHD->BTD": ((2, 32, 2, 32), (2, 32, 64)),
    "BTD,DF->BTF": ((2, 3, 5), (5, 7)),
    "...D,VD->...V": ((2, 32, 64), (96, 64)),
}


def arrays(spec: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return tuple(jnp.array(rng.normal(size=shape), jnp.float32) for shape in SPECS[spec])  # type: ignore[return-value]


@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradients_are_those_of_the_einsum(spec: str) -> None:
    x, kernel = arrays(spec)
    weigh = lambda y: (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape))).sum()
    ours, plain, exact = (
        jax.value_and_grad(lambda x, k, dot=dot: weigh(dot("site", spec, x, {"kernel": k})), (0, 1))(x, kernel)
        for dot in (dot_cpu_bfloat16, dot_in("bfloat16"), dot_in("float32"))
    )
    assert ours[0] == pytest.approx(plain[0], rel=1e-6), "the forward product is the same one"
    for mine, true in zip(ours[1], exact[1], strict=True):
        assert mine.dtype == jnp.float32
        assert np.linalg.norm(mine - true) < 0.01 * np.linalg.norm(true), "bf16 operands: 8 bits of mantissa"


@pytest.mark.parametrize("spec", list(SPECS)[:2] + list(SPECS)[3:])
def test_no_product_is_cast_to_float32(spec: str) -> None:
    def products(dot) -> list[tuple[str, str]]:
        loss = lambda x, k: jnp.square(dot("site", spec, x, {"kernel": k})).sum()
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays(spec)).compile().as_text()
        types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
        return [(types[a], types[b]) for a, b in re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)", text)]

    assert products(dot_cpu_bfloat16) == [("bf16", "bf16")] * 3
    assert ("f32", "f32") in products(dot_in("bfloat16")), "the plain einsum no longer needs help: delete this file and its subject"
