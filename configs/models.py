"""The architecture table: one `ModelConfig` per published model, by family, with its source.

A family is a base, `_family`, that holds what its members share, and one row of sizes per member. The
note above each family says where its values are from and what is peculiar about it; what a note
leaves out has the default of `ModelConfig`: RMSNorm before each branch, no biases, SwiGLU, RoPE with
base 10,000, full causal attention scaled by H^-0.5, tied embeddings, N(0, 0.02) kernels.

L layers, D model width, N query heads, K key/value heads, H head size, F feed-forward width, V
vocabulary, T longest context. H is written out: it is D / N for most models, not for PaLM-540B,
Mistral NeMo, Qwen3 and Gemma 3.

"config.json" is the file of that name in the model's repository on the Hugging Face hub. V is the
number of rows of the released embedding, which may exceed the tokenizer's vocabulary (Pythia, MPT,
Qwen3). `PUBLISHED`, below, holds the parameter counts; a test compares them with the real models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from jaxllm.config import LayerKind, ModelConfig, RopeConfig


def _row(base: ModelConfig, L: int, D: int, N: int, K: int, H: int, F: int, **other: Any) -> ModelConfig:
    """`base` with a row of sizes, and whatever else differs by name."""
    return replace(base, num_layers=L, width=D, num_heads=N, num_kv_heads=K, head_size=H, ff_width=F, **other)


# fmt: off

# ------------------------------------------------------------------------------------------- GPT
# GPT-1: "Improving Language Understanding by Generative Pre-Training" (2018), sections 3.1 and 4.1; config.json of openai-gpt.
#   The norm comes after the residual sum, so there is no final norm. V = 40,000 merges + 478 symbols.
# GPT-2: "Language Models are Unsupervised Multitask Learners" (2019), section 2.3; config.json of gpt2, -medium, -large, -xl.
#   Norm before each branch and a final one. The paper's 117M, 345M, 762M and 1542M are miscounts of the same models.
# GPT-3: arXiv:2005.14165, table 2.1 and section 2.1.
#   GPT-2 with T = 2048 and every second layer banded (arXiv:1904.10509); the band's width is unpublished, GPT3_WINDOW is our choice.
#   Two rows of the table cannot be built as printed: XL has 24 heads of 128 (3,072, not D = 2,048), here 16; 13B has D = 5,140
#   (not 40 x 128), here 5,120. No weights and no dropout were published.
# All: LayerNorm with bias, eps 1e-5, biases everywhere, learned positions, tanh GELU, F = 4D, tied, N(0, 0.02) init.
#   GPT-2's positions had std 0.01, and GPT-1 did not scale its residual outputs down; here both follow init = 'normal'.

GPT3_WINDOW = 256
"""Keys that a banded layer of GPT-3 sees."""

_gpt2 = ModelConfig(
    norm="layer", norm_bias=True, norm_eps=1e-5, activation="gelu_tanh", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
    position="learned", vocab_size=50257, max_length=1024, embedding_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1,
    init="normal", init_std=0.02,
)
_gpt1 = replace(_gpt2, norm_placement="after_residual", final_norm=False, vocab_size=40478, max_length=512)
_gpt3 = replace(
    _gpt2, max_length=2048, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0,
    layer_pattern=(LayerKind(), LayerKind(window=GPT3_WINDOW)),
)

#                                      L      D   N   K    H      F
gpt1             = _row(_gpt1,        12,   768, 12, 12,  64,  3072)
gpt2             = _row(_gpt2,        12,   768, 12, 12,  64,  3072)
gpt2_medium      = _row(_gpt2,        24,  1024, 16, 16,  64,  4096)
gpt2_large       = _row(_gpt2,        36,  1280, 20, 20,  64,  5120)
gpt2_xl          = _row(_gpt2,        48,  1600, 25, 25,  64,  6400)
gpt3_small       = _row(_gpt3,        12,   768, 12, 12,  64,  3072)
gpt3_medium      = _row(_gpt3,        24,  1024, 16, 16,  64,  4096)
gpt3_large       = _row(_gpt3,        24,  1536, 16, 16,  96,  6144)
gpt3_xl          = _row(_gpt3,        24,  2048, 16, 16, 128,  8192)
gpt3_2_7b        = _row(_gpt3,        32,  2560, 32, 32,  80, 10240)
gpt3_6_7b        = _row(_gpt3,        32,  4096, 32, 32, 128, 16384)
gpt3_13b         = _row(_gpt3,        40,  5120, 40, 40, 128, 20480)
gpt3_175b        = _row(_gpt3,        96, 12288, 96, 96, 128, 49152)

# ------------------------------------------------------------------------------------------ PaLM
# arXiv:2204.02311, section 2 and table 1. Parallel blocks with one norm: LayerNorm with a scale and no bias; no bias anywhere.
# One key/value head. H = 256 whatever D is: the attention of 540B is 48 x 256 = 12,288 wide, not D = 18,432. F = 4D with three
# matrices. RoPE's base and the norm's eps are not stated: RoPE's own 10,000, and 1e-6 as in T5X. Tied; logits are scaled by
# D^-0.5, the lookup is not. Kernels have std n_in^-0.5 and embeddings N(0, 1).
_palm = ModelConfig(
    norm="layer", norm_bias=False, norm_eps=1e-6, block="parallel", parallel_norms=1, activation="swiglu",
    vocab_size=256_000, max_length=2048, init="fan_in",
)

#                                      L      D   N   K    H      F
palm_8b          = _row(_palm,        32,  4096, 16,  1, 256, 16384, logit_scale=4096**-0.5)
palm_62b         = _row(_palm,        64,  8192, 32,  1, 256, 32768, logit_scale=8192**-0.5)
palm_540b        = _row(_palm,       118, 18432, 48,  1, 256, 73728, logit_scale=18432**-0.5)

# ----------------------------------------------------------------------------------------- LLaMA
# Llama 2: arXiv:2307.09288, table 1 and section 2.2; config.json of meta-llama/Llama-2-*-hf. Untied. Only 70B has fewer K than N.
# OpenLLaMA: github.com/openlm-research/open_llama; LLaMA-1's shape (T = 2048, eps 1e-6, not 1e-5), a tokenizer of its own.
# Llama 3.1: arXiv:2407.21783, table 3; config.json of meta-llama/Llama-3.1-*. RoPE base 500,000, stretched 8 times from 8,192.
# Mistral 7B v0.1: arXiv:2310.06825, table 1; its config.json. Every layer sees a window of 4,096.
# Mistral NeMo: config.json of mistralai/Mistral-Nemo-Base-2407. No window; N H = 4,096 is not D = 5,120.
# SmolLM2: arXiv:2502.02737; config.json of HuggingFaceTB/SmolLM2-135M. Tied; init std D^-0.5 = 1/24.
# stories260k: config and weights of karpathy/tinyllamas, for llama2.c. Tied; F is 8D/3 rounded up to a multiple of 4.
_llama = ModelConfig(norm_eps=1e-5, tied_embeddings=False, vocab_size=32_000, max_length=4096)
_llama3_1 = replace(
    _llama, vocab_size=128_256, max_length=131_072,
    rope=RopeConfig(
        base=500_000.0, scaling="llama3", factor=8.0, original_max_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
)
_mistral = replace(_llama, max_length=32_768, layer_pattern=(LayerKind(window=4096),))
_nemo = replace(_llama, vocab_size=131_072, max_length=128_000, rope=RopeConfig(base=1_000_000.0))
_smollm2 = replace(
    _llama, tied_embeddings=True, vocab_size=49_152, max_length=8192, rope=RopeConfig(base=100_000.0), init_std=1 / 24
)

#                                      L      D   N   K    H      F
llama2_7b        = _row(_llama,       32,  4096, 32, 32, 128, 11008)
llama2_13b       = _row(_llama,       40,  5120, 40, 40, 128, 13824)
llama2_70b       = _row(_llama,       80,  8192, 64,  8, 128, 28672)
openllama_7b     = _row(_llama,       32,  4096, 32, 32, 128, 11008, max_length=2048, norm_eps=1e-6)
llama3_1_8b      = _row(_llama3_1,    32,  4096, 32,  8, 128, 14336)
llama3_1_70b     = _row(_llama3_1,    80,  8192, 64,  8, 128, 28672)
mistral_7b       = _row(_mistral,     32,  4096, 32,  8, 128, 14336)
mistral_nemo_12b = _row(_nemo,        40,  5120, 32,  8, 128, 14336)
smollm2_135m     = _row(_smollm2,     30,   576,  9,  3,  64,  1536)
stories260k      = _row(_llama,        5,    64,  8,  4,   8,   172, vocab_size=512, max_length=512, tied_embeddings=True)

# ----------------------------------------------------------------------------------------- Qwen3
# arXiv:2505.09388, section 2; config.json of Qwen/Qwen3-0.6B. RMSNorm over each head of q and k, before RoPE; H = 128 is not
# D / N = 64; the smaller models are tied.
_qwen3 = ModelConfig(
    norm_eps=1e-6, qk_norm="head", rope=RopeConfig(base=1_000_000.0), vocab_size=151_936, max_length=40_960,
)

#                                      L      D   N   K    H      F
qwen3_0_6b       = _row(_qwen3,       28,  1024, 16,  8, 128,  3072)

# --------------------------------------------------------------------------------------- Gemma 3
# arXiv:2503.19786, section 2; config.json of google/gemma-3-270m. A norm before and one after each branch, all RMSNorm scaled
# by 1 + w, those over each head of q and k too. GeGLU with tanh. Five layers with a window of 512 and RoPE base 10,000, then one
# that sees everything with base 1,000,000. Embeddings are scaled by sqrt(D) after the lookup (as a bfloat16 number, 25.25, when
# the released code runs in bfloat16). Scores are scaled by query_pre_attn_scalar^-0.5, which equals H^-0.5 for this size. Tied.
_gemma3_local = LayerKind(window=512, rope=RopeConfig(base=10_000.0))
_gemma3 = ModelConfig(
    norm_placement="both", norm_plus_one=True, norm_eps=1e-6, qk_norm="head", activation="geglu_tanh",
    rope=RopeConfig(base=1_000_000.0), layer_pattern=(*[_gemma3_local] * 5, LayerKind()), vocab_size=262_144, max_length=32_768,
)

#                                      L      D   N   K    H      F
gemma3_270m      = _row(_gemma3,      18,   640,  4,  1, 256,  2048, embedding_scale=640**0.5, attention_scale=256**-0.5)

# ---------------------------------------------------------------------------------------- Pythia
# arXiv:2304.01373, table 1 and section 2.2; config.json of EleutherAI/pythia-*. GPT-NeoX: parallel blocks with a norm for each
# branch, LayerNorm with bias, biases everywhere but in the output matrix, RoPE on the first quarter of each head, exact GELU,
# untied. V is padded to a multiple of 128 times the tensor-parallel size that trained it, so 6.9b has 50,432 rows.
_pythia = ModelConfig(
    norm="layer", norm_bias=True, norm_eps=1e-5, block="parallel", parallel_norms=2, activation="gelu",
    qkv_bias=True, attention_out_bias=True, mlp_bias=True, rope=RopeConfig(fraction=0.25), tied_embeddings=False,
    vocab_size=50_304, max_length=2048,
)

#                                      L      D   N   K    H      F
pythia_160m      = _row(_pythia,      12,   768, 12, 12,  64,  3072)
pythia_1b        = _row(_pythia,      16,  2048,  8,  8, 256,  8192)
pythia_6_9b      = _row(_pythia,      32,  4096, 32, 32, 128, 16384, vocab_size=50_432)

# ------------------------------------------------------------------------------------------- MPT
# config.json and code of mosaicml/mpt-7b. ALiBi with largest exponent 8 (arXiv:2108.12409) in place of positions, so T is only
# what it was trained on; LayerNorm with a scale and no bias, eps 1e-5, no bias anywhere, exact GELU, tied. Kaiming-normal init,
# std (2 / n_in)^0.5, is here init_std for n_in = D; the down matrix, with n_in = 4D, therefore starts twice as large.
_mpt = ModelConfig(
    norm="layer", norm_bias=False, norm_eps=1e-5, activation="gelu", position="alibi", vocab_size=50_432, max_length=2048,
)

#                                      L      D   N   K    H      F
mpt_7b           = _row(_mpt,         32,  4096, 32, 32, 128, 16384, init_std=(2 / 4096) ** 0.5)

# ------------------------------------------------------------------------------------------ ours
# A two-layer Llama for tests.
#                                      L      D   N   K    H      F
tiny             = _row(_llama,        2,    32,  4,  2,   8,    96, vocab_size=256, max_length=128, tied_embeddings=True)


class Published(NamedTuple):
    """A model's published parameter count."""

    name: str
    """The name of the row above, as on the command line: `configs/models.py:gpt2`."""
    config: ModelConfig
    num_params: int
    """Trainable numbers, each counted once. No buffers (masks, rotary frequencies), no second copy of a tied matrix."""
    last_digit: int
    """What one unit of the last digit that was published is worth; 1 where the count is exact."""
    source: str


