"""The command line as a newcomer meets it: what is refused, in which words, before anything is compiled; and what is accepted."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm import cli
from jaxllm import config as configs
from jaxllm import flags as cli_flags
from jaxllm.config import LayerKind, RopeConfig, SourceConfig, TrainConfig
from tests.runs import ROOT, SIGTERM, TINY, Run, corpus, train_until

QUICKSTART = str(ROOT / "configs" / "quickstart.py")
_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compiled.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
)

type Refused = Callable[..., str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `jaxllm …` here and checks what every refusal must be: exit code 2, one line, no traceback, nothing compiled."""
    monkeypatch.setenv("JAXLLM_TEST_TEXT", str(text))
    monkeypatch.setenv("JAXLLM_CACHE", str(text.parent / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> str:
        jax.clear_caches()
        _compiled.clear()
        status = cli.main([str(word) for word in words])
        error = capsys.readouterr().err.strip()
        assert status == 2, error
        assert error.startswith("jaxllm: ") and "\n" not in error, error
        assert not _compiled, f"{len(_compiled)} programs were compiled before: {error}"
        return error.removeprefix("jaxllm: ")

    return call


def test_the_listener_sees_a_compilation() -> None:
    _compiled.clear()
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    assert _compiled


# --------------------------------------------------------------------------------- commands and targets


def test_an_unknown_command_gets_the_nearest(refused: Refused) -> None:
    assert (
        refused("trian", QUICKSTART)
        == "no command 'trian'; did you mean 'train'? commands: train, plan, generate, eval, teach, report, init"
    )


def test_train_without_a_target_says_what_one_is(refused: Refused) -> None:
    assert "jaxllm train configs/quickstart.py" in refused("train")
    assert "jaxllm train configs/quickstart.py" in refused("train", "--optim.lr", "1")


def test_an_unknown_file_gets_the_nearest(refused: Refused, tmp_path: Path) -> None:
    assert refused("train", ROOT / "configs" / "quikstart.py").endswith(f"did you mean '{QUICKSTART}'?")
    assert "`jaxllm init` writes the configurations" in refused("train", "nowhere/at_all.py")
    assert "is a folder; name a file in it" in refused("train", ROOT / "configs")
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a Python file" in refused("train", "notes.txt")


def test_an_unknown_name_gets_the_nearest(refused: Refused) -> None:
    assert "no configuration 'conifg'; did you mean 'config'? it has: config" in refused("train", f"{QUICKSTART}:conifg")
    assert "did you mean 'gpt2_xl'?" in refused("train", f"{ROOT}/configs/models.py:gpt2_xxl")
    assert "it has: debug, small, paper" in refused("train", f"{ROOT}/experiments/pretrain.py:zzz")


@pytest.mark.parametrize(
    "source, said",
    [
        ("x = (1\n", "line 1: '(' was never closed"),
        ("\nimport no_such_package\n", "line 2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f():\n    return 1 / 0\n\nconfig = f()\n", "line 2: ZeroDivisionError"),
        (
            "from jaxllm.config import *\nconfig = TrainConfig(model=ModelConfig(num_heads=4, num_kv_heads=3))",
            "line 2: model.num_kv_heads is 3, which does not divide model.num_heads = 4; choose one of 1, 2, 4",
        ),
        ("from jaxllm.config import *\nconfig = TrainConfig(precision='bf16')", "did you mean 'bfloat16'"),
        ("config = 3\n", "no configuration"),
        ("a\0b", "null bytes"),
    ],
)
def test_a_broken_file_is_shown_with_its_line(refused: Refused, tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    error = refused("train", "broken.py")
    assert "broken.py" in error and said in error


def test_a_traceback_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--traceback", "train", QUICKSTART, "--optim.lr", "-1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "optim.lr is -1.0; it must be positive" in error


# ----------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model.numlayers 8", "no option --model.numlayers; did you mean '--model.num_layers'?"),
        ("--lr 1e-3", "no option --lr; did you mean --optim.lr?"),
        ("--model", "did you mean --model.num_layers or"),
        ("--zzz 1", "no option --zzz; `jaxllm train"),
        ("--data.sources.2.path x", "no option --data.sources.2.path"),
        ("optim.lr=1e-3", "options begin with --, as in --optim.lr 1e-3, and 'optim.lr=1e-3' does not"),
        ("--model.num_layers eight", "--model.num_layers takes a whole number, and was given eight"),
        ("--model.num_layers 2.5", "--model.num_layers takes a whole number, and was given 2.5"),
        ("--model.num_layers", "--model.num_layers takes a whole number, and was given nothing"),
        ("--model.num_layers 8 9", "--model.num_layers takes a whole number, and was given 8 9"),
        ("--seed 1 --optim.lr fast", "--optim.lr takes a number, and was given fast"),
        ("--optim.clip_norm off", "--optim.clip_norm takes a number or None, and was given off"),
        ("--spike.enabled yes", "--spike.enabled takes True or False, and was given yes"),
        ("--model.norm rmss", "--model.norm takes one of rms, layer, and was given rmss; did you mean 'rms'?"),
        ("--profile_steps 3", "--profile_steps takes (a whole number, a whole number) or None, and was given 3"),
        ("--optim.freeze layers/.*", "takes any number of (a text, True or False), and was given layers/.*"),
        ("--optim.lr -1", "optim.lr is -1.0; it must be positive and finite"),
        ("--model.num_kv_heads 3", "model.num_kv_heads is 3, which does not divide model.num_heads = 4; choose one of 1, 2, 4"),
        ("--model.num_layers 0", "model.num_layers is 0; it must be at least 1"),
        ("--model.vocab_size -5", "model.vocab_size is -5; it must be at least 1"),
        ("--num_steps 0", "num_steps is 0; it must be at least 1"),
        # Two flags that need each other, and a third that is wrong: the third is named.
        ("--model.num_heads 6 --model.num_kv_heads 3 --seed x", "--seed takes a whole number, and was given x"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_takes(refused: Refused, words: str, said: str) -> None:
    assert said in refused("train", QUICKSTART, *words.split())


def flags(words: str, config: TrainConfig | None = None) -> dict[str, object]:
    """What flags change: {field: new value}."""
    base = config or TrainConfig()
    parsed = cli_flags.parse_flags(base, words.split(), "jaxllm train x.py")
    return {name: new for name, (_, new) in configs.diff(configs.to_dict(base), configs.to_dict(parsed)).items()}


def test_every_kind_of_field_can_be_set() -> None:
    assert flags("--model.num_layers 8 --optim.lr 1e-3 --name=x-y --model.norm layer") == {
        "model.num_layers": 8,
        "name": "x-y",
        "model.norm": "layer",
    }  # fmt: skip  (1e-3 is the default)
    assert flags("--spike.enabled True --optim.clip_norm None --mesh.data 4 --model.num-heads 8") == {
        "spike.enabled": True, "optim.clip_norm": None, "mesh.data": 4, "model.num_heads": 8,
    }  # fmt: skip
    assert flags("--model.rope.base 5e5 --optim.schedule.kind wsd --profile_steps 3 5") == {
        "model.rope.base": 5e5, "optim.schedule.kind": "wsd", "profile_steps": (3, 5),
    }  # fmt: skip


def test_tuples_are_written_flat() -> None:
    assert flags("--optim.freeze embed/.* True layers/.* False --data.batch_ramp 100 8 200 16") == {
        "optim.freeze": (("embed/.*", True), ("layers/.*", False)), "data.batch_ramp": ((100, 8), (200, 16)),
    }  # fmt: skip
    assert flags("--mesh.rules embed/tokens model,None layers/.* None --data.mixture_schedule 0 1,2 50 2") == {
        "mesh.rules": (("embed/tokens", ("model", None)), ("layers/.*", (None,))),
        "data.mixture_schedule": ((0, (1.0, 2.0)), (50, (2.0,))),
    }
    ramped = replace(TrainConfig(), data=replace(TrainConfig().data, batch_ramp=((1, 2),)))
    assert flags("--data.batch_ramp", ramped) == {"data.batch_ramp": ()}


def test_configs_in_tuples_and_optional_configs_can_be_reached_and_added() -> None:
    words = (
        "--data.sources.0.path x --data.sources.1.path y --data.sources.1.kind jsonl --data.held_out.0.path z "
        "--model.layer_pattern.1.window 16 --model.layer_pattern.1.rope.base 7"
    )
    parsed = cli_flags.parse_flags(TrainConfig(), words.split(), "p")
    assert parsed.data.sources == (SourceConfig(kind="stdlib", path="x"), SourceConfig(kind="jsonl", path="y"))
    assert parsed.data.held_out == (SourceConfig(path="z"),)
    assert parsed.model.layer_pattern == (LayerKind(), LayerKind(window=16, rope=RopeConfig(base=7.0)))


def test_no_flags_change_nothing_and_the_last_of_two_wins() -> None:
    assert flags("") == {} and flags("--seed 1 --seed 2") == {"seed": 2}


def test_help_lists_every_field_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", QUICKSTART, "--help"]) == 0
    shown = capsys.readouterr().out
    config, _ = cli.load_target(QUICKSTART)
    listed = set(re.findall(r"^\W+--([a-z]\S*)", shown, re.MULTILINE))
    fields = {name for name, _ in cli_flags._options(config, TrainConfig)}
    assert fields - {"data.held_out", "model.layer_pattern.0.rope"} == listed
    shown = " ".join(shown.split())
    assert "model options" in shown and "optim.schedule options" in shown
    assert re.search(rf"--optim.lr FLOAT \W*Peak learning rate. \(default: {config.optim.lr}\)", shown)
    assert "--mesh.rules [STR AXIS,… [STR AXIS,… ...]]" in shown


def test_every_field_has_a_sentence_for_the_help() -> None:
    files = Path(configs.__file__).parent.glob("*.py")
    classes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    assert {"TrainConfig", "ModelConfig", "SourceConfig"} <= {node.name for node in classes}
    for node in classes:
        for field, after in itertools.pairwise([*node.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field.annotation):  # those have their own help
                assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)} has no docstring"


def test_help_without_a_target_and_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    assert "--model.num_layers INT" in capsys.readouterr().out
    for words in (["--help"], ["report", "--help"], ["init", "--help"]):
        assert cli.main(words) == 0
        assert "jaxllm train TARGET" in capsys.readouterr().out
    assert cli.main([]) == 2


# ------------------------------------------------------------------------------------------ mesh and shapes


@pytest.mark.parametrize(
    "words, said",
    [
        ("--mesh.data 16", "needs 16 devices, and there are 8; make it smaller, or use --mesh.data -1"),
        ("--mesh.model 3", "needs a multiple of 3 devices, and there are 8; sizes that divide 8: 1, 2, 4, 8"),
        ("--mesh.data 0", "sizes are positive, and at most one is -1"),
        ("--data.batch_size 12", "it must be a multiple of 8: 8 or 16"),
        ("--optim.num_microbatches 3 --mesh.data 1", "it must be a multiple of 3: 6 or 9"),
        ("--data.batch_size 16 --data.batch_ramp 5 12", "12 rows"),
        ("--model.position learned --model.max_length 32", "data.sequence_length is 64, and the model has learned positions for 32"),
        ("--data.sequence_length 1", "a row needs at least 2 tokens"),
        ("--model.head_size 7", "must be an even number"),
        ("--optim.freeze layers/mpl/.* True", "matches no parameter; did you mean 'layers/mlp/"),
        ("--optim.freeze ( True", "is not a regular expression"),
        ("--optim.freeze .* True", "freezes every parameter"),
        ("--mesh.rules embed/tokens modle,None", "names the axis 'modle'; axes are slice, data, model"),
        ("--optim.b1 1.5", "optim.b1 is 1.5; it must be in [0, 1)"),
        ("--init_from nowhere", "init_from names nowhere, and there is no such run directory or checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(refused: Refused, words: str, said: str) -> None:
    assert said in refused("train", TINY, *words.split())


@pytest.mark.parametrize("words", ["--mesh.data 16", "--data.batch_size 12", "--model.num_heads 3", "--lr 1"])
def test_it_is_refused_before_matmuls_are_timed_to_choose_a_precision(refused: Refused, words: str) -> None:
    refused("train", TINY, "--precision", "auto", *words.split())


# --------------------------------------------------------------------------------------------------- data


def file(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def source(path: str, *more: str) -> tuple[str, ...]:
    return ("train", TINY, "--data.sources.0.path", path, *more)


def test_a_data_file_that_cannot_be_used_is_named(refused: Refused, tmp_path: Path, text: Path) -> None:
    assert "did you mean 'corpus.txt'?" in refused(*source(str(text.parent / "corpse.txt")))
    assert "is empty; put text in it" in refused(*source(file(tmp_path, "empty.txt", b"")))
    assert "nothing but blank lines" in refused(*source(file(tmp_path, "blank.txt", b"\n \n\n")))
    assert "is not text: a NUL byte at offset 3" in refused(*source(file(tmp_path, "binary.txt", b"abc\0def")))
    assert "near offset 2 are not UTF-8" in refused(*source(file(tmp_path, "latin.txt", b"ab\xff\xfe" * 9)))
    (tmp_path / "folder").mkdir()
    assert "has no files" in refused(*source(str(tmp_path / "folder")))
    if os.path.exists(unreadable := "/sys/bus/cpu/drivers_probe"):  # to the superuser too
        assert "cannot be read (Permission denied)" in refused(*source(unreadable))
    assert "has no path" in refused("train", TINY, "--data.sources.0.path", "")
    assert "not Parquet" in refused(*source(str(text), "--data.sources.0.kind", "parquet"))
    assert "fewer than one batch of 8" in refused(*source(file(tmp_path, "short.txt", b"one\n\ntwo\n\nthree\n\n")))


def test_a_json_line_without_the_field_is_named_with_its_number(refused: Refused, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "some words"}), "", json.dumps({"txet": "others"}), "not json"]
    path = file(tmp_path, "a.jsonl", "\n".join(lines).encode())
    error = refused(*source(path, "--data.sources.0.kind", "jsonl"))
    assert f"{path} line 3 has no field 'text'; did you mean 'txet'? (its fields: txet)" in error
    path = file(tmp_path, "b.jsonl", "\n".join([lines[0], lines[3]]).encode())
    assert f"{path} line 2 is not JSON" in refused(*source(path, "--data.sources.0.kind", "jsonl"))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(refused: Refused, tmp_path: Path) -> None:
    error = refused("train", TINY, "--model.vocab_size", "100")
    assert "the tokenizer has 259 tokens, and model.vocab_size is 100; use --model.vocab_size 259" in error
    words = ("train", TINY, "--data.tokenizer.kind", "sentencepiece", "--data.tokenizer.path")
    assert "no tokenizer at 'gone.model'" in refused(*words, "gone.model")
    assert "bad.model" in refused(*words, file(tmp_path, "bad.model", b"not a model"))


# ---------------------------------------------------------------------------- run directories and checkpoints


QUICK = ("--remat", "none", "--model.residual_dropout", "0", "--optim.ema_decay", "None")
"""Flags with which tests/tiny.py compiles in less time."""


@pytest.fixture(scope="module")
def trained(text: Path) -> Path:
    """A run stopped in its first steps, in a process of its own."""
    run_dir = text.parent / "trained"
    status, output = train_until(r"step +1/", SIGTERM, "--run_dir", str(run_dir), *QUICK, text=text)
    assert status == 143, output
    return run_dir


def test_weights_of_another_architecture_are_refused_with_what_differs(refused: Refused, trained: Path, tmp_path: Path) -> None:
    error = refused("train", TINY, *QUICK, "--init_from", trained, "--model.width", "16")
    assert "is of another architecture" in error and "embed/tokens has shape (259, 32), expected (259, 16)" in error
    error = refused("train", TINY, *QUICK, "--init_from", trained, "--model.tied_embeddings", "False")
    assert "missing unembed/kernel" in error
    assert "has no complete checkpoint" in refused("train", TINY, "--init_from", tmp_path)


def test_resuming_with_another_architecture_is_refused_with_what_differs(refused: Refused, trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(trained, run_dir)
    words = ("train", TINY, *QUICK, "--run_dir", run_dir, "--model.num_layers", "3")
    error = refused(*words)
    assert "was trained with another configuration (model.num_layers: 2 → 3)" in error and "--on_config_change accept" in error
    error = refused(*words, "--on_config_change", "accept")
    assert "is of another architecture or optimizer" in error and "has shape (2, " in error and "expected (3, " in error


def test_a_fault_in_the_first_command_does_not_claim_the_run_directory(refused: Refused, text: Path, tmp_path: Path) -> None:
    """Somebody who mistypes the path, and then corrects it, starts a run: nothing was trained that could differ."""
    refused(*source("typo.txt", "--run_dir", str(tmp_path / "run")))
    error = refused(*source(str(text), "--run_dir", str(tmp_path / "run"), "--model.vocab_size", "100"))
    assert "the tokenizer has 259 tokens" in error


@pytest.mark.parametrize(
    "content",
    [b'{"name": "tin', b"", b"\xff\xfe", b"[]", b'"x"', b'{"name": "tiny"}', b'{"config": {"no_such_field": 1}}', b'{"config": 3}'],
)
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_damaged_config_json_is_named(refused: Refused, tmp_path: Path, content: bytes, precision: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(content)
    error = refused("train", TINY, "--run_dir", tmp_path / "run", "--precision", precision)
    assert "run/config.json" in error and "move it away" in error


def test_no_permission_is_said(refused: Refused, tmp_path: Path) -> None:
    assert "cannot write the run directory /proc/run" in refused("train", TINY, "--run_dir", "/proc/run")
    (tmp_path / "occupied").write_text("a file")
    assert "cannot write the run directory" in refused("train", TINY, "--run_dir", "occupied")
    assert "the cache folder /proc/cache cannot be written" in refused("train", TINY, "--data.cache_dir", "/proc/cache")
    assert "cannot write into /proc/new" in refused("init", "/proc/new")


def test_no_space_is_said_in_one_line(text: Path, tmp_path: Path) -> None:
    """A process that may write files of 2,000 bytes at most: the run's own files do not fit."""
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    run = Run("train", TINY, "--run_dir", str(tmp_path / "run"), text=text, preexec=small)
    assert run.finish() == 2, run.output
    assert run.lines[-1].startswith("jaxllm: cannot") and "File too large" in run.lines[-1], run.output
    assert "Traceback" not in run.output


def test_processes_half_described_are_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    assert "JAX_COORDINATOR_ADDRESS set and JAX_NUM_PROCESSES and JAX_PROCESS_ID not; set all three" in refused("train", TINY)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert "JAX_NUM_PROCESSES" in refused("train", TINY) and "two" in refused("train", TINY)


# ------------------------------------------------------------------------------------------- report and init


def test_report_wants_a_run_directory(refused: Refused, tmp_path: Path) -> None:
    assert "takes one run directory" in refused("report")
    (tmp_path / "tiny-1").mkdir()
    (tmp_path / "tiny-1" / "config.json").write_text("{}")
    assert refused("report", "tiny-2") == "tiny-2 is no run directory: there is no config.json in it; did you mean 'tiny-1'?"


def test_report_writes_the_page_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "report.html").unlink(missing_ok=True)
    assert cli.main(["report", str(trained)]) == 0
    assert f"report: {trained / 'report.html'}" in capsys.readouterr().out and (trained / "report.html").exists()


def test_init_copies_what_one_starts_from_and_refuses_to_overwrite(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", str(tmp_path / "mine")]) == 0
    assert f"next: cd {tmp_path / 'mine'} && jaxllm train configs/quickstart.py" in capsys.readouterr().out
    assert (tmp_path / "mine" / "configs" / "quickstart.py").read_bytes() == Path(QUICKSTART).read_bytes()
    assert (tmp_path / "mine" / "experiments" / "pretrain.py").exists() and not list(tmp_path.rglob("__pycache__"))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["configs", "experiments"]
    assert "exists already; choose another folder" in refused("init", tmp_path / "mine")
    (tmp_path / "other" / "experiments").mkdir(parents=True)
    refused("init", tmp_path / "other")
    assert not (tmp_path / "other" / "configs").exists(), "refused before anything is copied"
    assert "takes one folder" in refused("init", "a", "b")


# -------------------------------------------------------------------------------------- real processes


def jaxllm(*words: str, cwd: Path, module: str = "jaxllm") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(cwd / "cache")}
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


def test_python_m_jaxllm_is_the_command(tmp_path: Path) -> None:
    done = jaxllm("train", QUICKSTART, "--optim.lrr", "1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"jaxllm: no option --optim.lrr; did you mean '--optim.lr'? `jaxllm train {QUICKSTART} --help` lists them all\n"


def test_a_bad_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = jaxllm("train", QUICKSTART, "--data.sources.0.kind", "text", "--data.sources.0.path", "gone.txt", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "data path 'gone.txt' has no files" in done.stderr


def test_help_neither_imports_jax_nor_minds_a_closed_pipe(tmp_path: Path) -> None:
    code = f"import sys, jaxllm.cli as c; status = c.main(['train', {QUICKSTART!r}, '--help']); sys.exit(status or 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "--optim.lr" in done.stdout, done.stderr
    piped = f"{sys.executable} -m jaxllm train {QUICKSTART} --help | head -1"
    done = subprocess.run(["sh", "-c", piped], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr == ""
