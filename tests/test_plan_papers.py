"""`python -m tools.plans`: every paper preset on the machine of its paper; here on GPUs, which are planned without a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import plans

FILE = """'''A paper.

    python -m papers.tiny debug
    jaxllm plan papers/tiny.py:paper --gpus a100:8
'''
from dataclasses import replace
from jaxllm.config import DataConfig, ModelConfig, TrainConfig

model = ModelConfig(num_layers=2, width=32, num_heads=2, num_kv_heads=2, head_size=16, ff_width=64, vocab_size=64, max_length=32)
paper = TrainConfig(model=model, data=DataConfig(sequence_length=32, batch_size=16))
PRESETS = {"debug": paper, "paper": paper, "paper_large": replace(paper, model=replace(model, num_layers=4)), "paper_lost": paper}
PAPER_HARDWARE = {"paper_large": ("--gpus", "a100:3")}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "papers"
    made.mkdir()
    (made / "tiny.py").write_text(FILE)
    monkeypatch.setattr(plans, "EXPERIMENTS", made)
    monkeypatch.setattr(plans.papers, "__defaults__", (made,))
    return made


def test_each_paper_preset_is_a_row_with_its_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert [paper.name for paper in plans.papers()] == ["tiny:paper", "tiny:paper_large", "tiny:paper_lost"]
    assert plans.main(["--out", str(tmp_path / "plans.md")]) == 1
    rows = (tmp_path / "plans.md").read_text().splitlines()[2:]
    assert rows == capsys.readouterr().out.splitlines()[2:]
    assert rows[0].startswith("| tiny:paper | a100:8x1 = 8 × a100") and "(modelled)" in rows[0]
    assert rows[0].endswith("| `jaxllm plan papers/tiny.py:paper --gpus a100:8` |")
    assert "16 rows does not divide" in rows[1], "what `jaxllm plan` says"
    assert "names no machine; write in its docstring: `jaxllm plan experiments/tiny.py:paper_lost" in rows[2]
    with pytest.raises(SystemExit):
        plans.main(["--only", "nothing"])
