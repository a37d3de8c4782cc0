"""Tests of loop.checkpointing: states are restored as saved, and damage is detected."""

import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sharding
from experiments.loop import checkpointing

P = jax.sharding.PartitionSpec
RULES = (("kernel", P("fsdp")), (".*", P()))


class State(NamedTuple):
  params: Any
  step: jax.Array
  key: jax.Array
  extra: Any


def _init(key):
  return State(
    params={"kernel": jax.random.normal(key, (8, 3)), "half": jnp.ones(5, jnp.bfloat16) / 3},
    step=jnp.array(7, jnp.int32),
    key=jax.random.split(key, 2),
    extra=((), None, {"flags": jnp.array([True, False]), "bytes": jnp.arange(3, dtype=jnp.uint8)}),
  )


def _mesh(num_devices):
  return sharding.make_mesh({"data": 1, "fsdp": num_devices}, jax.devices()[:num_devices])


def _state(num_devices=1, seed=0):
  return sharding.init_sharded(_init, _mesh(num_devices), RULES, jax.random.key(seed))


def _target(num_devices=1, init=_init):
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = sharding.infer_shardings(shapes, RULES, _mesh(num_devices))
  return jax.tree.map(
    lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings
  )


def _bits(tree):
  def to_numpy(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)

  return [(leaf.dtype, leaf.tobytes()) for leaf in map(to_numpy, jax.tree.leaves(tree))]


def _save(folder, *steps, **options):
  checkpointer = checkpointing.Checkpointer(folder, **options)
  for step in steps:
    checkpointer.save(step, _state(seed=step), {"data": step})
  checkpointer.close()
  return checkpointing.Checkpointer(folder, **options)


def _damage(folder: pathlib.Path, how: str):
  """Breaks every large file of a checkpoint's state, or removes its record."""
  if how == "record":
    (folder / "record" / "metadata").write_text('{"da')
    return
  for path in (folder / "state").rglob("*"):
    if path.is_file() and (path.parent.name == "d" or path.name.startswith("manifest")):
      data = path.read_bytes()
      if how == "cut":
        path.write_bytes(data[: len(data) // 2])
      elif how == "removed":
        path.unlink()


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_a_state_saved_on_eight_devices_returns_bit_for_bit_on_others(tmp_path, num_devices):
  state = _state(8)
  expected = _bits(state)
  checkpointer = checkpointing.Checkpointer(tmp_path)
  checkpointer.save(3, state, {"data": [1, 2]})
  checkpointer.wait()

  restored = checkpointer.restore_last(_target(num_devices))

  assert restored.step == 3
  assert restored.record["data"] == [1, 2]
  assert _bits(restored.state) == expected
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  assert len(restored.state.params["kernel"].sharding.device_set) == num_devices
  assert jax.dtypes.issubdtype(restored.state.key.dtype, jax.dtypes.prng_key)


def test_the_caller_may_donate_the_state_as_soon_as_save_returns(tmp_path):
  state = _state(seed=1)
  expected = _bits(state)
  checkpointer = checkpointing.Checkpointer(tmp_path)
  checkpointer.save(1, state, {})
  overwrite = jax.jit(
    lambda s: s._replace(params=jax.tree.map(jnp.zeros_like, s.params)), donate_argnums=0
  )
  for _ in range(5):
    state = overwrite(state)
  checkpointer.wait()
  assert _bits(checkpointer.restore_last(_target()).state) == expected


@pytest.mark.parametrize(
  ("maximise", "keep", "kept"), [(True, 1, [2, 5]), (True, 2, [2, 4, 5]), (False, 1, [1, 5])]
)
def test_the_best_and_the_last_are_kept(tmp_path, maximise, keep, kept):
  scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.4}
  checkpointer = _save(tmp_path, 1, 2, 3, 4, 5, keep=keep, scores=scores, maximise=maximise)
  assert checkpointer.steps() == kept
  assert checkpointer.best_step() == kept[0]


def test_without_scores_only_the_last_are_kept(tmp_path):
  checkpointer = _save(tmp_path, 1, 2, 3)
  assert checkpointer.steps() == [3]
  assert checkpointer.best_step() is None


def test_orbax_refusing_a_step_silently_is_an_error(tmp_path):
  checkpointer = _save(tmp_path, 4)
  for step in (4, 3):
    with pytest.raises(checkpointing.CheckpointError, match="exists already"):
      checkpointer.save(step, _state(), {})


def test_a_state_that_is_not_finite_is_not_written(tmp_path):
  checkpointer = _save(tmp_path, 1)
  state = _state()
  bad = state._replace(params={**state.params, "half": state.params["half"].at[2].set(jnp.nan)})
  with pytest.raises(checkpointing.NotFiniteError, match="params/half"):
    checkpointer.save(2, bad, {})
  assert checkpointer.steps() == [1]


def test_orbax_casting_another_dtype_silently_is_an_error(tmp_path):
  checkpointer = _save(tmp_path, 1)

  def init(key):
    state = _init(key)
    return state._replace(params=jax.tree.map(lambda x: x.astype(jnp.float16), state.params))

  with pytest.raises(ValueError, match=r"'params/half' is bfloat16\[5\] .* float16\[5\] here"):
    checkpointer.restore_last(_target(init=init))
  assert checkpointer.steps() == [1]  # not taken for a broken file


def test_a_missing_leaf_and_another_shape_are_errors(tmp_path):
  checkpointer = _save(tmp_path, 1)
  with pytest.raises(ValueError, match=r"'params/half' is .* in the checkpoint and absent here"):
    checkpointer.restore_last(
      _target(init=lambda key: _init(key)._replace(params={"kernel": jnp.ones((8, 3))}))
    )
  with pytest.raises(ValueError, match=r"'step' is int32\[\] .* and int32\[2\] here"):
    checkpointer.restore_last(_target(init=lambda key: _init(key)._replace(step=jnp.zeros(2, int))))


def test_a_part_of_a_state_is_read_alone(tmp_path):
  """On other devices than it was saved from; a part that does not fit or is damaged is refused."""
  _save(tmp_path, 1).close()
  reader = checkpointing.Checkpointer(tmp_path, read_only=True)
  target = _target(2).params
  found = reader.restore_parts(1, {"params": target})
  assert found.keys() == {"params"} and _bits(found) == _bits(_state(seed=1).params)
  assert found["params"]["kernel"].sharding == target["kernel"].sharding
  larger = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=target["kernel"].sharding)
  with pytest.raises(
    ValueError, match=r"params/kernel' is float32\[8, 3\] .* float32\[16, 3\] here"
  ):
    reader.restore_parts(1, {"params": target | {"kernel": larger}})
  with pytest.raises(ValueError, match=r"'params/half' is .* in the checkpoint and absent here"):
    reader.restore_parts(1, {"params": {"kernel": target["kernel"]}})
  _damage(tmp_path / "1", "cut")
  with pytest.raises(checkpointing.CheckpointError, match=r"checkpoint 1 .* cannot be read"):
    reader.restore_parts(1, {"params": target})


