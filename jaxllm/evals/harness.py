"""EleutherAI's lm-evaluation-harness on a model of ours: its tasks, its metrics, our likelihoods and continuations.

lm-eval finds models by name in a registry that other packages cannot add to from outside, so its command needs a process in
which ours is registered: `python -m jaxllm.evaluate run --model jaxllm --model_args pretrained=CHECKPOINT --tasks … ` is
lm-eval's own command with every one of its flags. `jaxllm eval CHECKPOINT --harness TASK …` is the short way.

Texts are tokenised as lm-eval's `hf` model does it: names of special tokens in a text are those tokens, and the beginning of
text stands first where the tokenizer has one. Imported lazily and without torch: `pip install 'jaxllm[eval]'`.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from jaxllm.config import ConfigError, nearest
from jaxllm.evals import generation, likelihood
from jaxllm.evals.generation import Prompt, Writer
from jaxllm.evals.likelihood import Score
from jaxllm.models.generate import generator, sampler
from jaxllm.models.proxy import with_prompts

NAME = "jaxllm"

_PROXY: dict[str, Callable[[Any], Any]] = {
    "expert": str, "anti_expert": str, "alpha": float, "expert_chat": str, "expert_system": str, "expert_prefix": str,
    "plausible": float, "vocab_tail": str,
}  # fmt: skip
"""Arguments of proxy-tuning, and how a word becomes one."""
_GENERATION = {"until", "max_gen_toks", "max_tokens", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}


type Load = Callable[..., Any]
"""(checkpoint, precision or 'auto', **proxy) -> a `jaxllm.pretrained.Pretrained`: lm, params, tokenizer, chat_template, stop_ids; under
proxy-tuning also `reader`, None where all three models read one prompt, and `expert_ids(writer, prompt)`."""


class Answers:
    """lm-eval's three kinds of request, answered by `likelihood.score` and `generation.write`; `adapter` makes an lm-eval model of it."""

    load: Load
    cache_hook: Any

    def __init__(
        self, pretrained: Any, batch_size: int | str | None = None, max_batch_size: int | None = None,
        device: str | None = None, precision: str = "auto", max_length: int | None = None, batch_tokens: int = 4096,
        row_multiple: int = 1, max_gen_toks: int = 256, seed: int = 0, **proxy: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if unknown := sorted(set(proxy) - set(_PROXY)):
            raise ConfigError(
                f"--model_args has no '{unknown[0]}'{nearest(unknown[0], _PROXY) or ';'} proxy-tuning's are {', '.join(_PROXY)}"
            )
        proxy = {name: _PROXY[name](value) for name, value in proxy.items()}
        if proxy:
            proxy["max_length"] = int(max_length or 0)
        self.model = type(self).load(pretrained, precision, **proxy) if isinstance(pretrained, str) else pretrained
        self._scorer = likelihood.scorer(
            self.model.lm, max_length=max_length, batch_tokens=int(batch_tokens), row_multiple=row_multiple
        )  # fmt: skip
        self._rows = int(batch_size) if batch_size and str(batch_size).isdecimal() else 8
        self._max_gen_toks, self._seed = int(max_gen_toks), int(seed)
        self._writers: dict[tuple[float, int, float], Writer] = {}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ log p, whether greedy decoding gives it) of each (context, continuation)."""
        self._refuse_own_prompts()
        pairs = likelihood.encode_pairs(self.model.tokenizer, [request.args for request in requests], special=True)
        with _bar(len(pairs), "loglikelihood", disable_tqdm) as bar:

            def note(scores: Mapping[int, Score]) -> None:
                bar.update(len(scores))
                for i, score in scores.items():
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, (score.log_prob, score.is_greedy))

            scores = likelihood.score(self._scorer, self.model.params, pairs, on_batch=note)
        return [(score.log_prob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of each text, in windows of max_length."""
        self._refuse_own_prompts()
        tokenizer, windows, owner = self.model.tokenizer, [], []
        start = likelihood.start_of_text(tokenizer)
        for i, tokens in enumerate(tokenizer.encode_batch([request.args[0] for request in requests], special=True)):
            own = likelihood.rolling(tokens, start, self._scorer.max_length)
            windows += own
            owner += [i] * len(own)
        with _bar(len(windows), "loglikelihood_rolling", disable_tqdm) as bar:
            scores = likelihood.score(self._scorer, self.model.params, windows, on_batch=lambda new: bar.update(len(new)))
        totals = [0.0] * len(requests)
        for i, score in zip(owner, scores, strict=True):
            totals[i] += score.log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt, before its first stop string; greedy unless the task says do_sample."""
        found = [_prompt(text, options, self._max_gen_toks) for text, options in (request.args for request in requests)]
        texts: dict[int, str] = {}
        with _bar(len(found), "generate_until", disable_tqdm) as bar:
            for settings in dict.fromkeys(settings for _, settings in found):
                mine = [i for i, (_, other) in enumerate(found) if other == settings]

                def note(new: Mapping[int, list[str]], mine: list[int] = mine) -> None:
                    bar.update(len(new))
                    for i, (text,) in new.items():
                        texts[mine[i]] = text
                        self.cache_hook.add_partial("generate_until", requests[mine[i]].args, text)

                prompts = [found[i][0] for i in mine]
                generation.write(self._steered(self._writer(settings), prompts), prompts, seed=self._seed, on_batch=note)
        return [texts[i] for i in range(len(found))]

    def _steered(self, writer: Writer, prompts: Sequence[Prompt]) -> Writer:
        """`writer`, in which an expert with prompts of its own reads those."""
        if getattr(self.model, "reader", None) is None:
            return writer
        own = {tuple(generation.encode_prompt(writer, i, one)): self.model.expert_ids(writer, one) for i, one in enumerate(prompts)}
        return replace(writer, generate=with_prompts(writer.generate, own, writer.max_length))

    def _refuse_own_prompts(self) -> None:
        if getattr(self.model, "reader", None) is not None:
            raise ConfigError("likelihoods have one prompt for all three models; leave out expert_chat for tasks that are scored")

    def _writer(self, settings: tuple[float, int, float]) -> Writer:
        if settings not in self._writers:
            temperature, top_k, top_p = settings
            generate = generator(self.model.lm, sampler(temperature, top_k, top_p))
            model = self.model
            self._writers[settings] = Writer(
                generate, model.params, model.tokenizer, model.stop_ids, self._scorer.max_length, self._rows
            )  # fmt: skip
        return self._writers[settings]

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches know the tokenizer by."""
        return self.model.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template itself, for lm-eval's records."""
        return self.model.chat_template or ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a text."""
        if not self.model.chat_template:
            raise ConfigError("this model has no chat template; leave --apply_chat_template away")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self.model.chat_template)
        return template.render(messages=chat_history, add_generation_prompt=add_generation_prompt, bos_token="", eos_token="")


@cache
def adapter(load: Load) -> Any:
    """The model class, registered with lm-eval as `jaxllm`.

    Its arguments (`--model_args`): pretrained, precision (auto), max_length (the model's), batch_tokens (4096),
    max_gen_toks (256), seed (0); under proxy-tuning expert, anti_expert, alpha (1), expert_chat, expert_system, expert_prefix,
    plausible (0), vocab_tail (refuse). lm-eval's --batch_size is the number of rows that are written at once (8).

    Raises:
      ConfigError: lm-eval is not installed.
    """
    try:
        model, registry = (importlib.import_module(f"lm_eval.api.{name}") for name in ("model", "registry"))
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is not installed ({error}); pip install 'jaxllm[eval]'") from None
    return registry.register_model(NAME)(type("JaxLM", (Answers, model.LM), {"load": staticmethod(load)}))


def _bar(total: int, name: str, disable: bool) -> Any:
    from tqdm import tqdm  # lm-eval's own

    return tqdm(total=total, desc=f"jaxllm {name}", disable=disable)


def _prompt(text: str, options: Mapping[str, Any], max_gen_toks: int) -> tuple[Prompt, tuple[float, int, float]]:
    """One generate_until request: the prompt, and (temperature, top_k, top_p)."""
    unknown = [name for name in options if name not in _GENERATION]
    if unknown:
        raise ConfigError(
            f"generation_kwargs has '{unknown[0]}'{nearest(unknown[0], _GENERATION) or ';'} known are {', '.join(sorted(_GENERATION))}"
        )
    until = options.get("until") or ()
    stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
    limit = next((int(options[name]) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(name)), max_gen_toks)
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return Prompt(text, stop, limit, special=True), (0.0, 0, 1.0)
    return Prompt(text, stop, limit, special=True), (temperature or 1.0, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0))


def evaluate(
    model: Any, tasks: Sequence[str], *, include_path: str = "", num_shots: int | None = None, limit: int = 0, cache_path: str = "",
    run_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """lm-eval's results of `tasks` for an instance of `adapter(…)`.

    Args:
      tasks: names, or paths of task files (.yaml).
      include_path: a folder of further task files.
      num_shots: None leaves it to each task.
      limit: documents of each task; 0 means all.
      cache_path: where answers are kept as they come, so that the same call goes on; a suffix is added. Empty keeps none.

    Raises:
      ConfigError: lm-eval does not know a task, or cannot do what its file says.
    """
    from lm_eval.evaluator import simple_evaluate

    names, manager = _find(tasks, include_path)
    try:
        return simple_evaluate(
            model=model, tasks=names, task_manager=manager, num_fewshot=num_shots, limit=limit or None,
            use_cache=cache_path or None, bootstrap_iters=1000, log_samples=False, confirm_run_unsafe_code=run_code,
        )  # fmt: skip
    except Exception as error:  # a task file can go wrong in every way there is
        through = traceback.extract_tb(error.__traceback__)[1:]
        if isinstance(error, ConfigError | OSError) or any(Path(frame.filename).is_relative_to(_OURS) for frame in through):
            raise
        raise ConfigError(f"lm-eval cannot run {', '.join(tasks)} ({type(error).__name__}: {error}); --traceback shows where") from error


_OURS = Path(__file__).parent.parent


def _find(tasks: Sequence[str], include_path: str) -> tuple[list[Any], Any]:
    """(tasks as lm-eval wants them, its task manager). Reading its own thousands of task files takes seconds: only where needed."""
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

    if include_path:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if all(local.match_tasks([task]) for task in tasks):
            return list(dict.fromkeys(name for task in tasks for name in local.match_tasks([task]))), local
    config = EvaluatorConfig(tasks=list(tasks), include_path=include_path or None)
    try:
        manager = config.process_tasks({})
    except Exception as error:  # of its own, of YAML, of a Python file that a task file names
        raise ConfigError(f"lm-eval: {error}; `lm_eval ls tasks` lists them, and --include_path adds a folder") from None
    return list(config.tasks), manager


def command(words: Sequence[str], load: Load) -> int:
    """lm-eval's own command with `--model jaxllm` known to it."""
    adapter(load)
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
