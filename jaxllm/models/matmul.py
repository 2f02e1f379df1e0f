"""The `dot` for a CPU with bf16 matrix units: the same einsum, with bf16 operands in the backward pass too.

XLA:CPU hands bf16 operands to its matmul library only where the left one is contracted over its last dimension; any other
product it first casts to float32, which is how plain `einsum` ends up with most of its backward pass in float32. So here a
projection becomes one 2-D product with a backward pass of its own, in which cotangents are bf16 and the left operand of
the weight gradient is transposed by an explicit copy. Read in the compiled program, not timed: `tests/test_matmul.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.contract import Dot, Params, dot_in
from jaxllm.sharding import current_mesh

_PLAIN: Dot = dot_in("bfloat16")


def dot_cpu_bfloat16(name: str, spec: str, x: Array, leaves: Params) -> Array:
    """`einsum(spec, x, leaves['kernel'])` with bf16 operands and float32 accumulation, forward and backward.

    On a mesh the plain einsum, which the partitioner can split.
    """
    kernel = leaves["kernel"]
    shapes = _two_dimensional(spec, x.shape, kernel.shape)
    if current_mesh() is not None or shapes is None:
        return _PLAIN(name, spec, x, leaves)
    (rows, inner), (left, right), contract_last, out_shape = shapes
    return _product(contract_last, x.reshape(rows, inner), kernel.reshape(left, right)).reshape(out_shape)


def _two_dimensional(spec: str, x: tuple[int, ...], kernel: tuple[int, ...]) -> Any:
    """((rows, inner), the kernel's two dimensions, whether it is contracted over its last, output shape).

    None if the einsum is not one product of leading by trailing letters.

    >>> _two_dimensional('BTD,DNH->BTNH', (2, 3, 4), (4, 5, 6))
    ((6, 4), (4, 30), False, (2, 3, 5, 6))
    >>> _two_dimensional('...D,VD->...V', (6, 4), (9, 4))
    ((6, 4), (9, 4), True, (6, 9))
    """
    operands, out = spec.split("->")
    a, b = operands.split(",")
    batch = "".join(chr(ord("a") + i) for i in range(len(x) - len(a.replace("...", ""))))
    a, out = a.replace("...", batch), out.replace("...", batch)
    inner = "".join(letter for letter in a if letter in b and letter not in out)
    free = "".join(letter for letter in b if letter not in inner)
    keep = a[: len(a) - len(inner)]
    if a != keep + inner or out != keep + free or b not in (inner + free, free + inner):
        return None
    size = dict(zip(a + b, x + kernel, strict=True))
    area = lambda letters: math.prod(size[letter] for letter in letters)
    two = (area(inner), area(free)) if b == inner + free else (area(free), area(inner))
    return (area(keep), area(inner)), two, b != inner + free, tuple(size[letter] for letter in out)


def _mm(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _transposed(x: Float[Array, "R C"]) -> Float[Array, "C R"]:
    """x.T as an array of its own; flat behind a barrier, or it becomes a layout that the product is cast for again."""
    rows, columns = x.shape
    if rows % 32 == 0 and columns % 32 == 0:  # in blocks of 32 rows, which is up to twice as fast
        x = lax.optimization_barrier(x.reshape(rows // 32, 32, columns).swapaxes(1, 2).reshape(-1)).reshape(rows // 32, columns, 32)
        return lax.optimization_barrier(x.swapaxes(0, 1).reshape(-1)).reshape(columns, rows)
    return lax.optimization_barrier(x.T.reshape(-1)).reshape(columns, rows)


def _product_impl(contract_last: bool, x: Array, kernel: Array) -> Array:
    return _mm(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), 1, 1 if contract_last else 0)


_product = jax.custom_vjp(_product_impl, nondiff_argnums=(0,))
"""x [rows, inner] · kernel [inner, out], or · kernelᵀ where the kernel is [out, inner]."""


def _product_fwd(contract_last: bool, x: Array, kernel: Array) -> tuple[Array, Any]:
    return _product_impl(contract_last, x, kernel), (x.astype(jnp.bfloat16), kernel, jnp.zeros((0,), x.dtype))


def _product_bwd(contract_last: bool, saved: Any, g: Array) -> tuple[Array, Array]:
    x, kernel, like = saved
    low = g.astype(jnp.bfloat16)
    dx = _mm(low, kernel.astype(jnp.bfloat16), 1, 0 if contract_last else 1)
    d_kernel = _mm(_transposed(low), x, 1, 0) if contract_last else _mm(_transposed(x), low, 1, 0)
    return dx.astype(like.dtype), d_kernel.astype(kernel.dtype)


_product.defvjp(_product_fwd, _product_bwd)
