"""Tables to text: what experiments/lora.py and experiments/prefix_tuning.py tune on.

E2E NLG (1706.09254) and DART (2007.02871), each a table and a sentence; the loss is on the sentence. `python -m tools.fetch e2e-nlg`
and `dart` bring them. `small` starts from configs/base.py, `real` from SmolLM2-135M.
"""

from __future__ import annotations

from dataclasses import replace

from configs import base
from configs.models import smollm2_135m
from jaxllm.config import DataConfig, OptimConfig, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig


def pairs(path: str) -> SourceConfig:
    """Prompts with completions, as `tools.fetch` writes them."""
    return SourceConfig(kind="jsonl", path=path, prompt_field="prompt", field="completion", loss_on="completion")


TRAIN = "cache://data/e2e-nlg/train.jsonl"
E2E = DataConfig(
    sources=(pairs(TRAIN),),
    held_out=(pairs("cache://data/e2e-nlg/dev_pairs.jsonl"),),
    tokenizer=TokenizerConfig(path="cache://models/base-small/tokenizer"),
    sequence_length=256,
    batch_size=8,
)
DART = replace(E2E, sources=(pairs("cache://data/dart/train.jsonl"),), held_out=(pairs("cache://data/dart/dev_pairs.jsonl"),))
OPTIM = OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="linear", warmup_steps=10, end_ratio=0.0), weight_decay=0.01, b2=0.999)

small = replace(
    base.config, name="table-small", data=E2E, optim=OPTIM, init_from="cache://models/base-small",
    num_steps=110, run_dir="", save_every=110, eval_batches=24,
)  # fmt: skip

real = replace(
    small, name="table-real", model=smollm2_135m, init_from=base.smollm2.init_from,
    data=replace(E2E, tokenizer=base.smollm2.data.tokenizer, batch_size=2), num_steps=400, save_every=100, remat="minimal",
)  # fmt: skip

debug: TrainConfig = replace(base.debug, name="table-debug", optim=OPTIM, num_steps=20)
"""Seconds, and needs nothing but Python: a byte model of the standard library, tuned to more of it."""
