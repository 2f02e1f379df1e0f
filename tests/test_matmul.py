"""`dot_in("bfloat16")`: gradients near the exact ones, and really bf16 in every product of the compiled program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.contract import dot_in

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
    ours, exact = (
        jax.value_and_grad(lambda x, k, dot=dot: weigh(dot("site", spec, x, {"kernel": k})), (0, 1))(x, kernel)
        for dot in (dot_in("bfloat16"), dot_in("float32"))
    )
    assert float(ours[0]) == pytest.approx(float(exact[0]), rel=0.05)
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

    plain = lambda name, spec, x, leaves: jnp.einsum(
        spec, x.astype("bfloat16"), leaves["kernel"].astype("bfloat16"), preferred_element_type=jnp.float32
    )
    assert products(dot_in("bfloat16")) == [("bf16", "bf16")] * 3
    assert ("f32", "f32") in products(plain), "JAX's own transposition no longer needs help"
