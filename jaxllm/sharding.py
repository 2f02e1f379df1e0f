"""The device mesh, which dimension of which array lies on which axis, and nothing else.

Mesh axes, slow to fast: `slice` (between pods; data parallel), `data` (fully sharded data parallel),
`model` (tensor parallel). Axis types are Auto: XLA's partitioner propagates shardings between the
constraints that we state; Explicit axes (jax 0.12's default for `make_mesh`) would make every einsum
name its output sharding. Where the partitioner has been seen to do badly (the embedding look-up, the
vocabulary pass) the code says what it wants with `shard_map`.

Params are placed by an ordered `[(path pattern, axes)]`, first match wins; a leaf that no rule
matches is an error. A dimension that its axis does not divide stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import tree
from jaxllm.config import ConfigError, DataConfig, MeshConfig, ModelConfig, OptimConfig, nearest_divisors

AXES = ("slice", "data", "model")
BATCH_AXES = ("data", "slice")
"""Rows lie data-major: with `slice` major, XLA's partitioner (jaxlib 0.12.0) permutes the rows of a product of few tokens with a
weight on `data`, and does not put them back (`test_rows_stay_in_order_through_a_product_with_a_sharded_weight`)."""

type Axes = tuple[str | None, ...]

RULES: tuple[tuple[str, Axes], ...] = (
    (r"(embed/tokens|unembed/kernel)", ("model", "data")),
    (r"embed/positions", (None, "data")),
    (r"layers/(attention|cross_attention)/[qkv]/(kernel|values|scales)", (None, "data", "model", None)),
    (r"layers/(attention|cross_attention)/[qkv]/bias", (None, "model", None)),
    (r"layers/(attention|cross_attention)/o/(kernel|values|scales)", (None, "model", None, "data")),
    (r"layers/mlp/(gate|up)/(kernel|values|scales)", (None, "data", "model")),
    (r"layers/mlp/(gate|up)/bias", (None, "model")),
    (r"layers/mlp/down/(kernel|values|scales)", (None, "model", "data")),
    (r"layers/(attention|cross_attention)/[qkv]/lora_a", (None, "data", None)),
    (r"layers/(attention|cross_attention)/[qkv]/lora_b", (None, None, "model", None)),
    (r"layers/(attention|cross_attention)/[qkv]/lora_m", (None, "model", None)),
    (r"layers/(attention|cross_attention)/o/lora_a", (None, "model", None, None)),
    (r"layers/mlp/(gate|up)/lora_a", (None, "data", None)),
    (r"layers/mlp/(gate|up)/lora_b", (None, None, "model")),
    (r"layers/mlp/(gate|up)/lora_m", (None, "model")),
    (r"layers/mlp/down/lora_a", (None, "model", None)),
    (r"layers/(attention|cross_attention)/o/lora_[bm]|layers/mlp/down/lora_[bm]", ()),
    (r"unembed/lora_a", ()),
    (r"unembed/lora_b", ("model", None)),
    (r".*/adapter_(down|up)", ()),
    (r"prefix/(keys|values)", (None, None, "model", None)),
    (r"prefix/.*", ()),
    (r"projections/kernel", (None, "data", "model")),
    (r".*/(scale|bias)", ()),
)

# Letters of an activation's dimensions that lie on a mesh axis. D is sharded at block boundaries
# only (PaLM's fully sharded activation); inside a block it is written '.', gathered.
_LETTERS: dict[str, tuple[str, ...]] = {
    "B": BATCH_AXES, "D": ("model",), "N": ("model",), "K": ("model",), "F": ("model",), "V": ("model",),
}  # fmt: skip


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `slice × data × model` over `devices` (default: all), laid along the machine's links.

    Raises:
      ConfigError: more devices asked for than there are, or sizes that do not divide them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.slice, config.data, config.model]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % known:
            divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
            raise ConfigError(
                f"mesh (slice, data, model) = {tuple(sizes)} needs a multiple of {known} devices, and there are {len(devices)}; "
                f"sizes that divide {len(devices)}: {', '.join(map(str, divisors))}"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    needed = math.prod(sizes)
    if needed > len(devices):
        raise ConfigError(
            f"mesh (slice, data, model) = {tuple(sizes)} needs {needed} devices, and there are {len(devices)}; "
            "make it smaller, or use --mesh.data -1 for all that there are"
        )
    if needed < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"mesh (slice, data, model) = {tuple(sizes)} uses {needed} of {len(devices)} devices; with several hosts it must use all"
        )
    devices = devices[:needed]
    if sizes[0] > 1 and len({getattr(d, "slice_index", 0) for d in devices}) == sizes[0]:
        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (sizes[0], 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def axis_size(mesh: Mesh | AbstractMesh, axes: Sequence[str] | str | None) -> int:
    """Number of shards over one or several axes; 1 for None."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)


