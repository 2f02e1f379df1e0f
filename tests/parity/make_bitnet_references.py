"""Packed BitNet checkpoints with transformers' answers, for test_bitnet_parity.py. Runs in the environment of make_references.py.

    .venv-parity/bin/python tests/parity/make_bitnet_references.py FOLDER            # FOLDER/<case>: a checkpoint and answers.npz
    .venv-parity/bin/python tests/parity/make_bitnet_references.py FOLDER --reload   # FOLDER/<case> of ours -> FOLDER/<case>/logits.npy

Weights are packed by transformers' own `pack_weights`, and logits come from `from_pretrained` of the folder: BitLinear, or
AutoBitLinear. The online case also has the gradient of a loss with respect to latent weights. packs.npz holds what `pack_weights` makes
of matrices of several sizes, and what `unpack_weights` makes of that.
"""

# ruff: noqa: C408

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # their functions are decorated with torch.compile

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file
from transformers.integrations.bitnet import pack_weights, unpack_weights

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-3, hidden_act="silu", rope_parameters=dict(rope_type="default", rope_theta=300.0),
)  # fmt: skip
QUANTISED = dict(quant_method="bitnet", modules_to_not_convert=["lm_head"])
CASES = {
    "auto": (hf.BitNetConfig, dict(SIZES, hidden_act="relu2"), dict(linear_class="autobitlinear", quantization_mode="offline")),
    "tied": (hf.BitNetConfig, dict(SIZES, tie_word_embeddings=True), dict(linear_class="bitlinear", quantization_mode="offline")),
    "linear": (hf.LlamaConfig, dict(SIZES, tie_word_embeddings=False), dict(linear_class="bitlinear", quantization_mode="offline")),
    "norms": (hf.LlamaConfig, dict(SIZES), dict(linear_class="bitlinear", quantization_mode="offline", use_rms_norm=True, rms_norm_eps=.1)),
    "online": (hf.BitNetConfig, dict(SIZES), dict(linear_class="autobitlinear", quantization_mode="online")),
}  # fmt: skip


def write_case(folder, seed, config_class, values, quantised):
    """A checkpoint of random weights, packed but for the online case, and what transformers computes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = config_class(**json.loads(json.dumps(values)))
    model = hf.AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        noise = torch.randn(weight.shape)
        if weight.ndim == 1:
            tensors[name] = 1 + 0.3 * noise
        elif "_proj" not in name:
            tensors[name] = 0.7 * noise
        else:
            tensors[name] = 1.3 * noise * weight.shape[1] ** -0.5
            if quantised["quantization_mode"] == "offline":
                module, scale = name.removesuffix(".weight"), tensors[name].abs().mean()
                tensors[name] = pack_weights((tensors[name] / scale).round().clamp(-1, 1))
                tensors[f"{module}.weight_scale"] = (1 / scale if quantised["linear_class"] == "bitlinear" else scale).reshape(1)
                if quantised.get("use_rms_norm"):
                    tensors[f"{module}.rms_norm.weight"] = 1 + 0.3 * torch.randn(weight.shape[1])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict() | dict(quantization_config=QUANTISED | quantised), indent=2))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(3, 97, (2, 16)))
    model = load(folder)
    answers = dict(input_ids=ids.numpy(), logits=model(input_ids=ids).logits.detach().numpy())
    if quantised["quantization_mode"] == "online":
        loss = torch.sin(model(input_ids=ids).logits).sum()
        loss.backward()
        answers |= {f"gradient/{name}": p.grad.numpy() for name, p in model.named_parameters() if "layers.1" in name and p.grad is not None}
    np.savez(folder / "answers.npz", **answers)
    print(f"bitnet/{folder.name:8} logits std {answers['logits'].std():.3f}")


def load(folder):
    """As a user would; every tensor must have a place."""
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = [f"{what} {info[what]}" for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[what]]
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    if problems or kinds - {"BitLinear", "AutoBitLinear"}:
        sys.exit(f"{folder}: {'; '.join(problems)} {kinds}")
    return model.eval()


def write_packs(path):
    """`pack_weights` and `unpack_weights` of matrices whose rows 4 does and does not divide."""
    arrays, rng = {}, np.random.default_rng(0)
    for rows in (4, 8, 12, 32, 5, 7):
        codes = torch.from_numpy(rng.integers(-1, 2, (rows, 6)).astype(np.float32))
        packed = pack_weights(codes.clone())
        arrays |= {f"codes_{rows}": codes.numpy().astype(np.int8), f"packed_{rows}": packed.numpy(),
                   f"unpacked_{rows}": unpack_weights(packed, torch.float32).numpy().astype(np.int8)}  # fmt: skip
    np.savez(path, **arrays)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reload", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.reload:
        for folder in sorted(path for path in args.folder.iterdir() if (path / "config.json").exists()):
            ids = torch.from_numpy(np.load(folder / "input_ids.npy"))
            with torch.no_grad():
                np.save(folder / "logits.npy", load(folder)(input_ids=ids).logits.numpy())
        return
    for seed, (name, case) in enumerate(CASES.items()):
        write_case(args.folder / name, seed, *case)
    write_packs(args.folder / "packs.npz")


if __name__ == "__main__":
    main()
