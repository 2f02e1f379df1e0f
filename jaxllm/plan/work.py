"""Floating-point work of a program, counted on its jaxpr: loops as often as they run, kernels by a formula, shards as many as there are.

XLA's own `cost_analysis` counts the body of a loop once and sees nothing of a kernel. A jaxpr has every `scan` with its length:

    dot_general, convolution     2 · multiply-adds, exactly
    scan, while                  body · length; a `while` whose length the program does not show counts once, and is named
    cond                         its most expensive branch; named where branches differ
    shard_map                    body · number of shards
    a Pallas kernel              its body · its grid, every branch taken; or a formula that the caller gives for its name
    anything else                one operation for each element made (reductions: read), kept apart from products

What is counted is what JAX traced: `jax.checkpoint` has its recomputation in it, nothing unused is left, and XLA may still merge
equal products. Any program of any recent JAX will do; only names of primitives and of their parameters are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import Literal
from jax.interpreters import partial_eval

from jaxllm.plan import traffic
from jaxllm.plan.kernels import Equation, Formula, kernel_name
from jaxllm.plan.traffic import Value

type Jaxpr = Any
"""`jax.extend.core.Jaxpr`, or a closed one."""


@dataclass(frozen=True)
class Work:
    """What one run of a program does, on all chips together unless said otherwise."""

    product_flops: int = 0
    """dot_general and convolutions of the program itself."""
    kernel_flops: int = 0
    """Products inside hand-written kernels."""
    other_flops: int = 0
    """Everything else: no part of what a chip's peak speaks of."""
    recomputed_flops: int = 0
    """Of `flops`, what `jax.checkpoint` does a second time."""
    hbm_bytes: float = 0.0
    """Through the memory of one chip, as `traffic` models it."""
    notes: tuple[str, ...] = ()
    """Where the count is a bound or a guess."""

    @property
    def flops(self) -> int:
        """All products: what MFU and HFU speak of."""
        return self.product_flops + self.kernel_flops

    def __add__(self, other: Work) -> Work:
        return Work(
            self.product_flops + other.product_flops,
            self.kernel_flops + other.kernel_flops,
            self.other_flops + other.other_flops,
            self.recomputed_flops + other.recomputed_flops,
            self.hbm_bytes + other.hbm_bytes,
            tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def times(self, number: int) -> Work:
        """`number` runs."""
        return Work(
            self.product_flops * number,
            self.kernel_flops * number,
            self.other_flops * number,
            self.recomputed_flops * number,
            self.hbm_bytes * number,
            self.notes,
        )


@dataclass(frozen=True)
class _Where:
    """What a walk knows besides the jaxpr."""

    kernels: Mapping[str, Formula]
    mesh: Mapping[str, int]
    batch_axes: tuple[str, ...]
    stands_for_kernel: str
    constants: Sequence[Any] = ()
    """What is known of the operands of the present equation, or of the arguments of the present level: arrays, or None."""
    scope: str = ""
    """JAX's names of what surrounds the present level: flax modules, named scopes, transformations."""
    manual: frozenset[str] = frozenset()
    """Axes that a surrounding `shard_map` took: inside, values are what one shard has."""

    @property
    def is_kernel(self) -> bool:
        """Whether a kernel will run in the place of what is here."""
        return bool(self.stands_for_kernel) and re.fullmatch(self.stands_for_kernel, self.scope) is not None

    @property
    def shards(self) -> traffic.Shards:
        """Over how many chips the values of this level are spread."""
        free = {name: size for name, size in self.mesh.items() if name not in self.manual}
        return traffic.Shards(math.prod(free.values()), math.prod(size for name, size in free.items() if name in self.batch_axes))


def count(
    jaxpr: Jaxpr,
    *,
    kernels: Mapping[str, Formula] | None = None,
    from_batch: Sequence[bool] | None = None,
    mesh: Mapping[str, int] | None = None,
    batch_axes: Sequence[str] = ("data", "slice"),
    stands_for_kernel: str = "",
) -> Work:
    """The work of one call of a traced program.

    Args:
      jaxpr: of `jax.make_jaxpr(f)(*args)`, or `jax.jit(f).trace(*args).jaxpr`.
      kernels: pattern of a kernel's or primitive's whole name -> formula, first match wins; see `kernels.attention`.
      from_batch: for each flat argument, whether it is data. For `hbm_bytes` only; None: no argument is.
      mesh: axis -> size. For `hbm_bytes` only; None: one chip.
      batch_axes: axes that divide the batch, and not the weights that a product reads.
      stands_for_kernel: pattern of the scope (flax modules and named scopes, joined by '/') of loops and shards in whose place a
        kernel will run. For `hbm_bytes` only, which then leaves out what passes inside them.

    >>> import jax, jax.numpy as jnp
    >>> layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> count(jax.make_jaxpr(layers)(jnp.ones((4, 8)), jnp.ones((3, 8, 8)))).flops == 3 * 2 * 4 * 8 * 8
    True
    """
    body = _open(jaxpr)
    constants = dict(zip(body.constvars, jaxpr.consts, strict=True))
    body, used = partial_eval.dce_jaxpr(body, [True] * len(body.outvars))
    flags = [False] * len(used) if from_batch is None else list(from_batch)
    if len(flags) != len(used):
        raise ValueError(f"the program has {len(used)} arguments, and from_batch has {len(flags)}")
    where = _Where(kernels or {}, mesh or {}, tuple(batch_axes), stands_for_kernel)
    return _walk(body, [flag for flag, use in zip(flags, used, strict=True) if use], where, constants)[0]


# ------------------------------------------------------------------------------------------ the walk


def _walk(jaxpr: Jaxpr, flags: Sequence[bool], where: _Where, constants: Mapping[Any, Any] | None = None) -> tuple[Work, list[bool]]:
    """(work of one run, which results depend on the batch). `flags`: which arguments do. `constants`: of this level, by variable."""
    total = Work()
    ops: list[traffic.Op] = []

    def run(closed: Jaxpr, arguments: Sequence[Value | None], where: _Where) -> list[Value | None]:
        """Go through the equations, calls inlined; the values of the results."""
        nonlocal total
        jaxpr = _open(closed)
        values: dict[Any, Value | None] = dict(zip(jaxpr.invars, arguments, strict=True))
        written = dict(constants or {}) | dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False))
        values.update((var, _value(var, constant=written.get(var))) for var in jaxpr.constvars)
        look = lambda atom: _literal(atom) if isinstance(atom, Literal) else values[atom]
        for equation in jaxpr.eqns:
            reads = [look(atom) for atom in equation.invars]
            known = [None if value is None else value.constant for value in reads]
            here = replace(where, scope=f"{where.scope}/{equation.source_info.name_stack}", constants=known)
            inner = _inlined(equation)
            if inner is not None:
                values.update(zip(equation.outvars, run(inner, reads, here), strict=True))
                continue
            work, depends = _equation(equation, [value is not None and value.from_batch for value in reads], here)
            is_kernel = here.is_kernel and equation.primitive.name in traffic.LOOPS
            if is_kernel:
                work = replace(work, hbm_bytes=0.0)
            same = known if equation.primitive.name in _SAME else [None] * len(depends)
            makes = [_value(var, flag, constant) for var, flag, constant in zip(equation.outvars, depends, same, strict=True)]
            values.update(zip(equation.outvars, makes, strict=True))
            ops.append(traffic.Op(equation, reads, makes, is_kernel))
            total = total + work
        return [look(atom) for atom in jaxpr.outvars]

    known = where.constants if len(where.constants) == len(jaxpr.invars) else [None] * len(jaxpr.invars)
    arguments = [_value(var, flag, constant) for var, flag, constant in zip(jaxpr.invars, flags, known, strict=True)]
    results = run(jaxpr, arguments, where)
    num_bytes = traffic.num_bytes(ops, results, where.shards)
    return replace(total, hbm_bytes=total.hbm_bytes + num_bytes), [value is not None and value.from_batch for value in results]


