"""What comes back from a checkpoint is what went in, on any mesh, or an error that says why not."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm import sharding
from jaxllm.checkpoint import Checkpointer, load_params, read_meta, verify
from jaxllm.config import ConfigError, MeshConfig

NUM_VOCAB = 10


class State(NamedTuple):
    step: Any
    trainable: Any
    opt_state: Any
    ema: Any
    key: Any


@functools.cache
def make_state(seed: int = 0, vocab: int = NUM_VOCAB) -> State:
    """A state as the training step has it: named tuples, optax states, empty nodes, every type that we use."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": {"tokens": jnp.pad(jax.random.normal(keys[0], (NUM_VOCAB, 8)), ((0, vocab - NUM_VOCAB), (0, 0)))},
        "layers": {"mlp": {"up": {"kernel": jax.random.normal(keys[1], (2, 8, 16))}}},
        "final_norm": {"scale": jnp.linspace(-1, 1, 8).at[0].set(jnp.nan).at[1].set(-0.0)},
    }
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(mu_dtype=jnp.bfloat16))
    opt_state = jax.tree.map(lambda x: x + jnp.ones_like(x) * jnp.asarray(0.1 * seed, x.dtype), adam.init(params))
    odd = {
        "bf16": jax.random.normal(keys[2], (5, 3), jnp.bfloat16),
        "f16": jnp.float16([1e-7, jnp.inf]),
        "i8": jnp.int8([-128, 127]),
        "mask": jnp.array([True, False, True]),
        "raw_key": jax.random.PRNGKey(seed),
        "keys": keys,
        "empty": jnp.zeros((0, 4)),
    }
    return State(jnp.int32(seed), params, (opt_state, odd), None, jax.random.key(seed + 7, impl="rbg"))


def template(state: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Shapes of a state; on a mesh, params and moments by the project's rules, the rest replicated."""
    shapes = jax.eval_shape(lambda: state)
    if mesh is None:
        return shapes
    rules = [(r".*(up/kernel)", (None, "data", "model"))]
    specs = sharding.like_params(shapes, sharding.param_specs(shapes.trainable, mesh, rules))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding.shardings(specs, mesh))


def bits(leaf: Any) -> bytes:
    raw = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(raw).tobytes()


def assert_same_bits(given: Any, expected: Any) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert bits(a) == bits(b), path


def saved(folder: Path, steps: Any = (1, 2), **kwargs: Any) -> Checkpointer:
    ck = Checkpointer(folder, **{"keep_last": 9, **kwargs})
    for step in steps:
        ck.save(step, make_state(step), {"position": step}, num_vocab=NUM_VOCAB)
    ck.wait()
    return ck


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 1 and 2, which tests copy before they harm it."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    saved(folder)
    return folder


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "checkpoints"))


# ------------------------------------------------------------------------------------- what comes back


def test_round_trip_is_bit_for_bit(two: Path) -> None:
    restored = Checkpointer(two, 9).restore(template(make_state()))
    assert restored is not None and restored.step == 2 and restored.meta == {"position": 2}
    assert_same_bits(restored.state, make_state(2))
    older = Checkpointer(two, 9).restore(template(make_state()), step=1)
    assert older is not None and older.step == 1
    assert_same_bits(older.state, make_state(1))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "a" / "b").restore(template(make_state())) is None


def test_save_hands_over_before_it_returns(tmp_path: Path) -> None:
    """The next steps may overwrite (donate) the arrays at once: the file holds what they were when `save` was called."""
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jax.random.normal(jax.random.key(0), (1 << 20,)) + 0
    expected = np.array(x, copy=True)
    ck = Checkpointer(tmp_path)
    ck.save(1, {"x": x}, {})
    for _ in range(3):
        x = step(x)
    restored = ck.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert float(x[0]) == -1 and restored is not None
    np.testing.assert_array_equal(restored.state["x"], expected)


