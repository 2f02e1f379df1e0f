"""Stored predictions of several teachers, with tokenizers of their own, as those of one teacher for a student (FuseLLM).

    jaxllm teach TEACHER_A TARGET_A taught/a --k 10          for each teacher: the text in its own tokens
    python -m tools.fuse TARGET OUT --source taught/a TARGET_A --source taught/b TARGET_B [--OPTION VALUE …]
    jaxllm train TARGET --distill.stored OUT 0.1 --distill.ce 0.9 --distill.kind soft_ce

TARGET is the student's configuration, whose data are used; TARGET_A the configuration that `jaxllm teach` was given: the same sources
under that teacher's tokenizer. --paper starts from FuseLLM's settings instead of ours (jaxllm/fusing/values.py); options change either.
The same command goes on after a kill. OUT/statistics.json says how often each teacher won, and what alignment kept of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from jaxllm import cli
from jaxllm.config import ConfigError
from jaxllm.flags import parse_flags
from jaxllm.fusing import PAPER, FuseConfig, fuse_taught

PROGRAM = "python -m tools.fuse TARGET OUT --source TAUGHT TARGET_OF_IT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuse; the exit status is 0, or 2 for a user's mistake, which is said in one line."""
    return cli.guarded(act, list(sys.argv[1:] if arguments is None else arguments))


def act(words: list[str]) -> int:
    """Fusion, out of the words of the command line."""
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nOptions:")
        parse_flags(FuseConfig(), ["--help"], PROGRAM)
    places, sources, options = split(words)
    start = PAPER if "--paper" in options else FuseConfig()
    config = parse_flags(start, [word for word in options if word != "--paper"], PROGRAM)
    if len(places) != 2:
        raise ConfigError(f"usage: {PROGRAM} [--OPTION VALUE …]; {len(places)} words were given before the options")
    load = lambda name: cli.load_target(name)[0]
    found = fuse_taught(load(places[0]), places[1], [(taught, load(target)) for taught, target in sources], config)
    print(json.dumps(found["all"], indent=1))
    return 0


def split(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """(words before the first option, the pairs after each --source, all other words).

    Raises:
      ConfigError: a --source without two words.
    """
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    sources, options, rest = list[tuple[str, str]](), list[str](), list(words[first:])
    while rest:
        word = rest.pop(0)
        if word != "--source":
            options.append(word)
        elif len(rest) < 2 or rest[0].startswith("-") or rest[1].startswith("-"):
            raise ConfigError("--source takes two words: the folder that jaxllm teach wrote, and the configuration that it was given")
        else:
            sources.append((rest.pop(0), rest.pop(0)))
    return list(words[:first]), sources, options


if __name__ == "__main__":
    sys.exit(main())
