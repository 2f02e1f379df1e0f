"""A Hugging Face folder on disk: its config, its tensors where they lie, the files beside them; and how one is written.

Nothing is unpickled. A safetensors file is eight bytes (the length of a JSON header, little-endian), the header
({name: {dtype, shape, data_offsets}}), and the tensors' bytes, so a slice of a tensor is a slice of a mapped file.

Source: https://huggingface.co/docs/safetensors, section Format
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.config import ConfigError, nearest
from jaxllm.files import new_folder, sync
from jaxllm.interop.stored import Lazy, Shape, blocks

TRAVELLING = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
)  # fmt: skip
"""Files that go along with a model when it is converted."""

MAX_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_WRITE_BYTES = 1 << 27  # large, as some rows of a transposed kernel need a part of each of its chunks
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HOW = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT, safe_serialization=True)"


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file: a `layout.Stored`."""

    file: Path
    start: int
    """First byte, counted from the beginning of the file."""
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def copy(self, out: np.ndarray, view: Callable[[np.ndarray], np.ndarray]) -> None:
        """`out[...] = view(tensor)`, reading the pages of the file that the view touches, some MB of them at a time."""
        if not out.size:
            return
        first = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as file:
            pages = mmap.mmap(file.fileno(), self.start - first + self.num_bytes, access=mmap.ACCESS_READ, offset=first)
        flat = np.frombuffer(pages, np.uint8, self.num_bytes, self.start - first)
        part = view(flat.view(self.dtype).reshape(self.shape))
        for block in blocks(part, self.num_bytes):  # along the file, so that each page is read once
            out[block] = part[block]
            if hasattr(pages, "madvise"):
                pages.madvise(mmap.MADV_DONTNEED)  # or every page that was read would count as memory in use


@dataclass(frozen=True)
class Source:
    """What is in a Hugging Face folder."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, FileTensor]

    @property
    def files(self) -> list[Path]:
        """Those beside the tensors that travel along."""
        return [path for name in TRAVELLING if (path := self.folder / name).is_file()]


def open_folder(folder: Path) -> Source:
    """The folder's config and the headers of its tensors; no tensor is read.

    Raises:
      ConfigError: no such folder, no config.json, pickled weights only, a missing shard, a damaged or truncated file,
        a tensor that the index lists and no shard has.
    """
    if not folder.is_dir():
        if folder.suffix in _PICKLED:
            raise _pickled(folder)
        what = "is a file; name the folder that it is in" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what} (config.json and *.safetensors lie in it)")
    config = read_json(folder / "config.json", f"{folder} is no Hugging Face folder: it has no config.json")
    return Source(folder, config, _tensors(folder))


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConfigError: there is no such file (`missing` says so), or it holds no JSON object.
    """
    if not path.is_file():
        raise ConfigError(missing)
    try:
        value = json.loads(path.read_bytes())
        json.dumps(value, ensure_ascii=False).encode()  # or half a surrogate pair would fail where it is written
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value


def _pickled(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a pickle, which can run any code when it is read, so jaxllm never reads one; "
        f"make safetensors of it where you trust it, in an environment that has transformers: {_HOW}"
    )