_M, _B = 10**6, 10**9

PUBLISHED: tuple[Published, ...] = (
    #         name                config                   num_params  last digit  source
    Published("gpt1",             gpt1,                   116_534_784,         1, "openai-gpt weights"),
    Published("gpt2",             gpt2,                   124_439_808,         1, "gpt2 weights"),
    Published("gpt2_medium",      gpt2_medium,            354_823_168,         1, "gpt2-medium weights"),
    Published("gpt2_large",       gpt2_large,             774_030_080,         1, "gpt2-large weights"),
    Published("gpt2_xl",          gpt2_xl,              1_557_611_200,         1, "gpt2-xl weights"),
    Published("gpt3_small",       gpt3_small,                125 * _M,        _M, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_medium",      gpt3_medium,               350 * _M,   10 * _M, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_large",       gpt3_large,                760 * _M,   10 * _M, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_xl",          gpt3_xl,                 1_300 * _M,  100 * _M, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_2_7b",        gpt3_2_7b,               2_700 * _M,  100 * _M, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_6_7b",        gpt3_6_7b,               6_700 * _M,  100 * _M, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_13b",         gpt3_13b,                   13 * _B,        _B, "arXiv:2005.14165, table 2.1"),
    Published("gpt3_175b",        gpt3_175b,                 175 * _B,        _B, "arXiv:2005.14165, table 2.1"),
    Published("palm_8b",          palm_8b,                 8_630 * _M,   10 * _M, "arXiv:2204.02311, table 1"),
    Published("palm_62b",         palm_62b,               62_500 * _M,   10 * _M, "arXiv:2204.02311, table 1"),
    Published("palm_540b",        palm_540b,             540_350 * _M,   10 * _M, "arXiv:2204.02311, table 1"),
    Published("llama2_7b",        llama2_7b,            6_738_415_616,         1, "meta-llama/Llama-2-7b weights"),
    Published("llama2_13b",       llama2_13b,          13_015_864_320,         1, "meta-llama/Llama-2-13b weights"),
    Published("llama2_70b",       llama2_70b,          68_976_648_192,         1, "meta-llama/Llama-2-70b weights"),
    Published("openllama_7b",     openllama_7b,         6_738_415_616,         1, "openlm-research/open_llama_7b weights"),
    Published("llama3_1_8b",      llama3_1_8b,          8_030_261_248,         1, "meta-llama/Llama-3.1-8B weights"),
    Published("llama3_1_70b",     llama3_1_70b,        70_553_706_496,         1, "meta-llama/Llama-3.1-70B weights"),
    Published("mistral_7b",       mistral_7b,           7_241_732_096,         1, "mistralai/Mistral-7B-v0.1 weights"),
    Published("mistral_nemo_12b", mistral_nemo_12b,    12_247_782_400,         1, "mistralai/Mistral-Nemo-Base-2407 weights"),
    Published("smollm2_135m",     smollm2_135m,           134_515_008,         1, "HuggingFaceTB/SmolLM2-135M weights"),
    Published("stories260k",      stories260k,                260_032,         1, "karpathy/tinyllamas weights"),
    Published("qwen3_0_6b",       qwen3_0_6b,             596_049_920,         1, "Qwen/Qwen3-0.6B weights"),
    Published("gemma3_270m",      gemma3_270m,            268_098_176,         1, "google/gemma-3-270m weights"),
    Published("pythia_160m",      pythia_160m,            162_322_944,         1, "EleutherAI/pythia model cards"),
    Published("pythia_1b",        pythia_1b,            1_011_781_632,         1, "EleutherAI/pythia model cards"),
    Published("pythia_6_9b",      pythia_6_9b,          6_857_302_016,         1, "EleutherAI/pythia model cards"),
    Published("mpt_7b",           mpt_7b,               6_649_286_656,         1, "mosaicml/mpt-7b weights, index total_size / 2"),
    Published("tiny",             tiny,                        32_928,         1, "ours"),
)

# fmt: on
