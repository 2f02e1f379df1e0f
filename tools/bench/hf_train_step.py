"""The peer of `tools/bench/train_step.py`: a Hugging Face train step on torch, in an environment of its own.

    .venv-parity/bin/python tools/bench/hf_train_step.py --dtype float32 --layers 30 --batch 2 --length 512

smollm2-135m's shape, random weights, AdamW; with --lora PEFT's adapters of rank 8. Prints one JSON line: tokens/s (median), peak bytes.
"""

import argparse
import json
import os
import resource
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
parser.add_argument("--layers", type=int, default=30)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--lora", choices=["none", "qv", "all"], default="none")
args = parser.parse_args()

torch.set_num_threads(os.cpu_count() or 1)
config = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=args.layers, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
if args.lora != "none":
    from peft import LoraConfig, get_peft_model

    where = ["q_proj", "v_proj"] if args.lora == "qv" else "all-linear"
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=where, task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
tokens = torch.randint(0, config.vocab_size, (args.batch, args.length))
seconds = []
for _ in range(args.steps):
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
print(
    json.dumps(
        {
            "tokens_per_second": args.batch * args.length / statistics.median(seconds[1:]),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