def _tensors(folder: Path) -> dict[str, FileTensor]:
    """Every tensor of the folder's safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():  # of the two, transformers too takes the single file
        listed = read_json(index, "").get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ConfigError(f"{index} has no 'weight_map' of file names; fetch it again")
        if outside := next((name for name in listed.values() if Path(name).name != name), None):
            raise ConfigError(f"{index} names '{outside}', which is not a file in its folder; fetch it again")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        names = ["model.safetensors"] if "model.safetensors" in names else names
        listed = {}
        if not names:
            raise _no_safetensors(folder)
    files = sorted(set(listed.values())) if listed else _all_shards(names)
    if gone := [name for name in files if not (folder / name).is_file()]:
        raise ConfigError(f"{folder} lacks {len(gone)} of {len(files)} shards: {', '.join(gone[:5])}; fetch them again")
    tensors: dict[str, FileTensor] = {}
    for name in files:
        for tensor, where in read_header(folder / name).items():
            if tensor in tensors:
                raise ConfigError(f"'{tensor}' is in {tensors[tensor].file.name} and in {name} of {folder}; remove one of the files")
            tensors[tensor] = where
    if lost := [name for name, file in listed.items() if name not in tensors or tensors[name].file.name != file]:
        also = nearest(lost[0], tensors)
        raise ConfigError(f"{index} lists {', '.join(lost[:5])} in {listed[lost[0]]}, which does not have it{also}; fetch the shard again")
    return tensors


def _all_shards(names: list[str]) -> list[str]:
    """`names`, and those that their numbering says are missing: 'x-00001-of-00003.safetensors'."""
    found = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", names[0])
    if found is None:
        return names
    start, digits, of, count, end = found.groups()
    return sorted({*names, *(f"{start}{i:0{len(digits)}}{of}{count}{end}" for i in range(1, int(count) + 1))})


def _no_safetensors(folder: Path) -> ConfigError:
    pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        return _pickled(pickled[0])
    if gguf := sorted(folder.glob("*.gguf")):
        return ConfigError(f"{folder} has no safetensors file, but a GGUF one: python -m tools.convert gguf {gguf[0]} OUT")
    return ConfigError(
        f"{folder} has no *.safetensors file; it holds {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
    )


def read_header(path: Path) -> dict[str, FileTensor]:
    """Where each tensor of a safetensors file lies.

    Raises:
      ConfigError: not such a file, one that is truncated, or a number format that we do not know.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
        if not 0 <= length <= _MAX_HEADER_BYTES:
            raise ConfigError(f"{path} is not a safetensors file ({size:,} bytes); fetch it again")
        text = file.read(length)
    if len(text) < length:
        raise ConfigError(f"{path} is truncated: its header has {length:,} bytes, and the file {size:,}; fetch it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(**value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path} is not a safetensors file (its header does not read: {type(error).__name__}); fetch it again") from None
    tensors: dict[str, FileTensor] = {}
    end = 0
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if dtype not in _DTYPES:
            raise ConfigError(f"{path}: '{name}' has the number format {dtype}; jaxllm reads {', '.join(_DTYPES)}")
        tensors[name] = FileTensor(path, 8 + length + begin, shape, np.dtype(_DTYPES[dtype]))
        if min(shape, default=0) < 0 or begin < 0 or stop - begin != tensors[name].num_bytes:
            raise ConfigError(f"{path} is damaged: '{name}' {dtype}{list(shape)} has {stop - begin:,} bytes; fetch it again")
        if begin != end:
            raise ConfigError(f"{path} is damaged: '{name}' begins at byte {begin:,}, and the one before ends at {end:,}; fetch it again")
        end = stop
    if 8 + length + end != size:
        what = "is truncated" if size < 8 + length + end else "has bytes that belong to no tensor"
        raise ConfigError(f"{path} {what}: its header needs {8 + length + end:,} bytes, and the file has {size:,}; fetch it again")
    return tensors


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, Shape, int, int]:
    """One tensor of a header: (format, shape, first byte, end), checked for type only."""
    begin, end = data_offsets
    return str(dtype), tuple(map(int, shape)), int(begin), int(end)


# ------------------------------------------------------------------------------------------ writing


def write_folder(
    folder: Path,
    tensors: Mapping[str, Lazy],
    files: Mapping[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a Hugging Face folder: safetensors in shards with an index, some rows in memory at a time, and `files`.

    Raises:
      ConfigError: the folder exists, or the disk is full or may not be written.
    """
    shards: list[dict[str, Lazy]] = [{}]
    sizes = [0]
    for name, tensor in tensors.items():
        num_bytes = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        if sizes[-1] and sizes[-1] + num_bytes > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += num_bytes
    one = len(shards) == 1
    names = ["model.safetensors"] if one else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    with new_folder(folder, sum(sizes) + sum(map(len, files.values())) + (1 << 20)) as partial:
        for name, shard in zip(names, shards, strict=True):
            write_file(partial / name, shard)
            say(f"wrote {name} ({len(shard)} tensors)")
        for name, data in files.items():
            _write_synced(partial / name, data)
        if not one:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            _write_synced(partial / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def write_file(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write one safetensors file, tensor by tensor, a large one by its rows.

    Raises:
      ConfigError: a number format that safetensors does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    end = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in _NAMES:
            raise ConfigError(f"'{name}' has the number format {dtype}, and safetensors has {', '.join(_NAMES.values())}")
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            num_rows, num_bytes = tensor.shape[0], math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
            step = max(1, num_rows * _WRITE_BYTES // max(1, num_bytes))
            for start in range(0, num_rows, step):
                file.write(np.ascontiguousarray(tensor[start : start + step]).reshape(-1).view(np.uint8).data)
    sync(path)


def _write_synced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)