@pytest.mark.parametrize("how", ["cut", "removed", "record"])
def test_a_corrupt_checkpoint_falls_back_to_the_one_before(tmp_path, how):
  checkpointer = _save(tmp_path, 1, 2, keep=2)
  _damage(tmp_path / "2", how)
  with pytest.warns(UserWarning, match="checkpoint 2 .* cannot be read.*Continuing from step 1"):
    restored = checkpointer.restore_last(_target())
  assert restored.step == 1
  assert _bits(restored.state) == _bits(_state(seed=1))
  assert (tmp_path / "2.unreadable").is_dir()  # kept for inspection
  checkpointer.save(2, _state(seed=5), {})
  checkpointer.wait()
  assert _bits(checkpointer.restore_last(_target()).state) == _bits(_state(seed=5))


def test_a_changed_number_in_a_readable_file_is_noticed(tmp_path):
  """Stands for a flipped bit that the file format does not check, or a write that mixed states."""
  checkpointer = _save(tmp_path, 1, 2, keep=2)
  changed = _state(seed=2)
  changed = changed._replace(step=changed.step + 1)
  with ocp.StandardCheckpointer() as writer:
    shutil.rmtree(tmp_path / "2" / "state")
    writer.save(tmp_path / "2" / "state", changed)
  with pytest.warns(UserWarning, match=r"the checksum of step differs"):
    assert checkpointer.restore_last(_target()).step == 1


def test_no_readable_checkpoint_is_an_error_and_nothing_is_moved(tmp_path):
  checkpointer = _save(tmp_path, 1, 2, keep=2)
  for step in ("1", "2"):
    _damage(tmp_path / step, "cut")
  with pytest.raises(checkpointing.CheckpointError, match=r"step|No earlier checkpoint"):
    checkpointer.restore_last(_target())
  assert checkpointer.steps() == [1, 2]


def test_evaluation_reads_past_a_corrupt_checkpoint_without_moving_it(tmp_path):
  _save(tmp_path, 1, 2, keep=2)
  _damage(tmp_path / "2", "cut")
  checkpointer = checkpointing.Checkpointer(tmp_path, read_only=True)
  with pytest.warns(UserWarning, match="cannot be read"):
    assert checkpointer.restore_last(_target()).step == 1
  assert checkpointer.steps() == [1, 2]


def test_a_half_written_folder_is_ignored(tmp_path):
  checkpointer = _save(tmp_path, 1)
  (tmp_path / "2.orbax-checkpoint-tmp-123").mkdir()
  assert checkpointer.steps() == [1]
  assert checkpointer.restore_last(_target()).step == 1


def test_an_empty_folder_restores_nothing(tmp_path):
  assert checkpointing.Checkpointer(tmp_path / "none").restore_last(_target()) is None


def test_a_read_only_disk_is_a_clear_error(tmp_path, monkeypatch):
  checkpointer = _save(tmp_path, 1)

  def fail(*args, **kwargs):
    raise OSError(30, "Read-only file system")

  monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
  with pytest.raises(checkpointing.CheckpointError, match=r"step 2 .*Read-only.*untouched"):
    checkpointer.save(2, _state(), {})


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
  """A limit on file size stands for a full disk: nothing else stops a write by root."""
  script = textwrap.dedent(
    f"""
    import resource, jax, jax.numpy as jnp
    from experiments.loop import checkpointing
    checkpointer = checkpointing.Checkpointer({str(tmp_path)!r})
    noise = lambda seed: {{"w": jax.random.normal(jax.random.key(seed), (200_000,))}}
    checkpointer.save(1, noise(1), {{}})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
      checkpointer.save(2, noise(2), {{}})
      checkpointer.wait()
    except checkpointing.CheckpointError as error:
      print("ERROR", error)
    try:
      checkpointer.close()
    except checkpointing.CheckpointError:
      pass
    again = checkpointing.Checkpointer({str(tmp_path)!r})
    restored = again.restore_last(jax.eval_shape(noise, 1))
    print("STEP", restored.step, bool((restored.state["w"] == noise(1)["w"]).all()))
    """
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
  assert "ERROR cannot write the checkpoint" in done.stdout, done.stdout + done.stderr
  assert "STEP 1 True" in done.stdout, done.stdout + done.stderr


def test_keep_below_one_is_refused(tmp_path):
  with pytest.raises(ValueError, match="keep=0"):
    checkpointing.Checkpointer(tmp_path, keep=0)
