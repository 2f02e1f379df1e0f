"""`python -m tools.convert`: folders as other libraries write them, in and out, whole or refused in one line.

The folders are written here with the safetensors package, which jaxllm itself does not use: an independent writer and reader.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_families import SMALL, random_params
from test_pretrained import same

from jaxllm import checkpoint_slices, pretrained, sharding, tree
from jaxllm.config import MeshConfig, ModelConfig
from jaxllm.interop import hf
from jaxllm.interop.families import FAMILIES, config_to_hf, params_to_hf
from jaxllm.interop.layout import leaf_shapes
from tools import convert

ROOT = Path(__file__).parent.parent


def write(
    folder: Path, family: str = "llama", dtype: Any = np.float32, *, shards: int = 1, config: ModelConfig | None = None, **more: Any
) -> dict[str, np.ndarray]:
    """A folder as on the hub; its tensors."""
    folder.mkdir(parents=True)
    config = config or SMALL[family]
    tensors = params_to_hf(family, config, random_params(config, dtype))
    (folder / "config.json").write_text(json.dumps(config_to_hf(family, config) | {"torch_dtype": str(np.dtype(dtype))} | more))
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    return tensors


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by the safetensors package."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in safetensors.numpy.load_file(file).items()}


def run(*words: Any) -> None:
    assert convert.main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What a refused command says: one line, exit status 2."""
    assert convert.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes() for name in a
    )


# ------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bytes(family: str, tmp_path: Path):
    """Every family, onto a mesh that is not here, in bfloat16."""
    theirs = write(tmp_path / "hf", family, ml_dtypes.bfloat16)
    run("hf", tmp_path / "hf", tmp_path / "ours", "--mesh.data", 2, "--mesh.model", 2)
    params, _ = checkpoint_slices.read(tmp_path / "ours")
    assert same(params, random_params(SMALL[family], ml_dtypes.bfloat16))
    run("to-hf", tmp_path / "ours", tmp_path / "back")
    assert equal(read(tmp_path / "back"), theirs)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == (family, "bfloat16")
    assert config["architectures"] == [FAMILIES[family].architecture]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_shards_in_and_out(dtype: Any, tmp_path: Path):
    theirs = write(tmp_path / "hf", dtype=dtype, shards=3)
    run("hf", tmp_path / "hf", tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "back", "--max_shard_bytes", 2000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in theirs.values())
    assert all(len(names) == 1 or sum(theirs[n].nbytes for n in names) <= 2000 for names in map(_names, files))
    assert equal(read(tmp_path / "back"), theirs)
    assert equal(read(tmp_path / "back"), {n: x[:] for n, x in _ours(tmp_path / "back").items()})  # our reader and theirs agree


def _names(path: Path) -> list[str]:
    return list(safetensors.numpy.load_file(path))


def _ours(folder: Path) -> dict[str, Any]:
    def whole(tensor: hf.FileTensor) -> np.ndarray:
        out = np.empty(tensor.shape, tensor.dtype)
        tensor.copy(out, lambda x: x)
        return out

    return {name: whole(tensor) for name, tensor in hf.open_folder(folder).tensors.items()}


def test_a_shard_of_each_leaf_is_one_file(tmp_path: Path):
    write(tmp_path / "hf")
    run("hf", tmp_path / "hf", tmp_path / "ours", "--mesh.data", 2, "--mesh.model", 4)
    config = SMALL["llama"]  # width 12 over data, ff_width 20 over model
    files = {path.name: path.stat().st_size for path in (tmp_path / "ours").rglob("trainable.layers.mlp.up.kernel/[0-9]*")}
    assert set(files) == {f"0.{i}.{j}" for i in range(2) for j in range(4)}
    assert set(files.values()) == {config.num_layers * 6 * 5 * 4}
    mesh = MeshConfig(data=2, model=4)
    model = pretrained.load(tmp_path / "ours", mesh=sharding.make_mesh(mesh))
    assert same(tree.map_with_path(lambda path, leaf: leaf[: leaf_shapes(config)[path][0]], model.params), random_params(config))


