"""Several teachers with tokenizers of their own, as one for a student: FuseLLM's fusion of stored predictions, on disk.

    documents × teachers: rows of the teacher at the target's positions (`jaxllm.align`), in the target's ids, and of all teachers the
    best (MinCE) or the mean (AvgCE)  ->  shards as `jaxllm teach` writes them, by position in the target's corpora

A teacher comes as what `jaxllm teach` wrote for the same text in its own tokens. A document's teacher is chosen by the cross-entropy of
that document, over the text that all teachers predict: one without bos does not predict its first token, so what lies before the last
of their first predictions counts for none. A teacher that has the target's tokenizer is not aligned: its records pass as they are.

`FuseConfig()` is ours: rows by bytes read, equal ids added up, what is not mapped left in the tail, cross-entropy per byte. `PAPER` has
FuseLLM's settings (arXiv:2401.10491, section 3 and the released code). The fused log-probability of the token that came is that of the
row where it names the token, else the tail's, which is the most that it can be.

A shard is there once its mark is, as in `data/taught.py`; beside it lies a tally, which is written first.
"""

from jaxllm.fusing.values import PAPER, FuseConfig
from jaxllm.fusing.work import fuse_taught

__all__ = ["PAPER", "FuseConfig", "fuse_taught"]
