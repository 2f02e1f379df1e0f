"""`jaxllm train | report | init`: the command line. One line and exit code 2 for a user's mistake; --traceback shows where."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxllm.config import ConfigError, ModelConfig, TrainConfig, nearest

USAGE = """usage: jaxllm COMMAND …

  jaxllm train TARGET [--FIELD VALUE …]   train, or resume, the run of a configuration; --help lists every field
  jaxllm report RUN_DIR                   write RUN_DIR/report.html again
  jaxllm init [DIR]                       copy the configurations and experiments into DIR, to start from

TARGET is configs/FILE.py[:NAME] or experiments/FILE.py:PRESET; NAME defaults to `config`.
--traceback before a command shows where an error came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 1 for a failed run, 128 + n for signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    commands: dict[str, Callable[[list[str]], int]] = {"train": train, "report": report, "init": init}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise ConfigError(f"no command '{arguments[0]}'{nearest(arguments[0], commands)} Commands: {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if traceback:
            raise
        status = _explain(error)
        if "jax" in sys.modules:
            from jaxllm import hosts

            hosts.leave(status)
        return status


def _explain(error: Exception) -> int:
    """One line for what a user can mend; what is ours to mend keeps its traceback."""
    if isinstance(error, ConfigError):
        print(f"jaxllm: {error}", file=sys.stderr)
        return 2
    if type(error).__name__ in ("TrainingFailed", "CheckpointError") or isinstance(error, OSError):
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    raise error


# ------------------------------------------------------------------------------------------ commands


def train(arguments: list[str]) -> int:
    """Train a target; the same command resumes."""
    target, rest = _target(arguments, "train")
    config = parse_flags(load_target(target), rest, f"jaxllm train {target}")
    return run(config)


def run(config: TrainConfig, build: Callable[..., Any] | None = None) -> int:
    """Train `config` in this process, as `jaxllm train` and the experiments do.

    Args:
      build: (config, precision=...) -> Experiment; None means `pretrain.experiment`.
    """
    setup_jax()
    from jaxllm import hosts, loop, pretrain

    hosts.start()
    precision, why = pretrain.choose_precision(config)
    print(f"precision: {precision} ({why})", flush=True)
    experiment = (build or pretrain.experiment)(config, precision=precision)
    ending = loop.run(experiment, precision, say=lambda line: print(line, flush=True), more_environment={"precision_because": why})
    import jax

    if jax.process_index() == 0:
        _write_report(ending.run_dir)
        if not ending.exit_code:
            _print_results(ending.run_dir)
    return ending.exit_code


def report(arguments: list[str]) -> int:
    """Write the report of a run directory again."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "config.json").exists():
        raise ConfigError(f"jaxllm report takes one run directory (with a config.json), and was given {' '.join(arguments) or 'nothing'}")
    _write_report(Path(arguments[0]))
    return 0


def init(arguments: list[str]) -> int:
    """Copy configs/ and experiments/ into a folder."""
    folder = Path(arguments[0] if arguments else ".")
    source = Path(__file__).parent / "_init"
    if not source.exists():  # an editable install: the folders lie beside the package
        source = Path(__file__).parent.parent
    for name in ("configs", "experiments"):
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists already; choose another folder: jaxllm init DIR")
    for name in ("configs", "experiments"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"wrote {folder / 'configs'} and {folder / 'experiments'}\nnext: cd {folder} && jaxllm train configs/quickstart.py")
    return 0


# --------------------------------------------------------------------------------------------- parts


def setup_jax() -> None:
    """Settings that must come before JAX starts: a compilation cache that outlives the process."""
    cache = Path(os.environ.get("JAXLLM_CACHE", "~/.cache/jaxllm")).expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _target(arguments: list[str], command: str) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"jaxllm {command} needs a target first, e.g. jaxllm {command} configs/quickstart.py")
    return arguments[0], arguments[1:]


def load_target(target: str) -> TrainConfig:
    """The TrainConfig that `FILE.py[:NAME]` names; a ModelConfig is wrapped in a default TrainConfig.

    Raises:
      ConfigError: no such file or name (with the nearest), or something else than a config.
    """
    path, _, name = target.partition(":")
    module = load_file(Path(path))
    presets = getattr(module, "PRESETS", {})
    values = {n: v for n, v in vars(module).items() if isinstance(v, (TrainConfig, ModelConfig))} | presets
    name = name or ("config" if "config" in values else "small")
    if name not in values:
        raise ConfigError(f"{path} has no configuration '{name}'{nearest(name, values)} It has: {', '.join(values) or 'none'}")
    value = values[name]
    return TrainConfig(name=name, model=value) if isinstance(value, ModelConfig) else value


def load_file(path: Path) -> ModuleType:
    """A Python file as a module, with its folder's parent importable, so that configs import each other."""
    if not path.is_file():
        near = nearest(str(path), [str(p) for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        hint = near or "; `jaxllm init` writes the configurations that come with the package"
        raise ConfigError(f"no file {path}{hint}")
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
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    return module


def parse_flags(config: TrainConfig, arguments: list[str], program: str) -> TrainConfig:
    """`config` with flags applied; every field is one, by its own name.

    Raises:
      ConfigError: an unknown flag (with the nearest) or a value of the wrong type.
    """
    if not arguments:
        return config
    import tyro

    for argument in arguments:
        if argument.startswith("--") and argument not in ("--help",):
            name = argument[2:].split("=")[0].replace("-", "_")
            known = field_names(config)
            if name not in known:
                raise ConfigError(f"no option --{name}{nearest(name, known)} `{program} --help` lists them all")
    try:
        return tyro.cli(
            TrainConfig, default=config, args=arguments, prog=program, use_underscores=True, console_outputs=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )  # fmt: skip
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(f"cannot read the options; `{program} --help` shows each one's type") from None
        raise


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of every field, nested configs and tuples of them included."""
    import dataclasses

    names: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(value):
            names += field_names(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    names += field_names(item, f"{prefix}{field.name}.{index}.")
    return names


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


if __name__ == "__main__":
    sys.exit(main())