def test_what_lies_beside_the_weights_travels(tmp_path: Path):
    write(tmp_path / "hf", bos_token_id=1, eos_token_id=2, use_cache=False)
    texts = {
        "generation_config.json": '{"eos_token_id": [2, 5], "temperature": 0.6}', "README.md": "# A model", "LICENSE": "as is",
        "chat_template.jinja": "{{ messages }}", "special_tokens_map.json": '{"eos_token": "e"}', "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": '{"chat_template": "old", "model_max_length": 32}',
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / "hf" / name).write_text(text)
    (tmp_path / "hf" / "evil.bin").write_text("left where it is")
    run("hf", tmp_path / "hf", tmp_path / "ours")
    model = pretrained.load(tmp_path / "ours")
    assert (model.chat_template, model.stop_ids) == ("{{ messages }}", (2, 5, 4))
    assert model.tokenizer.encode("ab") == [0, 1] and model.tokenizer.eos_id == 4
    assert {path.name for path in (tmp_path / "ours" / "source").iterdir()} == {*texts, "config.json", "conversion.json"}
    run("to-hf", tmp_path / "ours", tmp_path / "back")
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text, name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["use_cache"]) == (1, 2, False)


def _tokenizer() -> str:
    import tokenizers

    model = tokenizers.models.BPE({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}, [])
    return tokenizers.Tokenizer(model).to_str()


def test_a_tokenizer_of_another_place(tmp_path: Path):
    write(tmp_path / "hf")
    (tmp_path / "tokenizer.json").write_text(_tokenizer())
    run("hf", tmp_path / "hf", tmp_path / "ours", "--tokenizer", tmp_path / "tokenizer.json")
    assert pretrained.load(tmp_path / "ours").tokenizer.num_vocab == 5


@pytest.mark.parametrize("num_vocab", [11, 40])
def test_vocabulary_trimmed_or_padded_is_recorded_and_comes_back(num_vocab: int, tmp_path: Path):
    theirs = write(tmp_path / "hf")
    run("hf", tmp_path / "hf", tmp_path / "ours", "--vocab_size", num_vocab)
    assert pretrained.model_config(tmp_path / "ours") == replace(SMALL["llama"], vocab_size=num_vocab)
    record = json.loads((tmp_path / "ours" / "source" / "conversion.json").read_text())
    assert (record["vocab_size_before"], record["vocab_size"]) == (23, num_vocab)
    run("to-hf", tmp_path / "ours", tmp_path / "back")
    kept = min(23, num_vocab)
    assert np.array_equal(read(tmp_path / "back")["lm_head.weight"][:kept], theirs["lm_head.weight"][:kept])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == num_vocab
    run("to-hf", tmp_path / "ours", tmp_path / "same", "--vocab_size", 23)
    assert num_vocab < 23 or equal(read(tmp_path / "same"), theirs)


def test_another_number_format_on_the_way_out(tmp_path: Path):
    theirs = write(tmp_path / "hf")
    run("hf", tmp_path / "hf", tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "back", "--dtype", "bfloat16")
    assert equal(read(tmp_path / "back"), {name: x.astype(ml_dtypes.bfloat16) for name, x in theirs.items()})


