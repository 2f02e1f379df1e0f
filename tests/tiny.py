"""The smallest configuration that exercises everything: bytes, two layers, a text file named by $JAXLLM_TEST_TEXT."""

import os

from jaxllm.config import DataConfig, LossConfig, ModelConfig, OptimConfig, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig

TEXT = os.environ.get("JAXLLM_TEST_TEXT", "corpus.txt")

model = ModelConfig(
    num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_size=8, ff_width=64, vocab_size=259, max_length=64, residual_dropout=0.1
)

config = TrainConfig(
    name="tiny",
    model=model,
    data=DataConfig(
        sources=(SourceConfig(kind="text", path=TEXT, document="paragraph"),),
        tokenizer=TokenizerConfig(kind="bytes"),
        sequence_length=64,
        batch_size=8,
        held_out_fraction=0.05,
    ),
    loss=LossConfig(z_loss=1e-4, chunk=32),
    optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(kind="constant", warmup_steps=5), ema_decay=0.9),
    num_steps=30,
    save_every=5,
    log_every=1,
    precision="float32",
)
