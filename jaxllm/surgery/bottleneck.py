"""Adapter layers: a small MLP behind a projection's output, with a residual connection. The baseline that LoRA is compared with.

    y ← y + gelu(y·down)·up           down [D R], up [R D], up = 0 at the start

behind attention's `o` and the MLP's `down` (Houlsby), or behind `down` alone (Pfeiffer, Lin). As leaves beside the kernel:
layers/attention/o/{kernel, adapter_down [L D R], adapter_up [L R D]}. Nothing folds them into the kernel, so decoding pays for them.

Source: arXiv:1902.00751 section 2.1; arXiv:2106.09685 section 5.1 (Adapter-H, Adapter-L).
Letters: L layers, D width, R the MLP's width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm import tree
from jaxllm.config import BottleneckConfig, ConfigError, nearest
from jaxllm.contract import LM, Dot, Params

LEAVES = r"(.*/)?adapter_(down|up)"
"""What adapter layers add to the params."""
TRAIN_ONLY_ADAPTERS = ((LEAVES, False), (r".*_norm/(scale|bias)", False), (r".*", True))
"""`optim.freeze`: adapter layers and norms train, as in the paper."""
SITES = ("attention/o", "mlp/down", "cross_attention/o")


def bottleneck_dot(inner: Dot, plain: Dot) -> Dot:
    """`inner`, and the small MLP behind it where a projection has one."""

    def dot(name: str, spec: str, x: Array, leaves: Params) -> Array:
        y = inner(name, spec, x, leaves)
        if "adapter_down" not in leaves:
            return y
        hidden = jax.nn.gelu(plain(name, "BTD,DR->BTR", y.astype(x.dtype), {"kernel": leaves["adapter_down"]}))
        return y + plain(name, "BTR,RD->BTD", hidden.astype(x.dtype), {"kernel": leaves["adapter_up"]})

    return dot


def with_bottlenecks(lm: LM, config: BottleneckConfig) -> LM:
    """`lm`, which was built with `bottleneck_dot`, with adapter layers in its params; its outputs are those of `lm` at the start.

    Raises:
      ConfigError: a site that is none, or not in the model.
    """
    model = lm.config
    for site in config.sites:
        if site not in SITES or (site.startswith("cross") and not model.cross_attention):
            raise ConfigError(f"bottleneck.sites has '{site}'{nearest(site, SITES) or ';'} sites: {', '.join(SITES)}")

    def init(key: Array) -> Params:
        key, own = jax.random.split(key)
        shape = (model.num_layers, model.width, config.size)
        pairs = []
        for i, site in enumerate(config.sites):
            down = jax.random.normal(jax.random.fold_in(own, i), shape) * 0.01
            pairs += [(f"layers/{site}/adapter_down", down), (f"layers/{site}/adapter_up", jnp.zeros((shape[0], shape[2], shape[1])))]
        return tree.merge(lm.init(key), tree.from_items(pairs))

    return lm._replace(init=init)