def _value(var: Any, from_batch: bool = False, constant: Any = None) -> Value:
    shape = getattr(var.aval, "shape", ())
    dtype = getattr(var.aval, "dtype", None)
    return Value(math.prod(_sizes(shape)) * getattr(dtype, "itemsize", 0), from_batch, constant)


def _literal(atom: Any) -> Value | None:
    """An array that is written into an equation; a number is no array."""
    return _value(atom, constant=atom.val) if getattr(atom.aval, "shape", ()) else None


def _sizes(shape: Sequence[Any]) -> Iterator[int]:
    """Dimensions as numbers; one that is only known when running counts 1."""
    return (size if isinstance(size, int) else 1 for size in shape)


def _open(jaxpr: Jaxpr) -> Jaxpr:
    """Without its constants, if it is closed."""
    return getattr(jaxpr, "jaxpr", jaxpr)


_SAME = frozenset({"sharding_constraint", "layout_constraint", "reshard", "copy", "optimization_barrier"})
"""Primitives whose results are their operands, one by one: a constant stays one."""

_CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "call", "xla_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin", "eval_jaxpr",
})  # fmt: skip


def _inlined(equation: Equation) -> Jaxpr | None:
    """The body of a call, which a compiler puts in the call's place."""
    if equation.primitive.name not in _CALLS:
        return None
    found = (equation.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    body = next((value for value in found if value is not None), None)
    return body if body is not None and len(_open(body).invars) == len(equation.invars) else None


def _equation(equation: Equation, flags: list[bool], where: _Where) -> tuple[Work, list[bool]]:
    """(work, which results depend on the batch) of one equation."""
    work, depends = _any_equation(equation, flags, where)
    if _REMAT in where.scope and equation.primitive.name not in traffic.LOOPS:
        work = replace(work, recomputed_flops=work.flops)
    return work, depends


_REMAT = "rematted_computation"
"""JAX's name of the scope of what `jax.checkpoint` computes again."""


def _any_equation(equation: Equation, flags: list[bool], where: _Where) -> tuple[Work, list[bool]]:
    name, depends = equation.primitive.name, [any(flags)] * len(equation.outvars)
    formula = next((f for pattern, f in where.kernels.items() if re.fullmatch(pattern, kernel_name(equation))), None)
    if name == "pallas_call" or formula is not None:
        return _kernel(equation, formula, where), depends
    if name == "scan":
        return _scan(equation, flags, where)
    if name == "while":
        return _while(equation, flags, where), depends
    if name == "cond":
        return _cond(equation, flags, where)
    if name == "shard_map":
        return _shard_map(equation, flags, where)
    if name == "dot_general":
        return Work(product_flops=_dot_flops(equation)), depends
    if name == "conv_general_dilated":
        return Work(product_flops=_conv_flops(equation)), depends
    bodies = [] if name in _WITH_SCALAR_BODY else list(_bodies(equation))
    if bodies:
        total = Work(notes=(f"{name} is entered once",))
        for body in bodies:
            total = total + replace(_walk(body, [any(flags)] * len(body.invars), replace(where, constants=()))[0], hbm_bytes=0.0)
        return total, depends
    notes = (f"{name} is a kernel without a formula: its work is not in the count",) if name in _OPAQUE else ()
    return Work(other_flops=_other_flops(equation), notes=notes), depends


# --------------------------------------------------------------------------------- loops and branches


def _scan(equation: Equation, flags: list[bool], where: _Where) -> tuple[Work, list[bool]]:
    body, length = _open(equation.params["jaxpr"]), equation.params["length"]
    num_consts, num_carry = _scan_arguments(equation)
    carried = flags[num_consts : num_consts + num_carry]
    where = replace(where, constants=[*where.constants[:num_consts], *[None] * (len(flags) - num_consts)])
    while True:  # until a carry that comes to depend on the batch is seen to
        work, made = _walk(body, [*flags[:num_consts], *carried, *flags[num_consts + num_carry :]], where)
        after = [a or b for a, b in zip(carried, made[:num_carry], strict=True)]
        if after == carried:
            return work.times(length), [*carried, *made[num_carry:]]
        carried = after


def _scan_arguments(equation: Equation) -> tuple[int, int]:
    """(number of constants, of carries). JAX 0.12 keeps them in a tree of the arguments, as older ones did in numbers."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _while(equation: Equation, flags: list[bool], where: _Where) -> Work:
    params = equation.params
    body, test = _open(params["body_jaxpr"]), _open(params["cond_jaxpr"])
    where = replace(where, constants=())
    work = _walk(body, [any(flags)] * len(body.invars), where)[0] + _walk(test, [any(flags)] * len(test.invars), where)[0]
    trips = _trips(equation)
    if trips is not None:
        return work.times(trips)
    return work + Work(notes=("a while loop of unknown length is counted as one run of its body",)) if work.flops else work


def _trips(equation: Equation) -> int | None:
    """How often a `while` runs whose counter starts at a written number, goes up by one and is compared with another; else None."""
    params = equation.params
    test, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    skip_test, skip_body = params["cond_nconsts"], params["body_nconsts"]
    if len(test.eqns) != 1 or test.eqns[0].primitive.name not in ("lt", "le"):
        return None
    left, right = test.eqns[0].invars
    if not isinstance(right, Literal) or left not in test.invars[skip_test:]:
        return None
    index = test.invars[skip_test:].index(left)
    start = equation.invars[skip_test + skip_body + index]
    made = body.outvars[index]
    step = next((e for e in body.eqns if made in e.outvars and e.primitive.name == "add"), None)
    one_up = step is not None and body.invars[skip_body + index] in step.invars
    one_up = one_up and any(isinstance(atom, Literal) and atom.val == 1 for atom in step.invars)  # type: ignore[union-attr]
    if not one_up or not isinstance(start, Literal):
        return None
    return max(int(right.val) - int(start.val) + (test.eqns[0].primitive.name == "le"), 0)


def _cond(equation: Equation, flags: list[bool], where: _Where) -> tuple[Work, list[bool]]:
    where = replace(where, constants=where.constants[1:])
    branches = [_walk(_open(branch), flags[1:], where) for branch in equation.params["branches"]]
    most = max((work for work, _ in branches), key=lambda work: (work.flops, work.other_flops))
    notes = ("a branch counts as its most expensive side",) if len({work.flops for work, _ in branches}) > 1 else ()
    depends = [any(column) or flags[0] for column in zip(*(made for _, made in branches), strict=True)]
    return most + Work(notes=notes), depends


def _shard_map(equation: Equation, flags: list[bool], where: _Where) -> tuple[Work, list[bool]]:
    params = equation.params
    axes = params.get("newly_manual_axes") or params.get("manual_axes")
    if axes is None:
        axes = frozenset(params["mesh"].axis_names) - frozenset(params.get("auto", ()))
    shards = math.prod(params["mesh"].shape[name] for name in axes)
    work, made = _walk(_open(params["jaxpr"]), flags, replace(where, manual=where.manual | frozenset(axes)))
    return replace(work.times(shards), hbm_bytes=work.hbm_bytes), made


# -------------------------------------------------------------------------------------------- kernels


def _kernel(equation: Equation, formula: Formula | None, where: _Where) -> Work:
    """A formula's work, else that of the body on every point of the grid."""
    flops, notes = 0, []
    if equation.primitive.name == "pallas_call":
        body = _open(equation.params["jaxpr"])
        once = _walk(body, [False] * len(body.invars), replace(where, kernels={}, constants=()))[0]
        grid = equation.params["grid_mapping"].grid
        flops = once.flops * math.prod(_sizes(grid))
        if any(not isinstance(size, int) for size in grid):
            notes.append("has a grid whose size the program does not show, counted as 1")
        notes += [note for note in once.notes if once.flops]
    if formula is not None:
        return Work(kernel_flops=formula(equation, flops, where.constants))
    return Work(kernel_flops=flops, notes=tuple(f"kernel {kernel_name(equation)}: {note}" for note in notes))


# ---------------------------------------------------------------------------------------- primitives

_OPAQUE = frozenset({"custom_call", "ffi_call", "tpu_custom_call", "cudnn_fusion", "triton_kernel_call", "mpmd_map"}) | frozenset(
    f"dot_product_attention_{way}{kind}" for way in ("fwd", "bwd") for kind in ("", "_wrapper")
)

_WITH_SCALAR_BODY = traffic.SCATTERS | {"reduce", "reduce_window", "reduce_and", "sort", "select_and_scatter", "custom_root"}
"""Primitives whose parameters hold the function of two elements that they apply."""


def _bodies(equation: Equation) -> Iterator[Jaxpr]:
    """Programs inside an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(item), "eqns"):
                yield _open(item)


def _dot_flops(equation: Equation) -> int:
    """2 · elements made · elements summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _conv_flops(equation: Equation) -> int:
    """2 · elements made · kernel elements that each reads (padding counts)."""
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    out_features = kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // (out_features or 1)


def _other_flops(equation: Equation) -> int:
    """One operation for each element made; a reduction or a scan along an axis: read."""
    name = equation.primitive.name
    if name in traffic.FREE or name in _MOVES:
        return 0
    atoms = equation.invars if name.startswith(("reduce_", "arg", "cum")) else equation.outvars
    return max((math.prod(_sizes(getattr(atom.aval, "shape", ()))) for atom in atoms), default=0)


_MOVES = frozenset({
    "gather", "concatenate", "pad", "dynamic_update_slice", "split", "select_n", "get", "swap", "masked_load", "masked_swap",
    "all_gather", "all_gather_invariant", "all_to_all", "ppermute", "program_id", "num_programs", "empty", "empty2",
})  # fmt: skip
