"""Sources: every kind gives the same documents, and whatever is wrong with a file is said."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.config import ConfigError, SourceConfig
from jaxllm.data.corpus import sample
from jaxllm.data.source import Document, open_source
from jaxllm.data.stdlib import Stdlib

RECORDS = [{"text": f"document {i} é\n", "meta": {"id": str(i)}, "ask": f"q{i}? "} for i in range(7)]


def documents(cache, say=lambda line: None, **config):
    source = open_source(SourceConfig(**config), cache, say)
    return [source[i] for i in range(len(source))]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["one\ntwo\r\n\n\n \nthree\n\n", "four"]),
        ("line", ["one", "two", "three", "four"]),
        ("paragraph", ["one\ntwo", "three", "four"]),
    ],
)
def test_text_files_are_cut_as_asked(files, cache, unit, expected):
    (files / "b.txt").write_bytes(b"four")
    (files / "a.txt").write_bytes(b"one\ntwo\r\n\n\n \nthree\n\n")
    (files / ".hidden").write_bytes(b"\0")
    for path in (files, files / "*.txt"):
        assert [d.text for d in documents(cache, kind="text", path=str(path), document=unit)] == expected
    assert len(documents(cache, kind="text", path=str(files / "b.txt"), document=unit)) == 1


def write(kind, folder):
    if kind == "jsonl":
        (folder / "x.jsonl").write_text("\n".join([json.dumps(r) for r in RECORDS[:3]] + ["", "  "] + [json.dumps(r) for r in RECORDS[3:]]))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:4]), folder / "a.parquet", row_group_size=3)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[4:]), folder / "b.parquet")
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1")
        for record in RECORDS:
            writer.write(json.dumps(record).encode())
        writer.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_records_give_any_field(files, cache, kind):
    write(kind, files)
    assert documents(cache, kind=kind, path=str(files)) == [Document(text=r["text"]) for r in RECORDS]
    assert documents(cache, kind=kind, path=str(files), field="meta.id", prompt_field="ask") == [
        Document(text=r["meta"]["id"], prompt=r["ask"]) for r in RECORDS
    ]
    if kind == "array_record":  # whose first record lacks the field: plain text, whole
        assert documents(cache, kind=kind, path=str(files), field="txet")[0].text == json.dumps(RECORDS[0])
    else:
        with pytest.raises(ConfigError, match=r"no (field|column) 'txet'; did you mean 'text'\?"):
            documents(cache, kind=kind, path=str(files), field="txet")


def test_a_sample_of_parquet_is_mixed_and_reads_few_row_groups(files, cache, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    texts = [f"{i // 50}:{i}" for i in range(20 * 50)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:700]}), files / "a.parquet", row_group_size=50)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[700:]}), files / "b.parquet", row_group_size=50)
    source = open_source(SourceConfig(kind="parquet", path=str(files)), cache)
    reads = []
    whole = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", lambda *args, **kw: reads.append(args[1]) or whole(*args, **kw))
    sampled = sample([source], 0.0)
    first = [next(sampled) for _ in range(60)]
    assert len(reads) == len({text.split(":")[0] for text in first}) == 9
    assert sorted([*first, *sampled]) == sorted(texts) and len(reads) == 8 * 20
    assert first == [text for text, _ in zip(sample([source], 0.0), first, strict=False)]
    training = list(sample([source], 0.5))
    assert 400 < len(training) < 600 and set(training) < set(texts)


def test_array_records_may_be_plain_text(files, cache):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(files / "x.array_record"), "group_size:1")
    for text in ("one é", "{two"):
        writer.write(text.encode())
    writer.close()
    assert [d.text for d in documents(cache, kind="array_record", path=str(files))] == ["one é", "{two"]


def test_chats_are_read_as_messages(files, cache):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (files / "x.jsonl").write_text(json.dumps({"chat": chat, "other": "x"}) + "\n" + json.dumps({"chat": [{"role": "user"}]}))
    source = open_source(SourceConfig(kind="jsonl", path=str(files), field="chat", loss_on="assistant"), cache)
    assert source[0].messages == tuple(chat) and source[0].content == "hihello"
    with pytest.raises(ConfigError, match=r"x\.jsonl line 2: turn 1 of the chat"):
        source[1]


def test_the_fingerprint_is_the_content(files, cache):
    path = files / "x.txt"
    path.write_text("one")
    config = SourceConfig(kind="text", path=str(path))
    first = open_source(config, cache).fingerprint
    assert open_source(config, cache).fingerprint == first
    path.write_text("two")  # same size, and perhaps within one tick of the clock
    assert open_source(config, cache).fingerprint != first
    os.utime(path, ns=(1, 1))
    second = open_source(config, cache).fingerprint
    assert open_source(config, cache).fingerprint == second != first


def test_the_standard_library_is_text_in_a_fixed_order():
    source = Stdlib()
    texts = [source[i].text for i in range(len(source))]
    assert 5e6 < sum(map(len, texts)) < 3e7
    joined = "\n".join(texts)
    for part in ("def namedtuple(", "Return the cosine of x", 'The "try" statement'):  # a source, a docstring, a topic
        assert joined.count(part), part
    keys = [source[i].split_key for i in range(len(source))]
    assert not [key for key in keys if key.startswith(("test/", "site-packages", "encodings/cp1"))]
    assert source.describe()["python"] == ".".join(map(str, sys.version_info[:3]))
    code = "from jaxllm.data.stdlib import Stdlib; print(Stdlib().fingerprint)"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert other.stdout.strip() == source.fingerprint  # whatever this process has imported, patched or seeded


def test_a_module_and_its_compiled_twin_are_held_out_together():
    source = Stdlib()
    keys = [source[i].split_key for i in range(len(source))]
    assert keys.count("decimal") >= 2


# ------------------------------------------------------------------------------- TensorFlow Datasets


BUILDER = """
import tensorflow_datasets as tfds

