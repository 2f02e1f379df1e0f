"""The peer of `tools/bench/maxtext.py`: MaxText's own train step, traced, counted and compiled, in an environment of its own.

    PEER/bin/python tools/bench/maxtext_step.py --model llama2-7b --topology v5e-256 --batch 4 --length 2048 --dump FOLDER

PEER: `pip install 'maxtext[tpu]'`. The step is the one that `maxtext.trainers.pre_train.train_compile` builds; the counter is ours.
Prints one JSON line: the work, versions, seconds, or the error. XLA's dumps go to FOLDER, up to its buffer assignment: like
`jaxllm.plan.child` it does not wait for code.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
sys.path.pop(0)  # this folder, which has a maxtext.py of its own
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import jax
import maxtext
from maxtext.trainers.pre_train import train_compile
from maxtext.utils import max_utils

from jaxllm.plan.kernels import attention
from jaxllm.plan.work import count

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--topology", required=True)
parser.add_argument("--batch", type=int, required=True, help="rows per chip")
parser.add_argument("--length", type=int, required=True)
parser.add_argument("--dump", help="a folder for XLA's dumps; without it nothing is compiled")
args = parser.parse_args()
result: dict = {"versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "jaxlib", "libtpu")}}


def stop_when_assigned(start: float) -> None:
    """Print the result and end the process once XLA has written where every buffer lies."""
    while not list(Path(args.dump).glob("*.after_optimizations_after_buffer_assignment.txt")):
        time.sleep(0.2)
    print(json.dumps(result | {"seconds": time.monotonic() - start}), flush=True)
    os._exit(0)


def counted(func, func_args, func_kwargs, mesh, in_shardings, out_shardings, static_argnums, donate_argnums, config, rules):
    """In the place of `train_compile.jit_and_compile`, whose arguments these are."""
    with jax.set_mesh(mesh), rules:
        step = jax.jit(func, in_shardings=in_shardings, out_shardings=out_shardings, static_argnums=static_argnums,
                       donate_argnums=donate_argnums)  # fmt: skip
        traced = step.trace(*func_args, **func_kwargs)
        result["work"] = dataclasses.asdict(count(traced.jaxpr, kernels=attention()))
        if args.dump:
            threading.Thread(target=stop_when_assigned, args=(time.monotonic(),), daemon=True).start()
            options = max_utils.parse_libtpu_flags_to_dict(config.compile_xla_flags) | {"xla_dump_to": args.dump}
            traced.lower().compile(compiler_options=options)
            result["error"] = "compiled without a dump of its buffer assignment"
    raise SystemExit


train_compile.jit_and_compile = counted
with tempfile.TemporaryDirectory() as folder:
    words = [
        "train_compile", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), f"compile_topology={args.topology}",
        "compile_topology_num_slices=1", f"model_name={args.model}", f"per_device_batch_size={args.batch}",
        f"max_target_length={args.length}", "remat_policy=full", "run_name=x", f"base_output_directory={folder}",
    ]  # fmt: skip
    try:
        train_compile.main(words)
    except SystemExit:
        pass
    except Exception as error:
        result["error"] = " ".join(str(error).split())[:300]
print(json.dumps(result))
