"""`jaxllm train | plan | generate | eval | teach | report | init`: the command line.

A user's mistake is one line and exit code 2; --traceback shows where.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from jaxllm import platforms
from jaxllm.config import ConfigError, ModelConfig, TrainConfig, nearest
from jaxllm.files import cache_home, path_of
from jaxllm.flags import parse_flags
from jaxllm.study import Study, command
from jaxllm.study.values import Build

USAGE = """usage: jaxllm COMMAND …

  jaxllm train TARGET [--FIELD VALUE …]   train, or resume, the run of a configuration
  jaxllm plan TARGET --topology v5e:16x16 what it would take on a machine that is not here; --gpus h100:8x16
  jaxllm generate CHECKPOINT --prompt "…" continue prompts, or --chat, or --file prompts.jsonl
  jaxllm eval CHECKPOINT --tasks …        measure: perplexity, multiple choice, generation; --harness for lm-eval's tasks
  jaxllm teach TEACHER TARGET OUT         write what a teacher expects at every position of a configuration's text
  jaxllm report RUN_DIR                   write RUN_DIR/report.html again
  jaxllm init [DIR]                       copy the configurations and experiments into DIR, to start from

TARGET is configs/FILE.py[:NAME] or experiments/FILE.py:PRESET; NAME defaults to `config`, PRESET to `small`. A preset that is a
study trains and measures all its arms: docs/experiments.md.
`jaxllm train TARGET --help` lists every field with its type and value. Values are written as
--optim.lr 1e-3, --spike.enabled True, --optim.clip_norm None, --optim.freeze 'embed/.*' True 'layers/.*' False,
--data.batch_ramp 100 8 200 16, --mesh.rules 'embed/tokens' model,None, --data.sources.1.path more.txt.
--traceback shows where an error came from."""

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_MISTAKES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 1 for a failed run, 128 + n for signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "plan": plan,
        "generate": generate,
        "eval": evaluate,
        "teach": teach,
        "report": report,
        "init": init,
    }

    def act(words: list[str]) -> int:
        if not words or words[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if words else 2
        if words[0] not in commands:
            raise ConfigError(f"no command '{words[0]}'{nearest(words[0], commands) or ';'} commands: {', '.join(commands)}")
        return commands[words[0]](words[1:])

    return guarded(act, words)


def experiment_main(
    presets: Mapping[str, TrainConfig | Study],
    build: Build | None = None,
    from_words: Callable[[list[str]], Mapping[str, TrainConfig | Study]] | None = None,
) -> NoReturn:
    """What a paper's file ends with: `python -m experiments.FILE PRESET [--FIELD VALUE …]`, like `jaxllm train FILE.py:PRESET`.

    `python -m experiments.FILE page` writes what the results of its studies say.

    Args:
      presets: the file's PRESETS.
      build: the file's (config, precision=…) -> Experiment, for presets that are no studies; None means `pretrain.experiment`.
      from_words: gives the presets, out of words of the command line that it takes away; None means `presets`, whatever the words.
    """
    name = Path(sys.argv[0]).stem
    program = f"python -m experiments.{name}"
    studies = [value for value in presets.values() if isinstance(value, Study)]

    def act(words: list[str]) -> int:
        chosen = presets if from_words is None else from_words(words)
        if not words or words[0] in ("-h", "--help"):
            print(f"usage: {program} PRESET [--FIELD VALUE …]\n\nPRESET is one of {', '.join(presets)}; after it, --help lists every field")
            if studies:
                print(f"\nFor {', '.join(value.name for value in studies)}:\n{command.USAGE}\n")
                print(f"{program} page: write {command.FOLDER}/{name}.md, its plots, and its tables in README.md, from the results")
            return 0 if words else 2
        if words[0] == "page" and studies:
            from jaxllm.study import page

            return page.write(name, presets)
        known = [*presets, *(["page"] if studies else [])]
        if words[0] not in presets:
            raise ConfigError(f"no preset '{words[0]}'{nearest(words[0], known) or ';'} presets: {', '.join(presets)}")
        value = chosen[words[0]]
        if isinstance(value, Study):
            return command.run(value, words[1:], f"{program} {words[0]}")
        return run(parse_flags(value, words[1:], f"{program} {words[0]}"), build)

    sys.exit(guarded(act, sys.argv[1:]))


def guarded(act: Callable[[list[str]], int], words: list[str]) -> int:
    """`act(words)`, with what goes wrong said in one line and turned into an exit status."""
    setup_jax()
    try:
        return act([word for word in words if word != "--traceback"])
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `jaxllm train … --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        status, message = _explain(error)
        if "--traceback" in words or message is None:
            traceback.print_exc()
        else:
            print(f"jaxllm: {message}", file=sys.stderr)
        if "jax" in sys.modules:
            from jaxllm import hosts

            hosts.leave(status)
        return status


def _explain(error: Exception) -> tuple[int, str | None]:
    """(exit status, one line) for what a user can mend; no line for what is ours to mend, which keeps its traceback."""
    line = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return 2, line
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return 2, f"cannot write {error.filename or 'a file'} ({error.strerror}); free some space or choose another folder"
    if isinstance(error, OSError) and error.errno in _MISTAKES and error.filename:
        return 2, f"cannot use {error.filename} ({error.strerror}); choose another, or check its permissions"
    if type(error).__name__ == "TrainingFailed" or isinstance(error, OSError):
        return 1, line
    return 1, None


# ------------------------------------------------------------------------------------------ commands


def train(words: list[str]) -> int:
    """Train a target; the same command resumes."""
    if words and words[0] in ("-h", "--help"):
        print("TARGET is configs/FILE.py[:NAME] or experiments/FILE.py:PRESET. The values below are those of an empty configuration.\n")
        parse_flags(TrainConfig(), ["--help"], "jaxllm train TARGET")
        return 0
    if not words or words[0].startswith("-"):
        raise ConfigError("jaxllm train needs a target first, e.g. jaxllm train configs/quickstart.py")
    value, module = find_target(words[0])
    program = f"jaxllm train {words[0]}"
    if isinstance(value, Study):
        return command.run(value, words[1:], program)
    config = TrainConfig(name=words[0].partition(":")[2], model=value) if isinstance(value, ModelConfig) else value
    return run(parse_flags(config, words[1:], program), getattr(module, "build", None))


def run(config: TrainConfig, build: Build | None = None) -> int:
    """Train `config` in this process, as `jaxllm train` and the experiments do.

    Args:
      build: (config, precision=…) -> Experiment; None means `pretrain.experiment`.
    """
    from jaxllm import hosts
    from jaxllm.study import single

    hosts.start()
    ended = single.train(config, build, say=hosts.only_first(lambda line: print(line, flush=True)))
    import jax

    if jax.process_index() == 0:
        _write_report(ended.run_dir)
        if not ended.exit_code:
            _print_results(ended.run_dir)
    return ended.exit_code


def plan(words: list[str]) -> int:
    """What a target would take on a machine that is not here."""
    from jaxllm import pretrain
    from jaxllm.plan import command as planning

    if not words or words[0] in ("-h", "--help"):
        print(planning.USAGE)
        return 0 if words else 2
    if words[0].startswith("-"):
        raise ConfigError("jaxllm plan needs a target first, e.g. jaxllm plan configs/models.py:llama2_7b --topology v5e:16x16")
    own, others = planning.split_words(words[1:])
    program = f"jaxllm plan {words[0]}"
    if "--help" in others or "-h" in others:
        print(f"{planning.USAGE}\n")
        parse_flags(TrainConfig(), ["--help"], program)
    options = parse_flags(planning.Options(), own, program)
    config, build = load_target(words[0], lambda name, model: planning.for_model(name, model, options.machine().num_chips))
    name = build_name(words[0], build) if build else "jaxllm.pretrain:experiment"
    return planning.run(options, parse_flags(config, others, program), build or pretrain.experiment, name, words[0])


def build_name(target: str, build: Build) -> str:
    """`FILE.py:NAME` of a build, under which another process finds it.

    Raises:
      ConfigError: it has no name of its own in its file.
    """
    path = target.partition(":")[0]
    module = sys.modules[build.__module__] if getattr(build, "__module__", None) in sys.modules else None
    name = getattr(build, "__name__", "")
    if module is None or getattr(module, name, None) is not build:
        raise ConfigError(f"{target} builds its experiment with {build!r}; to be planned it must be a function of the file: def build(…)")
    return f"{path}:{name}" if module.__file__ and Path(module.__file__).resolve() == Path(path).resolve() else f"{module.__name__}:{name}"


def generate(words: list[str]) -> int:
    """Continue prompts with the weights of a run or of a converted folder."""
    from jaxllm import generate

    return generate.main(words)


def evaluate(words: list[str]) -> int:
    """Measure the weights of a run or of a converted folder."""
    from jaxllm import evaluate

    return evaluate.main(words)


def teach(words: list[str]) -> int:
    """Write a teacher's predictions, to be distilled from later."""
    from jaxllm import teach

    return teach.main(words, lambda target: load_target(target)[0])


