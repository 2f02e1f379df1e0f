"""Checkpoints of other libraries as ours, and back.

    python -m tools.convert hf     PATH_OR_REPO  OUT              Hugging Face folder, or hub id -> jaxllm; ternary ones too
    python -m tools.convert to-hf  CHECKPOINT  OUT                jaxllm -> a folder that AutoModelForCausalLM.from_pretrained reads
    python -m tools.convert gguf   FILE  OUT                      GGUF, in its number format, or dequantised to float32
    python -m tools.convert llama2c  MODEL.bin  TOKENIZER.bin  OUT
    python -m tools.convert kv-heads CHECKPOINT --num-kv-heads 1 --how mean OUT     fewer key/value heads (docs/surgery.md)
    python -m tools.convert peft   ADAPTER_FOLDER  BASE  OUT       a PEFT adapter -> a run on top of BASE (docs/adapters.md)
    python -m tools.convert to-peft  RUN  OUT                     a run's adapters -> a folder that PeftModel.from_pretrained reads
    python -m tools.convert merge  RUN  OUT                       low-rank deltas folded into their base

What may be converted and how a family is added: docs/conversion.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm import cli
from jaxllm.config import ConfigError, MeshConfig, ModelConfig, nearest
from jaxllm.evals.records import encodable
from jaxllm.files import path_of
from jaxllm.flags import parse_flags

USAGE = f"""usage: {(__doc__ or "").split("    ", 1)[1].split("What may")[0].rstrip()}

`python -m tools.convert COMMAND --help` lists the options."""

SAMPLE = "The quick brown fox jumps over the lazy dog. 1 + 2 = 3; naïve café, 東京."


@dataclass(frozen=True)
class FromOptions:
    """Options of a conversion to jaxllm."""

    vocab_size: int | None = None
    """Cut the vocabulary to this many tokens, or add tokens whose rows are the mean row. None keeps the source's."""
    tokenizer: str = ""
    """A tokenizer.json, a SentencePiece .model, or a folder with one, instead of the source's own."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """The devices that will read the checkpoint: each leaf is written in the parts that they hold. They need not be here."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    check: bool = False
    """Load the source in its own library too, and compare logits."""
    check_text: str = SAMPLE
    """The text to compare on."""
    check_python: str = sys.executable
    """The Python that has that library (torch and transformers; for GGUF also gguf and accelerate)."""

    def __post_init__(self) -> None:
        encodable(self.check_text, "--check_text")