def current_mesh() -> AbstractMesh | None:
    """The mesh of the surrounding `jax.set_mesh`, or None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': that of the surrounding mesh's devices, which may be only described; without a mesh, this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def free_axes(mesh: AbstractMesh) -> set[str]:
    """Axes that the partitioner handles here: all but those that a surrounding `shard_map` took."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}


def in_pieces(length: int) -> bool:
    """Whether a row of `length` tokens can lie in pieces on `model`: there is such an axis here, and it divides the row."""
    mesh = current_mesh()
    shards = axis_size(mesh, "model") if mesh is not None and "model" in free_axes(mesh) else 1
    return shards > 1 and length % shards == 0


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """State how an activation lies on the mesh; the identity without one.

    Args:
      x: any array.
      dims: one token per dimension. A letter B, D, N, K, F or V goes to its usual axes, 'T@model' to the
        axis named, anything else stays whole. An axis that does not divide its dimension is left out.

    >>> constrain(jnp.ones((2, 3)), 'B .').shape
    (2, 3)
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    free = free_axes(mesh)
    spec: list[tuple[str, ...] | None] = []
    for token, size in zip(dims.split(), x.shape, strict=True):
        letter, _, explicit = token.partition("@")
        axes = tuple(a for a in ((explicit,) if explicit else _LETTERS.get(letter, ())) if a in free)
        spec.append(axes if axes and size % axis_size(mesh, axes) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def fit(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """`axes` as a PartitionSpec for an array of `shape`, without the axes that do not divide their dimension."""
    padded = (*axes, *(None,) * (len(shape) - len(axes)))
    return P(*(axis if axis and size % axis_size(mesh, axis) == 0 else None for axis, size in zip(padded, shape, strict=True)))


def param_specs(params: tree.Tree, mesh: Mesh, rules: Sequence[tuple[str, Axes]] = ()) -> tree.Tree:
    """A PartitionSpec for every leaf of `params` (arrays or shapes).

    Args:
      rules: a user's rules, tried before the built-in ones.

    Raises:
      ConfigError: a leaf that no rule matches, a user's pattern that matches no leaf, an unknown axis, or
        more axes than the leaf has dimensions.
    """
    tree.check_rules(rules, params, "mesh.rules")
    for pattern, axes in rules:
        for axis in axes:
            if axis is not None and axis not in AXES:
                raise ConfigError(f"mesh.rules pattern '{pattern}' names the axis '{axis}'; axes are {', '.join(AXES)}")
            if axis is not None and axes.count(axis) > 1:
                raise ConfigError(f"mesh.rules pattern '{pattern}' puts two dimensions on the axis '{axis}'; an axis may be used once")

    def spec(path: str, leaf: Any) -> P:
        axes = tree.match([*rules, *RULES], path)
        if axes is None:
            raise ConfigError(f"no sharding rule matches '{path}' {tuple(leaf.shape)}; add one with mesh.rules")
        if len(axes) > len(leaf.shape):
            raise ConfigError(f"the sharding rule {axes} for '{path}' has more dimensions than its shape {tuple(leaf.shape)}")
        return fit(axes, leaf.shape, mesh)

    return tree.map_with_path(spec, params)


def like_params(state: Any, specs: tree.Tree) -> Any:
    """PartitionSpecs for any pytree that holds copies of params (optimizer state, averages).

    A leaf whose key path ends in a param's path, and whose rank is the same, lies as that param does;
    everything else (counts, factored moments) is replicated.
    """
    by_path = dict(tree.items(specs))

    def spec(keys: tuple[Any, ...], leaf: Any) -> P:
        names = [str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey)]
        for start in range(len(names)):
            found = by_path.get("/".join(names[start:]))
            if found is not None and len(found) == len(leaf.shape):
                return found
        return P()

    return jax.tree_util.tree_map_with_path(spec, state)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """PartitionSpecs to NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


# ---------------------------------------------------------------------------------- vocabulary padding