def test_a_step_is_saved_once(copy: Path) -> None:
    ck = Checkpointer(copy, 9)
    ck.save(2, make_state(5), {"position": 5}, num_vocab=NUM_VOCAB)
    ck.wait()
    assert ck.read_meta(2) == {"position": 2}


def test_policy_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    ck = Checkpointer(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        ck.save(step, {"x": jnp.full(3, step)}, {})
        assert len(ck.saved_steps()) <= 4
    ck.wait()
    assert ck.saved_steps() == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000006", "00000007"]


def test_rewinding_deletes_what_is_later(copy: Path) -> None:
    ck = Checkpointer(copy, 9)
    ck.delete_after(1)
    assert ck.saved_steps() == [1] and [path.name for path in copy.iterdir()] == ["00000001"]
    ck.save(2, make_state(8), {"position": 8})
    ck.wait()
    assert ck.read_meta(2) == {"position": 8}


@pytest.mark.parametrize("meta", [{"x": object()}, {"x": np.float32(1)}])
def test_meta_must_be_json(tmp_path: Path, meta: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Checkpointer(tmp_path).save(1, {"x": jnp.ones(3)}, meta)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- meshes


def across_meshes(folder: Path) -> None:
    """In a process with 8 devices: save on one mesh, restore on others, with the vocabulary padded to each."""
    assert jax.device_count() == 8
    meshes = [sharding.make_mesh(MeshConfig(slice=s, data=d, model=m)) for s, d, m in ((2, 2, 2), (1, 1, 8), (1, 1, 1))]
    for step, mesh in enumerate(meshes, 1):
        padded = make_state(step, vocab=-(-NUM_VOCAB // mesh.shape["model"]) * mesh.shape["model"])
        shapes = template(padded, mesh)
        ck = Checkpointer(folder, 9)
        ck.save(step, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), padded, shapes), {}, num_vocab=NUM_VOCAB)
        ck.wait()
        for other in meshes:
            vocab = -(-NUM_VOCAB // other.shape["model"]) * other.shape["model"]
            expected = make_state(step, vocab=vocab)
            restored = ck.restore(template(expected, other))
            assert restored is not None and restored.step == step
            trained = restored.state._replace(opt_state=())
            assert_same_bits(trained, expected._replace(opt_state=()))
            for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(template(expected, other)), strict=True):
                assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
            for leaf, want in zip(jax.tree.leaves(restored.state.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
                assert bits(leaf[:NUM_VOCAB] if leaf.ndim else leaf) == bits(want[:NUM_VOCAB] if want.ndim else want)


def test_any_mesh_and_vocabulary_padding(tmp_path: Path) -> None:
    """1, 2 and 8 vocabulary shards in every direction on 8 devices; then the same files on this process's first device."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=env, check=True, timeout=120)
    ck = Checkpointer(tmp_path, 9)
    assert ck.saved_steps() == [1, 2, 3]
    for step in ck.saved_steps():
        restored = ck.restore(template(make_state()), step=step)
        assert restored is not None
        assert_same_bits(restored.state.trainable, make_state(step).trainable)


# --------------------------------------------------------------------------------------------- damage


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_is_found(two: Path, data: st.DataObject) -> None:
    """Any bit of any file: arrays, Orbax's metadata, our own, the manifest itself."""
    inside = files(two / "00000002")
    path = data.draw(st.sampled_from([*inside, *[path for path in inside if "manifest-" in path.name] * 4]))
    content = path.read_bytes()
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    broken = bytearray(content)
    broken[position // 8] ^= 1 << position % 8
    path.write_bytes(broken)
    try:
        problems = verify(two)
    finally:
        path.write_bytes(content)
    assert problems and all("00000002: " in problem for problem in problems)
    assert "manifest" in path.name or any(path.name in problem for problem in problems), "names the damaged file"
    assert verify(two) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("pick", ["largest", "_METADATA", "meta.json"])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(copy: Path, harm: Any, pick: str) -> None:
    inside = files(copy / "00000002")
    victim = max(inside, key=lambda path: path.stat().st_size) if pick == "largest" else next(path for path in inside if path.name == pick)
    harm(victim)
    said: list[str] = []
    ck = Checkpointer(copy, 9)
    restored = ck.restore(template(make_state()), say=said.append)
    assert restored is not None and restored.step == 1
    assert_same_bits(restored.state, make_state(1))
    assert len(said) == 1 and victim.name in said[0] and "corrupt-00000002" in said[0]
    assert ck.saved_steps() == [1] and (copy / "corrupt-00000002").is_dir()
    ck.save(2, make_state(2), {}, num_vocab=NUM_VOCAB)  # the rerun makes the step again
    ck.wait()
    harm(max(files(copy / "00000002"), key=lambda path: path.stat().st_size))
    Checkpointer(copy, 9).restore(template(make_state()), say=said.append)
    assert "corrupt-00000002-2" in said[1] and (copy / "corrupt-00000002").is_dir()


def test_a_damaged_manifest_is_set_aside_not_cleaned_away(copy: Path) -> None:
    (copy / "00000002" / "manifest-0-of-1.json").write_text("")
    restored = Checkpointer(copy, 9).restore(template(make_state()), say=lambda line: None)
    assert restored is not None and restored.step == 1 and (copy / "corrupt-00000002").is_dir()


def test_when_all_are_damaged_it_says_so_and_never_starts_afresh_silently(copy: Path) -> None:
    for step in (1, 2):
        truncate(copy / f"{step:08d}" / "meta.json")
    with pytest.raises(ConfigError, match=r"no whole checkpoint is left.*meta\.json.*starts from the beginning"):
        Checkpointer(copy, 9).restore(template(make_state()), say=lambda line: None)
    assert Checkpointer(copy, 9).restore(template(make_state())) is None


def test_without_all_manifests_there_is_no_checkpoint(copy: Path) -> None:
    for name in ("corrupt-00000009", "notes", "00000007"):
        (copy / name).mkdir()
        (copy / name / "file").write_text("kept, but for a step without a manifest")
    shutil.copytree(copy / "00000001", copy / "00000005")
    (copy / "00000005" / "manifest-0-of-1.json").rename(copy / "00000005" / "manifest-0-of-2.json")
    (copy / "00000002" / "manifest-0-of-1.json").unlink()
    ck = Checkpointer(copy, 9)
    assert ck.saved_steps() == [1]
    assert sorted(path.name for path in copy.iterdir()) == ["00000001", "corrupt-00000009", "notes"]


# --------------------------------------------------------------------------------------------- mismatch


def test_another_architecture_is_refused_with_what_differs(copy: Path) -> None:
    ck = Checkpointer(copy, 9)
    good = template(make_state())

    def refuse(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            ck.restore(good._replace(**changes))

    def with_leaf(path: tuple[str, ...], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        params = jax.tree.map(lambda x: x, good.trainable)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.ShapeDtypeStruct(shape, dtype)
        return params

    refuse(r"missing trainable/unembed/kernel \(10, 8\)", trainable=with_leaf(("unembed", "kernel"), (10, 8)))
    refuse(r"trainable/final_norm/scale has shape \(8,\), expected \(9,\)", trainable=with_leaf(("final_norm", "scale"), (9,)))
    refuse("scale has type float32, expected bfloat16", trainable=with_leaf(("final_norm", "scale"), (8,), jnp.bfloat16))
    refuse(r"surplus trainable/embed/tokens", trainable={key: good.trainable[key] for key in ("layers", "final_norm")})
    refuse(r"embed/tokens has shape \(10, 8\), expected \(9, 8\)", trainable=with_leaf(("embed", "tokens"), (9, 8)))
    refuse(r"embed/tokens has shape \(10, 8\), expected \(16, 9\)", trainable=with_leaf(("embed", "tokens"), (16, 9)))
    refuse(r"key has type key<rbg>, expected key<fry>", key=jax.eval_shape(lambda: jax.random.key(0)))
    assert ck.saved_steps() == [1, 2], "a mismatch is not damage"
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 .* there are 1, 2"):
        ck.restore(good, step=3)


@pytest.mark.parametrize(("leaf", "num_vocab"), [("embed/tokens", None), ("embed/positions", NUM_VOCAB)])
def test_only_vocabulary_of_known_size_is_padded(tmp_path: Path, leaf: str, num_vocab: int | None) -> None:
    ck = Checkpointer(tmp_path)
    ck.save(1, {leaf: jnp.ones((12, 2))}, {}, num_vocab=num_vocab)
    with pytest.raises(ConfigError, match=rf"{leaf} has shape \(12, 2\), expected \(16, 2\)"):
        ck.restore({leaf: jax.ShapeDtypeStruct((16, 2), jnp.float32)})


@pytest.mark.parametrize("values", [{"keep_last": 0}, {"keep_every": -1}])
def test_a_policy_that_keeps_nothing_is_refused(tmp_path: Path, values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="keep_last"):
        Checkpointer(tmp_path, **values)


# ------------------------------------------------------------------------------------------- params alone


def test_params_from_a_run_its_checkpoints_or_one_of_them(copy: Path) -> None:
    shapes = template(make_state(vocab=16)).trainable
    for folder, step in ((copy.parent, 2), (copy, 2), (copy / "00000001", 1)):
        loaded = load_params(folder, shapes)
        assert loaded.step == step
        assert_same_bits(loaded.state, make_state(step, vocab=16).trainable)
        assert read_meta(folder) == (step, {"position": step})


def test_params_may_be_cast_and_come_from_several_branches(tmp_path: Path) -> None:
    state = {"trainable": {"a": jnp.float32([1.5, 2]), "b": jnp.ones(2)}, "ema": {"a": jnp.zeros(2)}, "opt_state": {"a": jnp.ones(5)}}
    ck = Checkpointer(tmp_path)
    ck.save(1, state, {})
    ck.wait()
    shapes = {name: jax.ShapeDtypeStruct((2,), jnp.bfloat16) for name in "ab"}
    assert_same_bits(load_params(tmp_path, shapes).state, {"a": jnp.bfloat16([1.5, 2]), "b": jnp.ones(2, jnp.bfloat16)})
    assert_same_bits(load_params(tmp_path, shapes, branches=("ema", "trainable")).state["a"], jnp.zeros(2, jnp.bfloat16))
    with pytest.raises(ConfigError, match=r"surplus b \(2,\)"):
        load_params(tmp_path, {"a": shapes["a"]})


def test_loading_params_passes_over_damage_and_changes_nothing(copy: Path) -> None:
    truncate(max(files(copy / "00000002"), key=lambda path: path.stat().st_size))
    before = [(path, path.stat().st_mtime_ns) for path in files(copy)]
    said: list[str] = []
    assert load_params(copy, template(make_state()).trainable, say=said.append).step == 1
    assert "00000002 is damaged" in said[0] and before == [(path, path.stat().st_mtime_ns) for path in files(copy)]


@pytest.mark.parametrize("name", ["", "missing"])
def test_params_from_a_folder_without_checkpoints(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="give a run directory, its checkpoints folder, or one checkpoint"):
        load_params(tmp_path / name, {})


# ---------------------------------------------------------------------------------------------- start-up


def test_orbax_is_not_imported_until_it_is_used() -> None:
    code = "import sys, jaxllm.checkpoint; sys.exit('orbax.checkpoint' in sys.modules or 'tensorstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_manifest_lists_every_file(two: Path) -> None:
    listed = set(json.loads((two / "00000002" / "manifest-0-of-1.json").read_text()))
    present = {path.relative_to(two / "00000002").as_posix() for path in files(two / "00000002")}
    assert present - listed == {"manifest-0-of-1.json"} and listed < present


if __name__ == "__main__":
    across_meshes(Path(sys.argv[1]))