def test_a_run_of_ours_becomes_the_first_family_that_can_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pretrained.save(tmp_path / "m", SMALL["qwen3"], random_params(SMALL["qwen3"]), None, source={})
    run("to-hf", tmp_path / "m", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
    assert equal(read(tmp_path / "out"), params_to_hf("qwen3", SMALL["qwen3"], random_params(SMALL["qwen3"])))
    assert "qk_norm" in refused(capsys, "to-hf", tmp_path / "m", tmp_path / "no", "--family", "llama")
    odd = replace(SMALL["qwen3"], logit_scale=0.5)
    pretrained.save(tmp_path / "odd", odd, random_params(odd), None, source={})
    assert "no Hugging Face family can express" in refused(capsys, "to-hf", tmp_path / "odd", tmp_path / "no")


# -------------------------------------------------------------------------------------- what is refused


def _truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _header_of(folder: Path, text: bytes) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def _pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _rename(folder: Path, old: str, new: str) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = {new if name == old else name: x for name, x in safetensors.numpy.load_file(path).items()}
        safetensors.numpy.save_file(tensors, path)
    (folder / "model.safetensors.index.json").unlink()


def _config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


BROKEN = {
    "missing shard": (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "lacks 1 of 2 shards: model-00001-of-00002.safetensors"),
    "missing shard, no index": (
        lambda f: ((f / "model-00001-of-00002.safetensors").unlink(), (f / "model.safetensors.index.json").unlink()),
        "lacks 1 of 2 shards: model-00001-of-00002.safetensors"),
    "index lists more": (
        lambda f: (f / "model.safetensors.index.json").write_text((f / "model.safetensors.index.json").read_text().replace(
            '"lm_head.weight"', '"lm_head.wait"')), "lists lm_head.wait .* does not have it; did you mean 'lm_head.weight'?"),
    "index leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        "not a file in its folder"),
    "index is not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is not JSON"),
    "truncated": (_truncate, r"is truncated: its header needs [\d,]+ bytes, and the file has"),
    "truncated to nothing": (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b""), "is not a safetensors file"),
    "header too long": (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 64), "is not a safetensors file"),
    "header is not JSON": (lambda f: _header_of(f, b"[1]"), "its header does not read"),
    "offsets lie": (
        lambda f: _header_of(f, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'), "is damaged: 'a' F32\\[9\\] has 4 bytes"),
    "tensors overlap": (
        lambda f: _header_of(f, b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
                                b'"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'),
        "is damaged: 'b' begins at byte 2, and the one before ends at 4"),
    "header nested without end": (lambda f: _header_of(f, b"[" * 100_000), "its header does not read"),
    "config nested without end": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON .maximum recursion"),
    "half a surrogate pair": (lambda f: _config(f, _name_or_path="\ud800"), "config.json is not JSON .*surrogates not allowed"),
    "wrong type": (lambda f: _config(f, hidden_size="12"), "'hidden_size' of the Hugging Face config is \"12\"; it must be a whole number"),
    "unknown format": (lambda f: _header_of(f, b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'), "number format F4; jaxllm reads"),
    "pickles": (_pickles_only, "pytorch_model.bin is a pickle.*safe_serialization=True"),
    "other name": (
        lambda f: _rename(f, "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.key.weight"),
        "missing model.layers.0.self_attn.k_proj.weight .*did you mean 'model.layers.0.self_attn.key.weight'.*"
        "surplus model.layers.0.self_attn.key.weight"),
    "other shape": (lambda f: _config(f, intermediate_size=32), r"gate_proj.weight has shape \(20, 12\), expected \(32, 12\)"),
    "unknown family": (lambda f: _config(f, model_type="lama"), "no family 'lama'; families are .*did you mean 'llama'"),
    "no family": (lambda f: _config(f, model_type=None), "'model_type' of the Hugging Face config is null; it must be a text"),
    "unknown option": (lambda f: _config(f, attention_sinks=4), "'attention_sinks' = 4 of a Hugging Face llama config is not covered"),
    "quantised": (lambda f: _config(f, quantization_config={"bits": 4}), "'quantization_config' = .* is not covered"),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("[]"), "holds a list, not an object"),
    "tokenizer too large": (
        lambda f: (_config(f, vocab_size=23), (f / "tokenizer.json").write_text(_tokenizer().replace('"e":4', '"e":99'))),
        "the tokenizer has 100 tokens and the model 23; --vocab_size 100"),
    "tokenizer damaged": (lambda f: (f / "tokenizer.json").write_text("{"), "is not a Hugging Face tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "hf", shards=2)
    change, message = BROKEN[what]
    change(tmp_path / "hf")
    line = refused(capsys, "hf", tmp_path / "hf", tmp_path / "ours")
    assert line.startswith("jaxllm: ") and re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hg a b", "no command 'hg'; did you mean 'hf'?"),
        ("hf a", "usage: python -m tools.convert hf PATH_OR_REPO OUT"),
        ("hf ./nowhere out", "./nowhere does not exist, and is no hub id like"),
        ("hf {tmp}/nowhere out", "does not exist"),
        ("to-hf {tmp}/nowhere out", "does not exist"),
        ("hf {tmp}/hf {tmp}/full", "full exists already"),
        ("hf {tmp}/hf {tmp}/out --check --check_text a\udcff", "--check_text has byte 0xff at character 1, which is not UTF-8"),
        ("to-hf {tmp}/hf {tmp}/out --max_shard_bytes 0", "--max_shard_bytes is 0; it must be at least 1"),
        ("hf {tmp}/hf out --vocab_sise 3", "no option --vocab_sise; did you mean '--vocab_size'?"),
        ("hf {tmp}/hf {tmp}/out --tokenizer {tmp}/none", "no tokenizer at"),
        ("hf {tmp}/hf/model.bin {tmp}/out", "is a pickle"),
        ("gguf {tmp}/none.gguf {tmp}/out", "none.gguf"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "hf" / "model.bin").touch()
    assert message in refused(capsys, *words.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists() and not Path("out").exists()


def test_help_names_the_commands_and_their_options(capsys: pytest.CaptureFixture[str]):
    assert convert.main(["--help"]) == 0 and "to-hf  CHECKPOINT" in capsys.readouterr().out
    assert convert.main(["hf", "--help"]) == 0 and "--vocab_size" in capsys.readouterr().out


def test_check_without_the_library_says_how_to_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "hf")
    (tmp_path / "python").write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    line = refused(capsys, "hf", tmp_path / "hf", tmp_path / "ours", "--check", "--check_python", tmp_path / "python")
    assert "has no transformers" in line and "--check_python" in line
    assert pretrained.load(tmp_path / "ours").config == SMALL["llama"]


# ------------------------------------------------------------------------------------------ whole or not


def test_no_room_for_a_file_leaves_nothing(tmp_path: Path):
    """A limit on file sizes stands for a full disk: the write itself fails."""
    write(tmp_path / "hf")
    words = [sys.executable, "-m", "tools.convert", "hf", str(tmp_path / "hf"), str(tmp_path / "ours")]
    limited = ["bash", "-c", 'ulimit -f 3 && exec "$@"', "bash", *words]  # 3 KiB
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env=_environment(tmp_path))
    assert done.returncode == 2 and "cannot write" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["hf"]


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"JAXLLM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def test_a_leaf_is_read_in_slices(tmp_path: Path):
    """No slice reads more of a file than it needs, and none is larger than a chunk: what peak memory follows from."""
    write(tmp_path / "hf")
    found = hf.open_folder(tmp_path / "hf")
    from jaxllm.interop.families import lazy_from_hf

    params = lazy_from_hf("llama", SMALL["llama"], found.tensors)
    whole = random_params(SMALL["llama"])
    leaf, array = params["layers"]["attention"]["q"]["kernel"], whole["layers"]["attention"]["q"]["kernel"]
    for index in [(slice(1, 2),), (slice(0, 3), slice(2, 5), slice(1, 4), slice(0, 3)), (slice(2, 3), slice(None), slice(5, 6))]:
        assert np.array_equal(leaf[index], array[index])


def test_one_step_from_a_converted_folder(tmp_path: Path):
    """`--init_from`, through the command line, on real text."""
    config = replace(SMALL["llama"], vocab_size=259, tied_embeddings=True)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf("llama", config)))
    tensors = params_to_hf("llama", config, random_params(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    run("hf", folder, tmp_path / "ours")
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Paragraph {i} says that {i} and {i} make {2 * i}." for i in range(400)))
    (tmp_path / "target.py").write_text(
        "from jaxllm.config import *\nfrom jaxllm.pretrained import model_config\n"
        f"data = DataConfig(sources=(SourceConfig(kind='text', path={str(tmp_path / 'corpus.txt')!r}, document='paragraph'),),\n"
        "    tokenizer=TokenizerConfig(kind='bytes'), sequence_length=32, batch_size=4, held_out_fraction=0.05)\n"
        f"config = TrainConfig(name='tuned', model=model_config({str(tmp_path / 'ours')!r}), data=data, num_steps=1,\n"
        f"    init_from={str(tmp_path / 'ours')!r}, run_dir={str(tmp_path / 'run')!r}, precision='float32', eval_batches=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.cli", "train", "target.py"], capture_output=True, text=True, cwd=tmp_path, env=_environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    after, before = pretrained.load(tmp_path / "run"), pretrained.load(tmp_path / "ours")
    assert after.config == before.config and not same(after.params, before.params)
    kernel = lambda model: np.asarray(model.params["layers"]["mlp"]["up"]["kernel"])
    assert np.abs(kernel(after) - kernel(before)).max() < 0.01  # one step away, not another start
    run("to-hf", tmp_path / "run", tmp_path / "back")
    assert read(tmp_path / "back").keys() == tensors.keys()