@dataclass(frozen=True)
class ToOptions:
    """Options of a conversion to Hugging Face."""

    family: str = ""
    """The model_type to write. Empty: the one it came from, else the first that can express the config."""
    vocab_size: int | None = None
    """Cut the vocabulary to this many tokens, or add tokens whose rows are the mean row. None keeps it."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Number format of the tensors."""
    max_shard_bytes: int = 5 * 10**9
    """Most bytes of tensors in one file."""
    check: bool = False
    """Load the result in transformers, and compare logits."""
    check_text: str = SAMPLE
    """The text to compare on."""
    check_python: str = sys.executable
    """The Python that has torch and transformers."""

    def __post_init__(self) -> None:
        encodable(self.check_text, "--check_text")
        if self.max_shard_bytes < 1:
            raise ConfigError(f"--max_shard_bytes is {self.max_shard_bytes}; it must be at least 1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 for a user's mistake, which is said in one line."""
    return cli.guarded(act, list(sys.argv[1:] if arguments is None else arguments))


def act(words: list[str]) -> int:
    """One conversion, out of the words of the command line."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    from tools import kv_heads, peft

    commands: dict[str, tuple[tuple[str, ...], Any, Callable[..., None]]] = {
        "hf": (("PATH_OR_REPO", "OUT"), FromOptions(), from_hf),
        "to-hf": (("CHECKPOINT", "OUT"), ToOptions(), to_hf),
        "gguf": (("FILE", "OUT"), FromOptions(), from_gguf),
        "llama2c": (("MODEL.bin", "TOKENIZER.bin", "OUT"), FromOptions(), from_llama2c),
        "kv-heads": (("CHECKPOINT", "OUT"), kv_heads.Options(), kv_heads.command),
        "peft": (("ADAPTER_FOLDER", "BASE", "OUT"), peft.FromOptions(), peft.from_peft),
        "to-peft": (("RUN", "OUT"), peft.ToOptions(), peft.to_peft),
        "merge": (("RUN", "OUT"), peft.MergeOptions(), peft.merge),
    }
    if words[0] not in commands:
        raise ConfigError(f"no command '{words[0]}'{nearest(words[0], commands) or ';'} commands: {', '.join(commands)}")
    names, defaults, convert = commands[words[0]]
    given, flags = _places_and_flags(words[1:], len(names))
    program = f"python -m tools.convert {words[0]} {' '.join(names)}"
    if "--help" in flags or "-h" in flags:
        parse_flags(defaults, ["--help"], program)
    if len(given) != len(names):
        raise ConfigError(f"usage: {program} [--OPTION VALUE …]; {len(given)} words were given before the options")
    convert(*given, parse_flags(defaults, flags, program))
    return 0


def _places_and_flags(words: list[str], num_places: int) -> tuple[list[str], list[str]]:
    """(what to convert and where to, the options), where the last places may come after the options, each of which has a value."""
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    given, flags = words[:first_flag], _with_values(words[first_flag:])
    late = num_places - len(given)
    if 0 < late <= len(flags) - 2 and not any(word.startswith("-") for word in flags[-late - 1 :]):
        given, flags = given + flags[-late:], flags[:-late]
    return given, flags


def _with_values(flags: Sequence[str]) -> list[str]:
    """`--check` alone means `--check True`."""
    out: list[str] = []
    for i, word in enumerate(flags):
        out.append(word)
        if word == "--check" and (i + 1 == len(flags) or flags[i + 1].startswith("--")):
            out.append("True")
    return out


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)


# ------------------------------------------------------------------------------------------- to jaxllm


def from_hf(source: str, out: str, options: FromOptions) -> None:
    """A Hugging Face folder or hub id as a folder of ours."""
    from jaxllm.interop import bitnet as ternary
    from jaxllm.interop import families, hf
    from jaxllm.surgery import bitnet
    from tools import check, hf_text, hub

    folder = path_of(source).expanduser() if path_of(source).expanduser().exists() else hub.snapshot(source, options.revision)
    found = hf.open_folder(folder)
    rounded, family = None, found.config["model_type"]
    if ternary.is_ternary(found.config):
        config, rounded, params = ternary.read(folder)
        if "weight_scale" in params["layers"]["attention"]["q"]:
            params = bitnet.latents(params, rounded)
    else:
        config = families.config_from_hf(found.config)
        params = families.lazy_from_hf(family, config, found.tensors)
    tokenizer, template = hf_text.read(folder)
    if options.tokenizer:
        tokenizer, own_template = hf_text.given(options.tokenizer)
        template = own_template or template
    stop_ids = hf_text.stop_ids(folder, found.config, tokenizer, template)
    origin = {"kind": "huggingface", "from": source, "family": family}
    _save(out, config, params, tokenizer, template, stop_ids, origin, found.files, options, rounded)
    if options.check:
        check.against("hf", folder, Path(out), options.check_python, options.check_text, say)


def from_gguf(file: str, out: str, options: FromOptions) -> None:
    """A GGUF file as a folder of ours."""
    from jaxllm.interop import gguf, gguf_tokenizer
    from tools import check

    opened = gguf.open_gguf(file)
    made = gguf_tokenizer.definition(opened.metadata) if "tokenizer.ggml.model" in opened.metadata and not options.tokenizer else None
    _save_read(file, out, gguf.hf_config(opened), gguf.hf_tensors(opened), made, "gguf", options)
    if options.check:
        check.against("gguf", opened.path, Path(out), options.check_python, options.check_text, say)


def from_llama2c(model: str, tokenizer: str, out: str, options: FromOptions) -> None:
    """A llama2.c checkpoint with its tokenizer as a folder of ours."""
    from jaxllm.interop import llama2c

    if options.check:
        raise ConfigError("llama2.c has no Python library to check with; leave --check out")
    values, tensors = llama2c.read_model(model)
    made = None if options.tokenizer else llama2c.read_tokenizer(tokenizer, values["vocab_size"])
    _save_read(model, out, values, tensors, made, "llama2c", options)


def _save_read(file: str, out: str, values: dict[str, Any], tensors: dict[str, Any], made: Any, kind: str, options: FromOptions) -> None:
    """What was read in Hugging Face's terms: a config, tensors, and a tokenizer's definition (None where there is none)."""
    from jaxllm import pretrained
    from jaxllm.data.tokenizer import HuggingFace, Tokenizer
    from jaxllm.interop import families
    from tools import hf_text

    config, family = families.config_from_hf(values), values["model_type"]
    params = families.lazy_from_hf(family, config, tensors)
    tokenizer: Tokenizer | None = None
    template, given = None, values.get("eos_token_id")
    stop_ids: tuple[int, ...] = (given,) if isinstance(given, int) else ()
    if made is not None:
        tokenizer, stop_ids = HuggingFace(json.dumps(made.tokenizer), made.config, file), made.stop_ids
        template = tokenizer.chat_template
    elif options.tokenizer:
        tokenizer, template = hf_text.given(options.tokenizer)
    if tokenizer is not None:
        stop_ids = pretrained.find_stop_ids(tokenizer, template, stop_ids)
    _save(out, config, params, tokenizer, template, stop_ids, {"kind": kind, "from": Path(file).name, "family": family}, (), options)


def _save(
    out: str,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: Any,
    template: str | None,
    stop_ids: Sequence[int],
    origin: dict[str, Any],
    files: Sequence[Path],
    options: FromOptions,
    rounded: Any = None,
) -> None:
    """What all sources share: the vocabulary's size, the folder, and the lines that say what was done."""
    from jaxllm import __version__, pretrained, tree
    from jaxllm.interop.vocab import resize_vocab

    before = config.vocab_size
    if options.vocab_size is not None:
        config, params = resize_vocab(config, params, options.vocab_size)
    num_tokens = None if tokenizer is None else tokenizer.num_vocab
    origin |= {
        "vocab_size_before": before, "vocab_size": config.vocab_size, "tokenizer_size": num_tokens,
        "converter": f"jaxllm {__version__}",
    }  # fmt: skip
    pretrained.save(
        out, config, params, tokenizer, chat_template=template, stop_ids=stop_ids, source=origin, files=files, mesh=options.mesh,
        rounded=rounded,
    )  # fmt: skip
    formats = sorted({str(leaf.dtype) for _, leaf in tree.items(params)})
    say(f"wrote {out}: {tree.count(params):,} parameters in {', '.join(formats)}, from {origin['from']} ({origin['family']})")
    if config.vocab_size != before:
        say(f"vocabulary: {before:,} -> {config.vocab_size:,} tokens")
    if num_tokens is None:
        say("the source has no tokenizer: the folder trains and converts back, and needs --tokenizer PATH here to read text")
    elif num_tokens < config.vocab_size:
        say(f"vocabulary: {config.vocab_size:,} rows for the tokenizer's {num_tokens:,} tokens; the others are kept as they are")


# ----------------------------------------------------------------------------------------- to Hugging Face


def to_hf(checkpoint: str, out: str, options: ToOptions) -> None:
    """A run directory, a converted folder or one checkpoint as a Hugging Face folder."""
    from jaxllm.interop import hf
    from tools import check, hf_export

    export = hf_export.prepare(path_of(checkpoint).expanduser(), options.family, options.vocab_size, options.dtype)
    hf.write_folder(Path(out), export.tensors, export.files, max_shard_bytes=options.max_shard_bytes, say=say)
    values = json.loads(export.files["config.json"])
    say(f"wrote {out}: {values['architectures'][0]}, {len(export.tensors)} tensors in {values['torch_dtype']}")
    if packed := sum(math.prod(tensor.shape) for tensor in export.tensors.values() if tensor.dtype == np.uint8):
        say(f"projections in 2 bits a weight: {packed / 1e6:,.2f} MB, {8 * packed / 1e6:,.2f} MB in bfloat16")
    if options.check:
        check.against("hf", Path(out), path_of(checkpoint).expanduser(), options.check_python, options.check_text, say)


if __name__ == "__main__":
    sys.exit(main())