class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        text = tfds.features.Text()
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": text, "label": text}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}
    def _generate_examples(self, num):
        for i in range(num):
            yield i, {"text": f"document {i} é", "label": str(i)}
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set built on disk without TensorFlow; its builder must live in a package of its own."""
    pytest.importorskip("tensorflow_datasets", reason="tensorflow_datasets is not installed: pip install 'jaxllm[tfds]'")
    folder = tmp_path_factory.mktemp("tfds")
    package = folder / "code" / "tiny_text"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tiny_text_dataset_builder.py").write_text(BUILDER)
    sys.path.insert(0, str(folder / "code"))
    try:
        from tiny_text.tiny_text_dataset_builder import TinyText

        TinyText(data_dir=folder / "data", file_format="array_record").download_and_prepare()
        yield folder / "data"
    finally:
        sys.path.remove(str(folder / "code"))


def test_tensorflow_data_sets_are_read_without_tensorflow(tfds_folder, cache):
    got = documents(cache, kind="tfds", path=f"tiny_text:train@{tfds_folder}")
    assert sorted(d.text for d in got) == [f"document {i} é" for i in range(5)]
    assert len(documents(cache, kind="tfds", path=f"tiny_text:test@{tfds_folder}", field="label")) == 2
    assert "tensorflow" not in sys.modules


def test_unknown_tensorflow_data_sets_are_refused(tfds_folder, cache):
    with pytest.raises(ConfigError, match="no data set 'tiny_texts' in TensorFlow Datasets"):
        documents(cache, kind="tfds", path=f"tiny_texts:train@{tfds_folder}")
    with pytest.raises(ConfigError, match=r"no split 'tests'; did you mean 'test'\? \(its splits: "):
        documents(cache, kind="tfds", path=f"tiny_text:tests@{tfds_folder}")
    with pytest.raises(ConfigError, match="is not name"):
        documents(cache, kind="tfds", path="tiny_text")


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (None, {}, r"data path '.*x\.txt' has no files; did you mean 'y\.txt'\?"),
        (b"", {}, r"data file .*x\.txt is empty"),
        (b" \n \n", {"document": "line"}, "nothing but blank lines"),
        (b"text \0 more", {}, r"x\.txt is not text: a NUL byte at offset 5"),
        (b"abc \xff\xfe", {}, r"x\.txt is not text: bytes near offset 4"),
        (b"abc \xc3", {}, r"x\.txt is not text"),
        (b'{"text": "a"}\n{"text": "b"\n', {"kind": "jsonl"}, r"x\.txt line 2 is not JSON .*; repair the line or remove it"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', {"kind": "jsonl"}, r"x\.txt line 3 has no field 'text'; did you mean 'txt'\?"),
        (b'["a"]', {"kind": "jsonl"}, r"x\.txt line 1 is a JSON list, not an object"),
        (b'{"text": 5}', {"kind": "jsonl"}, r"line 1: field 'text' holds int, not text"),
        (b'{"text": "\\ud800"}', {"kind": "jsonl"}, r"line 1: field 'text' is not valid Unicode"),
        (b'{"text": []}', {"kind": "jsonl"}, r"line 1: the chat in 'text' is empty"),
        (b'{"text": "a"}', {"kind": "jsonl", "loss_on": "assistant"}, r"line 1: loss_on 'assistant' needs a chat"),
        (b'{"text": "a"}', {"kind": "jsonl", "loss_on": "completion"}, "loss_on 'completion' and no prompt_field"),
        (b"not parquet", {"kind": "parquet"}, r"x\.txt is not Parquet"),
        (b"not records" * 100, {"kind": "array_record"}, "is not array-record"),
        (b"x", {"kind": "hf_stream"}, "cannot seek"),
    ],
)
def test_bad_files_are_named_with_the_fix(files, cache, content, config, message):
    (files / "y.txt").write_text("a neighbour")
    if content is not None:
        (files / "x.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        documents(cache, **{"kind": "text", "path": str(files / "x.txt"), **config})
    assert "\n" not in str(caught.value)


def test_empty_files_of_a_folder_are_said(files, cache):
    (files / "a.txt").write_text("text")
    (files / "b.txt").touch()
    said = []
    assert len(documents(cache, said.append, kind="text", path=str(files))) == 1
    assert len(said) == 1 and "1 empty files left out" in said[0] and "b.txt" in said[0]
    with pytest.raises(ConfigError, match="no path"):
        documents(cache, kind="text")


def test_a_file_that_cannot_be_opened_is_named(files, cache):
    (files / "x.txt").write_text("text")
    (files / "x.txt").chmod(0)
    if os.access(files / "x.txt", os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(ConfigError, match=r"x\.txt cannot be read \(Permission denied\)"):
        documents(cache, kind="text", path=str(files))


def test_large_indices_are_not_objects(files, cache):
    (files / "x.txt").write_text("a line\n" * 1000)
    source = open_source(SourceConfig(kind="text", path=str(files), document="line"), cache)
    assert isinstance(source._spans._index, np.memmap) and len(source) == 1000
