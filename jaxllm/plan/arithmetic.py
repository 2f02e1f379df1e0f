"""What a step holds and sends, by arithmetic: for machines whose compiler is not here, and to prune a search before compiling.

Modelled, not compiled. It is the step of `jaxllm/step.py` under fully sharded data parallel over (slice, data) and tensor parallel over
`model`: weights are gathered layer by layer over `data`, a layer's gradient is reduced and scattered over it once it is there, block
boundaries lie sharded over `model`, and each branch of a block gathers before and reduces and scatters after.

Letters: b rows of a micro-batch on one chip, T tokens of a row, m shards over `model`, others as in `models/transformer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.contract import Params
from jaxllm.flops import REMAT, Part, layer_params
from jaxllm.plan.links import Collective
from jaxllm.step import TrainState

ACTIVATION_BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "bfloat16_matmul": (4, 2)}
"""precision -> bytes of (an activation, a matmul's operand), as `models.transformer.PRECISIONS`. Products leave in float32."""


PARAMETERS = "parameters"


@dataclass(frozen=True)
class Buffer:
    """Memory of one chip."""

    name: str
    num_bytes: int
    why: str = ""
    """The arithmetic, or the code that makes it."""


@dataclass(frozen=True)
class _Sizes:
    """A configuration on a mesh, in numbers."""

    model: ModelConfig
    rows: int
    """b."""
    length: int
    """T."""
    mesh: Mapping[str, int]
    activation: int
    """Bytes."""
    operand: int
    """Bytes."""

    @property
    def tokens(self) -> int:
        """b · T."""
        return self.rows * self.length

    def cut(self, size: int, axis: str = "model") -> int:
        """What one shard has of a dimension; all of it where the axis does not divide."""
        return size // self.mesh[axis] if size % self.mesh[axis] == 0 else size

    @property
    def vocab(self) -> int:
        """V of one shard, padded."""
        return -(-self.model.vocab_size // self.mesh["model"])


def _sizes(config: TrainConfig, mesh: Mapping[str, int], precision: str) -> _Sizes:
    rows = config.data.batch_size // (config.optim.num_microbatches * mesh["slice"] * mesh["data"])
    activation, operand = ACTIVATION_BYTES[precision]
    return _Sizes(config.model, max(rows, 1), config.data.sequence_length, mesh, activation, operand)


# --------------------------------------------------------------------------------------------- memory


def shard_bytes(tree: Any) -> int:
    """Bytes that one chip holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_buffers(state: TrainState, frozen: Params) -> list[Buffer]:
    """What lies in memory between steps: exact, from the shapes and their shardings."""
    rest = (state.step, state.loss_state, state.key)
    return [
        Buffer(PARAMETERS, shard_bytes(state.trainable), "float32 masters"),
        Buffer("optimizer", shard_bytes((state.opt_state, rest)), "moments and counters"),
        *([Buffer("moving average", shard_bytes(state.ema))] if state.ema is not None else []),
        *([Buffer("frozen weights", shard_bytes(frozen))] if frozen else []),
    ]


def memory(
    config: TrainConfig, mesh: Mapping[str, int], precision: str, state: Sequence[Buffer], *, dense_attention: bool = False
) -> list[Buffer]:
    """What one chip holds at the peak of a step, `state` first.

    Temporaries were between 0.7 and 1.5 times what XLA:CPU reserves for nine small programs on eight devices
    (`tests/test_plan_memory.py` repeats one like them).

    Args:
      mesh: slice, data, model -> size.
      precision: a key of `ACTIVATION_BYTES`.
      state: of `state_buffers`.
      dense_attention: whether T × T scores exist (on CPU they do, under a fused kernel they do not).
    """
    s = _sizes(config, mesh, precision)
    model, tokens = s.model, s.tokens
    gradients = next(buffer.num_bytes for buffer in state if buffer.name == PARAMETERS)
    twice = 2 if config.optim.num_microbatches > 1 else 1
    saved = model.num_layers * saved_bytes(s, config.remat)
    layer = layer_params(model) // mesh["model"]
    scores = (4 + s.operand) * s.rows * s.cut(model.num_heads) * s.length**2 if dense_attention else 0
    inside = 2 * _all_of_a_layer(s) + scores
    layers = 2 * layer * s.operand + 4 * layer + inside
    chunk = min(config.loss.chunk, s.length)
    logits = 3 * 4 * s.rows * chunk * s.vocab
    head = s.vocab * model.width * (s.operand + 2 * 4) + 2 * tokens * model.width * s.activation + logits
    look_up = s.vocab * model.width * 2 * 4 + tokens * model.width * 4
    phases = {
        "one layer": (
            layers,
            f"two layers' weights gathered, one layer's gradient, its activations and their gradients, {tokens:,} tokens",
        ),
        "logits": (head, f"the head gathered, its float32 gradient, {s.rows} × {chunk} × {s.vocab:,} logits three times"),
        "embedding": (look_up, "the table gathered in float32, and its gradient"),
    }
    most = max(phases, key=lambda name: phases[name][0])
    return [
        *state,
        Buffer("gradients", gradients * twice, "float32" + (", the sum and a micro-batch's" if twice > 1 else "")),
        Buffer("saved activations", saved, f"remat {config.remat}: {model.num_layers} layers × {tokens:,} tokens"),
        Buffer(f"working set: {most}", *phases[most]),
    ]


def on_mesh(state: Sequence[Buffer], mesh: Mapping[str, int]) -> list[Buffer]:
    """The state of one chip, from that of a mesh of one: an even share of a slice's chips."""
    return [replace(buffer, num_bytes=-(-buffer.num_bytes // (mesh["data"] * mesh["model"]))) for buffer in state]


def saved_bytes(s: _Sizes, remat: str) -> int:
    """Of one layer, from its forward to its backward pass; what is kept in the host's memory is no chip's."""
    model, kept = s.model, REMAT[remat].on_device
    if "everything" in kept:
        return _all_of_a_layer(s)
    heads = s.cut(model.num_heads) * model.head_size
    keys = s.cut(model.num_kv_heads) * model.head_size
    # Products are kept as they leave the accumulator. The sum of a parallel block is read by nobody.
    width = 0 if model.block == "parallel" else s.cut(model.width)
    products = 4 * (heads + 2 * keys + width + (2 if model.gated else 1) * s.cut(model.ff_width))
    sizes: dict[Part, int] = {"input": s.cut(model.width) * s.activation, "projections": products, "attention": heads * s.activation}
    return s.tokens * sum(sizes[part] for part in kept)


def _all_of_a_layer(s: _Sizes) -> int:
    """Activations of one layer that its backward pass reads, with nothing recomputed."""
    model = s.model
    norms = 1 if model.block == "parallel" and model.parallel_norms == 1 else 2
    around = norms * (4 + s.activation) * model.width  # a norm's input in float32, and its output
    heads = (2 * s.cut(model.num_heads) + 2 * s.cut(model.num_kv_heads)) * model.head_size * s.activation
    hidden = (3 if model.gated else 2) * s.cut(model.ff_width) * s.activation
    return s.tokens * (around + heads + hidden)


# ---------------------------------------------------------------------------------------- collectives


def collectives(config: TrainConfig, mesh: Mapping[str, int], precision: str, num_params: int) -> list[Collective]:
    """Every large exchange of one step.

    Args:
      num_params: trained parameters, all of them.
    """
    s = _sizes(config, mesh, precision)
    model, micro, depth = s.model, config.optim.num_microbatches, s.model.num_layers
    m = mesh["model"]
    found: list[Collective] = []
    if mesh["data"] > 1:
        layer, head = layer_params(model) / m, s.vocab * model.width
        passes = 1 if config.remat == "none" else 2
        found += [
            Collective("all-gather", ("data",), layer * s.operand, micro * depth * passes, "weights of a layer, forward and backward"),
            Collective("reduce-scatter", ("data",), layer * 4, micro * depth, "gradient of a layer, float32"),
            Collective("all-gather", ("data",), head * s.operand, micro, "weights of the output head"),
            Collective("reduce-scatter", ("data",), head * 4, micro, "gradient of the output head, float32"),
            Collective("all-gather", ("data",), head * 4, micro, "embedding table"),
            Collective("reduce-scatter", ("data",), head * 4, micro, "gradient of the embedding table"),
        ]
    if mesh["slice"] > 1:
        shard = 4 * num_params / (m * mesh["data"])
        found.append(Collective("all-reduce", ("slice",), shard, micro, "gradient shard, float32"))
    if m > 1:
        stream = s.tokens * model.width * s.activation
        branches = 1 if model.block == "parallel" else 2
        forward = branches * depth * micro
        again = 0 if config.remat == "none" else 1
        found += [
            Collective("all-gather", ("model",), stream, forward * (2 + again), "input of a branch, and its gradient"),
            Collective("reduce-scatter", ("model",), stream, forward * (2 + again), "output of a branch, and its gradient"),
            Collective("reduce-scatter", ("model",), s.tokens * model.width * 4, micro, "looked-up embeddings"),
            Collective("all-gather", ("model",), stream, micro, "hidden states before the output head"),
        ]
    return found


def group_size(collective: Collective, mesh: Mapping[str, int]) -> int:
    """Members of one group."""
    return collective.group or math.prod(mesh[axis] for axis in collective.axes)