def report(words: list[str]) -> int:
    """Write the report of a run directory again."""
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if len(words) != 1:
        raise ConfigError(f"jaxllm report takes one run directory, and was given {' '.join(words) or 'nothing'}")
    folder = path_of(words[0])
    if not (folder / "config.json").exists():
        runs = [str(path.parent) for path in folder.parent.glob("*/config.json")]
        raise ConfigError(f"{folder} is no run directory: there is no config.json in it{nearest(str(folder), runs)}")
    from jaxllm import rundir

    rundir.read_json(folder / "config.json")  # a report of a damaged one would leave out what it cannot read
    _write_report(folder)
    return 0


def init(words: list[str]) -> int:
    """Copy configs/ and experiments/ into a folder."""
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if len(words) > 1 or (words and words[0].startswith("-")):
        raise ConfigError(f"jaxllm init takes one folder, and was given {' '.join(words)}: jaxllm init DIR")
    folder, names = Path(words[0] if words else "."), ("configs", "experiments")
    source = Path(__file__).parent / "_init"
    if not source.exists():  # an editable install: the folders lie beside the package
        source = Path(__file__).parent.parent
    for name in names:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists already; choose another folder: jaxllm init DIR")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as half_written:
            for name in names:
                shutil.copytree(source / name, Path(half_written, name), ignore=shutil.ignore_patterns("__pycache__"))
            for name in names:
                Path(half_written, name).rename(folder / name)
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror or error}); choose another folder: jaxllm init DIR") from error
    there = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    print(f"wrote {folder / 'configs'} and {folder / 'experiments'}\nnext: {there}jaxllm train configs/quickstart.py")
    return 0


