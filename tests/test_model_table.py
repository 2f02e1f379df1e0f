"""configs/models.py: every row has the published number of parameters, counted twice, by two roads."""

from __future__ import annotations

import jax
import pytest

from configs import models
from configs.models import PUBLISHED, Published
from jaxllm import tree
from jaxllm.config import ModelConfig
from jaxllm.models.transformer import decoder

ROWS = {row.name: row for row in PUBLISHED}


def agrees(row: Published, count: int) -> bool:
    """Whether `count` is the published number, to the last digit that was published."""
    return count == row.num_params if row.last_digit == 1 else abs(count - row.num_params) < row.last_digit


def closed_form(c: ModelConfig) -> int:
    """Parameters of a decoder from its sizes alone: nothing here looks at the model or its tree."""
    queries, keys = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    norm = c.width * (2 if c.norm_bias else 1)

    attention = c.width * queries + 2 * c.width * keys + queries * c.width
    attention += (queries + 2 * keys) * c.qkv_bias + c.width * c.attention_out_bias
    attention += {"none": 0, "head": 2 * c.head_size, "full": queries + keys}[c.qk_norm]

    num_up = 2 if c.activation in ("swiglu", "geglu", "geglu_tanh", "reglu2") else 1
    mlp = (num_up + 1) * c.width * c.ff_width + (num_up * c.ff_width + c.width) * c.mlp_bias

    num_norms: int = c.parallel_norms if c.block == "parallel" else 2
    if c.norm_placement == "both":
        num_norms *= 2

    embeddings = c.vocab_size * c.width * (1 if c.tied_embeddings else 2)
    embeddings += c.max_length * c.width * (c.position == "learned")
    return c.num_layers * (attention + mlp + num_norms * norm) + embeddings + norm * c.final_norm


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_closed_form_gives_the_published_count(row: Published):
    assert agrees(row, closed_form(row.config)), f"{closed_form(row.config):,} of {row.num_params:,}"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_model_has_the_published_count(row: Published):
    count = tree.count(jax.eval_shape(decoder(row.config).init, jax.random.key(0)))
    assert agrees(row, count), f"{count:,} of {row.num_params:,}"
    assert count == closed_form(row.config)


# GPT-3's and PaLM's published counts are rounded; the sizes printed in their papers give exact ones.
GPT3_PRINTED = {  # name: (L, D)
    "gpt3_small": (12, 768), "gpt3_medium": (24, 1024), "gpt3_large": (24, 1536), "gpt3_xl": (24, 2048),
    "gpt3_2_7b": (32, 2560), "gpt3_6_7b": (32, 4096), "gpt3_13b": (40, 5120), "gpt3_175b": (96, 12288),
}  # fmt: skip
PALM_PRINTED = {"palm_8b": (32, 4096, 16), "palm_62b": (64, 8192, 32), "palm_540b": (118, 18432, 48)}  # name: (L, D, N)


@pytest.mark.parametrize("name", GPT3_PRINTED)
def test_gpt3_follows_from_layers_and_width(name: str):
    L, D = GPT3_PRINTED[name]  # 12 D^2 of kernels, 9 D of biases and 4 D of norms in a layer
    assert closed_form(ROWS[name].config) == L * (12 * D**2 + 13 * D) + 50257 * D + 2048 * D + 2 * D


@pytest.mark.parametrize("name", PALM_PRINTED)
def test_palm_follows_from_the_formula_of_its_card(name: str):
    L, D, N = PALM_PRINTED[name]
    H, V = 256, 256_000
    num_norm_scales = (L + 1) * D
    assert closed_form(ROWS[name].config) == L * (2 * D * N * H + 2 * D * H + 12 * D**2) + V * D + num_norm_scales


def rotary_frequencies(c: ModelConfig) -> int:
    return round(c.head_size * c.rope.fraction) // 2


# What the released files hold, where that is more than the parameters.
STORED = {
    "gpt2": (137_022_720, lambda c: c.num_layers * c.max_length**2),  # a causal mask per layer
    "gpt2_xl": (1_607_942_848, lambda c: c.num_layers * c.max_length**2),
    "pythia_160m": (212_654_688, lambda c: c.num_layers * (c.max_length**2 + rotary_frequencies(c))),
    "llama2_7b": (13_476_835_328 // 2, lambda c: c.num_layers * rotary_frequencies(c)),  # total_size of the index, 2 bytes each
    "qwen3_0_6b": (751_632_384, lambda c: c.vocab_size * c.width),  # the tied matrix is stored twice
}


@pytest.mark.parametrize("name", STORED)
def test_counts_leave_out_buffers_and_second_copies(name: str):
    num_stored, extra = STORED[name]
    row = ROWS[name]
    assert row.num_params < num_stored
    assert num_stored - extra(row.config) == row.num_params


def test_every_row_is_published_once_under_its_own_name():
    assert len(ROWS) == len(PUBLISHED)
    assert all(getattr(models, row.name) is row.config for row in PUBLISHED)
    rows = {name for name, value in vars(models).items() if isinstance(value, ModelConfig) and not name.startswith("_")}
    assert rows == set(ROWS)


def test_rows_with_equal_counts_still_differ():
    configs = [row.config for row in PUBLISHED]
    assert len(set(configs)) == len(configs)  # OpenLLaMA-7B and Llama-2-7B have the same count, not the same config


def test_attention_width_is_not_the_models_width_where_the_papers_say_so():
    def attention_width(c: ModelConfig) -> int:
        return c.num_heads * c.head_size

    assert attention_width(models.palm_540b) == 12_288 != models.palm_540b.width == 18_432
    assert {row.name for row in PUBLISHED if attention_width(row.config) != row.config.width} == {
        "palm_540b", "mistral_nemo_12b", "qwen3_0_6b", "gemma3_270m",
    }  # fmt: skip


def test_scales_follow_the_width():
    for config in (models.palm_8b, models.palm_62b, models.palm_540b):
        assert config.logit_scale == config.width**-0.5
        assert config.embedding_scale == 1.0
    assert models.gemma3_270m.embedding_scale == models.gemma3_270m.width**0.5
    assert models.gemma3_270m.logit_scale == 1.0


def test_layer_patterns():
    gpt3, gemma = models.gpt3_175b, models.gemma3_270m
    assert [gpt3.kind(layer).window for layer in range(4)] == [None, models.GPT3_WINDOW, None, models.GPT3_WINDOW]
    assert [layer for layer in range(gemma.num_layers) if gemma.kind(layer).window is None] == [5, 11, 17]
    assert {kind.rope.base for kind in gemma.layer_pattern if kind.rope} == {10_000.0}
    assert gemma.rope.base == 1_000_000.0