VOCAB_LEAVES = r"(.*/)?(embed/tokens|unembed/kernel|unembed/lora_b)"


def pad_vocab(params: tree.Tree, multiple: int) -> tree.Tree:
    """Append zero rows to the vocabulary leaves until `multiple` divides them.

    `Unembedding.logits` hides them, no token looks them up, so their gradient is exactly zero.
    """

    def pad(path: str, leaf: jax.Array) -> jax.Array:
        extra = -leaf.shape[0] % multiple if tree.match([(VOCAB_LEAVES, True)], path) else 0
        return jnp.pad(leaf, ((0, extra), (0, 0))) if extra else leaf

    return tree.map_with_path(pad, params)


def trim_vocab(params: tree.Tree, num_vocab: int) -> tree.Tree:
    """The inverse of `pad_vocab`: vocabulary leaves cut back to the logical size."""
    return tree.map_with_path(lambda path, leaf: leaf[:num_vocab] if tree.match([(VOCAB_LEAVES, True)], path) else leaf, params)


# ------------------------------------------------------------------------------------------- checks


def check_batch(data: DataConfig, optim: OptimConfig, mesh: Mesh, updates_per_batch: int = 1) -> int:
    """Rows of a micro-batch = batch_size / updates_per_batch / num_microbatches, which every batch must be made of.

    Raises:
      ConfigError: rows that the data axes do not divide, or a batch (also one of the ramp) that does not divide into
        updates and micro-batches; the message has the nearest sizes that do.
    """
    shards, micro = axis_size(mesh, BATCH_AXES), optim.num_microbatches
    pieces, many = micro * updates_per_batch, updates_per_batch > 1
    if data.batch_size % (pieces * shards):
        raise ConfigError(
            f"a batch of {data.batch_size} rows does not divide into {f'{updates_per_batch} updates of ' if many else ''}{micro} "
            f"micro-batches over {shards} data shards (slice × data = {mesh.shape['slice']} × {mesh.shape['data']}); it must be a "
            f"multiple of {pieces * shards}: {nearest_divisors(data.batch_size, pieces * shards)}"
        )
    rows = data.batch_size // pieces
    unit = rows * updates_per_batch
    for steps, size in data.batch_ramp:
        if steps < 1 or size < 1 or size % unit:
            raise ConfigError(
                f"data.batch_ramp has {steps} steps of {size} rows; a ramp runs fewer micro-batches of the same {rows} rows "
                f"(data.batch_size {data.batch_size} / optim.num_microbatches {micro}"
                f"{f' / {updates_per_batch} updates per batch' if many else ''}), so it must be a multiple of "
                f"{f'{updates_per_batch} × {rows} = {unit}' if many else 'that'}: {nearest_divisors(size, unit)}, or raise "
                "optim.num_microbatches"
            )
    return rows


def check_fit(model: ModelConfig, data: DataConfig, optim: OptimConfig, mesh: Mesh, *, updates_per_batch: int = 1) -> list[str]:
    """Refuse what cannot run on this mesh; return one warning for each thing that runs less sharded than asked.

    Raises:
      ConfigError: a batch that `check_batch` refuses, or a row longer than the model's learned positions.
    """
    check_batch(data, optim, mesh, updates_per_batch)
    if model.position == "learned" and data.sequence_length > model.max_length:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, and the model has learned positions for {model.max_length} tokens; "
            "shorten the rows or raise model.max_length"
        )
    notes: list[str] = []
    shards = mesh.shape["model"]
    if model.num_heads % shards:
        sizes = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        notes.append(
            f"{model.num_heads} query heads do not divide over model = {shards}: attention is not sharded over model "
            f"(sizes that divide: {', '.join(map(str, sizes))})"
        )
    elif model.num_kv_heads % shards:
        notes.append(f"{model.num_kv_heads} key/value heads are replicated over model = {shards}")
    if model.ff_width % shards:
        notes.append(f"ff_width {model.ff_width} does not divide over model = {shards}: the feed-forward layer is not sharded over model")
    if model.width % mesh.shape["data"]:
        notes.append(f"width {model.width} does not divide over data = {mesh.shape['data']}: weights are replicated over data")
    return notes


def host_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Indices of the rows of a global batch that this process's devices hold, in order."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((num_rows,))
    rows = {i for (index,) in filter(None, index_map.values()) for i in range(*index.indices(num_rows))}
    return np.array(sorted(rows), dtype=np.int64)