def setup_jax() -> None:
    """Settings for JAX, best made before it is imported: a compilation cache that outlives the process, and no chatter."""
    platforms.apply(os.environ)
    cache = cache_home()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "jax" in sys.modules:  # `python -m experiments.FILE` has imported it
        import jax

        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]))


def _write_report(run_dir: Path) -> None:
    from jaxllm.report import write_report

    print(f"report: {write_report(run_dir)}", flush=True)


def _print_results(run_dir: Path) -> None:
    from jaxllm.rundir import read_json

    results = read_json(run_dir / "results.json")
    if "bits_per_byte" not in results:
        return
    rows = [("this model", results["bits_per_byte"], "")]
    rows += [(row["name"], row["bits_per_byte"], row.get("note", "")) for row in results.get("baselines", [])]
    width = max(len(name) for name, _, _ in rows)
    print("\nheld-out bits per byte (lower is better)")
    for name, bits, note in rows:
        print(f"  {name:<{width}}  {bits:5.3f}  {note}")
    print(f"\nto go on: {results['go_on']}", flush=True)


# ------------------------------------------------------------------------------------------- targets


def find_target(target: str) -> tuple[TrainConfig | ModelConfig | Study, types.ModuleType]:
    """What `FILE.py[:NAME]` names, and the file as a module.

    Raises:
      ConfigError: no such file or name (with the nearest), a file that cannot be imported, or no config in it.
    """
    path, _, name = target.partition(":")
    module = load_file(Path(path))
    found = {n: v for n, v in vars(module).items() if isinstance(v, (TrainConfig, ModelConfig, Study)) and not n.startswith("_")}
    values = getattr(module, "PRESETS", found)
    name = name or ("config" if "config" in values else "small")
    if name not in values:
        raise ConfigError(f"{path} has no configuration '{name}'{nearest(name, values) or ';'} it has: {', '.join(values) or 'none'}")
    return values[name], module


def load_target(
    target: str, wrap: Callable[[str, ModelConfig], TrainConfig] = lambda name, model: TrainConfig(name=name, model=model)
) -> tuple[TrainConfig, Build | None]:
    """The TrainConfig that `FILE.py[:NAME]` names, and the file's `build` where it has one; of a study, its first arm that trains.

    Args:
      wrap: makes a TrainConfig of a file's ModelConfig.

    Raises:
      ConfigError: as `find_target`.
    """
    value, module = find_target(target)
    if isinstance(value, Study):
        return command.first_config(value)
    if isinstance(value, ModelConfig):
        value = wrap(target.partition(":")[2], value)
    return value, getattr(module, "build", None)


def load_file(path: Path) -> types.ModuleType:
    """A Python file as a module, with its folder's parent importable, so that configs import each other.

    Raises:
      ConfigError: no such file (with the nearest), or one that raises (with the line).
    """
    if not path.is_file():
        near = nearest(str(path), [str(p) for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        hint = near or "; `jaxllm init` writes the configurations that come with the package"
        raise ConfigError(f"no file {path}{hint}" if not path.is_dir() else f"{path} is a folder; name a file in it")
    if path.suffix != ".py":
        raise ConfigError(f"{path} is not a Python file; a target is configs/FILE.py[:NAME] or experiments/FILE.py:PRESET")
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"{path.resolve().parent.name}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or path}, line {error.lineno or '?'}: {error.msg}; mend it there") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error
    except Exception as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{path}, line {frames[-1] if frames else '?'}: {kind}{error}") from error
    return module


if __name__ == "__main__":
    sys.exit(main())
