"""A small Llama-style model on the running Python's own standard library, in a few minutes on two cores.

    make quickstart        # or: jaxllm train configs/quickstart.py

The corpus (about 10 MB of sources, docstrings and language topics) needs no download. Result, 2026-11-21: 2.202 bits per
held-out byte in 3 min 22 s, beside 4.595 for a byte unigram and 3.784 for lzma over the same windows.
"""

from jaxllm.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)

config = TrainConfig(
    name="quickstart",
    model=ModelConfig(num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_size=64, ff_width=704, vocab_size=4096, max_length=512),
    data=DataConfig(
        sources=(SourceConfig(kind="stdlib"),),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=4096),
        sequence_length=256,
        batch_size=8,
    ),
    loss=LossConfig(z_loss=1e-4),
    optim=OptimConfig(lr=4e-3, b2=0.98, schedule=ScheduleConfig(kind="wsd", warmup_steps=20, decay_steps=100, end_ratio=0.05)),
    remat="minimal",
    num_steps=300,
    save_every=100,
)
