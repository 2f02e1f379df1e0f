"""Adapters made and loaded by PEFT itself, for test_peft_parity.py. Runs in the environment that has torch, transformers and peft.

    python tests/parity/peft_reference.py make FOLDER    # FOLDER/<case>/{base, adapter}/ and answers.npz, for every case
    python tests/parity/peft_reference.py load FOLDER    # FOLDER/<case>/{base, ours}/ -> answers of ours, back.npz

`base` is a tiny model with random weights as `save_pretrained` writes it, `adapter` one on top of it: every number of it is random, B
and DoRA's magnitudes too, so that nothing is hidden by a zero or a norm. answers.npz holds `ids`, `base` and `adapter`: logits. A case that
changes no logit fails here.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers as hf
from make_references import CASES as MODELS
from make_references import build

LENGTH = 24
KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}  # noqa: C408


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def prefix(**options):
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)


LLAMA = dict(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])  # noqa: C408
GPT2 = dict(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"])  # noqa: C408
NEOX = dict(r=3, lora_alpha=7, target_modules=["query_key_value", "dense"])  # noqa: C408
ALL = dict(r=2, target_modules="all-linear")  # noqa: C408
# name: (model of make_references.py, adapter, name under which it is saved)
CASES = {
    **{f"llama_{kind}": ("llama_linear", lora(**LLAMA, **more), "default") for kind, more in KINDS.items()},
    **{f"gpt2_{kind}": ("gpt2", lora(**GPT2, **more), "default") for kind, more in KINDS.items()},
    **{f"gpt_neox_{kind}": ("gpt_neox", lora(**NEOX, **more), "default") for kind, more in KINDS.items()},
    **{f"{name}_all_linear": (name, lora(**ALL), "default") for name in ("mpt", "phi3", "gpt1", "qwen3", "gemma3")},
    "phi3_all_linear_dora": ("phi3", lora(**ALL, use_dora=True), "default"),
    "llama_patterns": (
        "llama_llama3",
        lora(
            r=4, target_modules=["q_proj", "k_proj", "self_attn.o_proj", "down_proj", "lm_head"],
            exclude_modules=["layers.1.mlp.down_proj"],
            rank_pattern={"o_proj": 2, "layers.0.self_attn.q_proj": 6}, alpha_pattern={"down_proj": 3, r"layers.2.*q_proj": 5},
        ),
        "default",
    ),
    "llama_regex_named": ("llama_linear", lora(target_modules=r".*layers\.\d\.self_attn\.[qo]_proj"), "pirate"),
    "llama_dora_layers": ("llama_linear", lora(**LLAMA, use_dora=True, layers_to_transform=[0, 2]), "default"),
    "gpt2_layers": ("gpt2", lora(**GPT2, layers_to_transform=[1], layers_pattern="h"), "default"),
    "llama_prefix": ("llama_linear", prefix(), "default"),
    "llama_prefix_projection": ("llama_linear", prefix(prefix_projection=True, encoder_hidden_size=11), "default"),
    "gpt2_prefix": ("gpt2", prefix(), "default"),
    "gpt_neox_prefix": ("gpt_neox", prefix(), "default"),
    "qwen3_prefix": ("qwen3", prefix(), "default"),
}  # fmt: skip


def randomise(model, seed):
    """Numbers for everything that the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "magnitude" in name:
            weight.data = weight.data * (1.0 + 0.3 * noise)
        elif "lora_" in name:
            weight.data = 0.15 * noise
        elif "prompt_encoder" in name:
            weight.data = 0.7 * noise


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()


def make(folder):
    for seed, (name, (case, config, adapter)) in enumerate(CASES.items()):
        model = build(MODELS[case][0], MODELS[case][1], seed=seed)
        model.save_pretrained(folder / name / "base")
        ids = torch.from_numpy(np.random.default_rng(seed).integers(3, model.config.vocab_size, (2, LENGTH - 5)))
        answers = {"ids": ids.numpy(), "base": logits_of(model, ids)}
        wrapped = peft.get_peft_model(model, config, adapter_name=adapter).eval()
        randomise(wrapped, seed)
        answers["adapter"] = logits_of(wrapped, ids)
        wrapped.save_pretrained(folder / name / "adapter")
        np.savez(folder / name / "answers.npz", **answers)
        change = np.abs(answers["adapter"] - answers["base"]).max() / answers["base"].std()
        print(f"{name:26} changes logits by {change:.2f} of their deviation", flush=True)
        if change < 0.05:
            sys.exit(f"{name}: the adapter does next to nothing")


def load(folder):
    """Every `ours` as a user would load it; the keys that PEFT misses are an error."""
    for path in sorted(folder.glob("*/ours")):
        with np.load(path.parent / "answers.npz") as file:
            ids = torch.from_numpy(file["ids"])
        answers = {}
        for config in sorted(path.glob("**/adapter_config.json")):
            base = hf.AutoModelForCausalLM.from_pretrained(path.parent / "base", attn_implementation="eager").float().eval()
            wrapped = peft.PeftModel.from_pretrained(base, config.parent).eval()
            check_keys(wrapped, config.parent)
            answers[str(config.parent.relative_to(path))] = logits_of(wrapped, ids)
        np.savez(path.parent / "back.npz", **answers)


def check_keys(model, folder):
    """PEFT ignores what it does not find in a file, and keeps random numbers instead: compare what it holds with the file."""
    from safetensors.torch import load_file

    held, saved = peft.get_peft_model_state_dict(model), load_file(folder / "adapter_model.safetensors")
    held = {name: tensor for name, tensor in held.items() if ".base_layer." not in name}  # the head itself, where it has a branch
    if set(held) != set(saved) or any(not torch.equal(held[name], saved[name]) for name in saved):
        sys.exit(f"{folder}: PEFT holds other tensors than the file: {sorted(set(held) ^ set(saved))[:4]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "load"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    {"make": make, "load": load}[args.what](args.folder)
    print(json.dumps({"peft": peft.__version__, "transformers": hf.__version__, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
