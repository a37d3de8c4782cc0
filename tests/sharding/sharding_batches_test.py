"""Batches over devices, and gradients over micro-batches against one large batch."""

from typing import Any, NamedTuple

import compiled_programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding


def test_rows_lie_over_the_data_axes_only():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  batch = {"x": np.arange(24.0).reshape(8, 3), "ids": np.arange(8), "q": 0.7, "none": None}
  got = sharding.shard_batch(batch, mesh)
  assert got["q"] == 0.7 and got["none"] is None
  assert got["x"].dtype == jnp.float32
  np.testing.assert_array_equal(got["x"], batch["x"])
  for shard in got["ids"].addressable_shards:
    data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
    start = 2 * (2 * data + fsdp)
    np.testing.assert_array_equal(shard.data, [start, start + 1])


def test_arrays_without_an_axis_and_keys_are_placed():
  mesh = sharding.make_mesh({"data": 8})
  keys = jax.random.split(jax.random.key(0), 8)
  got = sharding.shard_batch({"scalar": np.float32(2), "keys": keys}, mesh)
  assert got["scalar"].sharding.is_fully_replicated
  assert got["keys"].sharding.spec[0] in ("data", ("data",))
  np.testing.assert_array_equal(jax.random.key_data(got["keys"]), jax.random.key_data(keys))


def test_a_mesh_without_data_axes_and_no_axes_give_whole_batches():
  rows = np.arange(6)
  whole = sharding.shard_batch(rows, sharding.make_mesh({"tensor": 8}))
  assert whole.sharding.is_fully_replicated
  whole = sharding.shard_batch(rows, sharding.make_mesh({"data": 8}), axes=())
  assert whole.sharding.is_fully_replicated


def test_a_placed_batch_is_returned_as_it_is():
  mesh = sharding.make_mesh({"data": 8})
  batch = sharding.shard_batch({"x": np.ones(8)}, mesh)
  assert sharding.shard_batch(batch, mesh)["x"] is batch["x"]


@pytest.mark.parametrize("make", [np.ones, jnp.ones])
def test_rows_that_do_not_divide_raise(make):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  with pytest.raises(ValueError) as error:
    sharding.shard_batch({"a": make(8), "b": {"c": make((6, 2))}}, mesh)
  for word in ("'b/c'", "6 rows", "4 shards", "'data' of 2 x 'fsdp' of 2", "multiple of 4"):
    assert word in str(error.value)


@pytest.mark.parametrize(
  "axes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_rows_of_a_split_data_set_are_fetched_and_not_the_set(axes):
  """A data set may lie over the devices, and a step index it: only the batch is exchanged."""
  mesh = sharding.make_mesh(axes)
  names = tuple(axis for axis in axes if axis in sharding.DATA_AXES)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(names))
  images = jax.ShapeDtypeStruct((800, 4, 4, 3), jnp.uint8, sharding=split)
  rows = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=split)
  weights = jax.ShapeDtypeStruct((48, 5), jnp.float32)

  def exchanged(function):
    text = jax.jit(jax.grad(function)).lower(weights, images, rows).compile().as_text()
    return compiled_programs.exchanged_shapes(text)

  def loss(weights, images, rows):
    return jnp.mean((images[rows].reshape(64, 48).astype(jnp.float32) @ weights) ** 2)

  shapes = exchanged(loss)
  assert max(shape[0] for shape in shapes if shape[1:] == (4, 4, 3)) <= 64
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def gather_all(weights, images, rows):
    return loss(weights, jax.lax.with_sharding_constraint(images, whole), rows)

  assert (800, 4, 4, 3) in exchanged(gather_all)


def test_an_unknown_axis_raises():
  with pytest.raises(ValueError, match=r"'rows'.*'data': 8"):
    sharding.shard_batch(np.ones(8), sharding.make_mesh({"data": 8}), axes=("rows",))


class State(NamedTuple):
  network_state: Any


def _loss(params, state, batch, key, *, power):
  """A mean over rows; the key is folded per row id, so that it does not matter where rows lie."""
  del key
  errors = jnp.abs(batch["x"] @ params["w"] + params["b"] - batch["y"]) ** power * batch["q"]
  seen = state.network_state + errors.size
  metrics = {"loss": jnp.mean(errors), "rows": jnp.asarray(errors.size), "any": errors.max() > 0}
  return jnp.mean(errors), (metrics, seen)


def _problem(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=3), dtype), "b": jnp.asarray(0.5, dtype)}
  batch = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=8), "q": 0.7, "none": None}
  return params, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), batch)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
@pytest.mark.parametrize("scalar", [0.7, np.float32(0.7), jnp.float32(0.7)], ids=type)
def test_parts_equal_the_whole(num_microbatches, scalar):
  params, batch = _problem()
  batch["q"] = scalar
  state, key = State(jnp.asarray(100)), jax.random.key(0)
  want = jax.value_and_grad(_loss, has_aux=True)(params, state, batch, key, power=2)
  grad_fn = sharding.accumulate_grads(_loss, num_microbatches)
  for call in (grad_fn, jax.jit(grad_fn, static_argnames="power")):
    got = call(params, state, batch, key, power=2)
    # Means of 8 numbers of order one in another order: a few units of 6e-8.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), got, want)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, want)
  assert got[0][1][1] == 108  # threaded: 100 and then each row once


def test_one_part_is_value_and_grad_itself(monkeypatch):
  marker = object()
  monkeypatch.setattr(jax, "value_and_grad", lambda loss, has_aux: (marker, loss, has_aux))
  assert sharding.accumulate_grads(_loss, 1) == (marker, _loss, True)


def test_sums_are_wider_than_bfloat16():
  # 256 + 1 is 256 in bfloat16: summed in it, 512 unit gradients would stop at 256.
  def loss(params, state, batch, key):
    return jnp.sum(params * jnp.mean(batch)), ({}, ())

  batch = jnp.ones((512, 1), jnp.bfloat16)
  (value, _), grads = sharding.accumulate_grads(loss, 512)(
    jnp.ones((), jnp.bfloat16), (), batch, jax.random.key(0)
  )
  assert value.dtype == grads.dtype == jnp.bfloat16
  assert value == grads == 1.0


def test_each_part_has_its_own_key_and_the_state_may_lack_a_network_state():
  def loss(params, state, batch, key):
    draw = jax.random.normal(key)
    return params * draw, ({"draw": draw}, draw)

  key = jax.random.key(3)
  draws = [jax.random.normal(jax.random.fold_in(key, index)) for index in range(4)]
  grad_fn = sharding.accumulate_grads(loss, 4)
  (_, (metrics, last)), grads = grad_fn(jnp.float32(1.0), (), jnp.ones(8), key)
  # One rounding error per addition.
  np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)
  np.testing.assert_allclose(grads, np.mean(draws), rtol=1e-6)
  np.testing.assert_allclose(last, draws[-1], rtol=1e-6)


def test_parts_partition_the_rows():
  def loss(params, state, batch, key):
    return params, ({}, batch["id"])

  parts = []
  for k in (2, 4):
    grad_fn = sharding.accumulate_grads(loss, k)
    _, (_, last) = grad_fn(jnp.float32(0), (), {"id": jnp.arange(8)}, None)[0]
    parts.append(last.tolist())
  assert parts == [[1, 3, 5, 7], [3, 7]]


def test_batches_that_do_not_divide_raise():
  params, batch = _problem()
  state, key = State(jnp.asarray(0)), jax.random.key(0)
  with pytest.raises(ValueError, match=r"num_microbatches is 3.*8 rows.*'x'"):
    sharding.accumulate_grads(_loss, 3)(params, state, batch, key, power=2)
  with pytest.raises(ValueError, match="'x' and 'y' have 8 and 4 rows"):
    short = batch | {"y": batch["y"][:4]}
    sharding.accumulate_grads(_loss, 4)(params, state, short, key, power=2)
  with pytest.raises(ValueError, match="nothing to split"):
    sharding.accumulate_grads(_loss, 4)(params, state, {"q": 1.0}, key, power=2)


@pytest.mark.parametrize("count", [0, -1, 2.0, None])
def test_bad_counts_raise(count):
  with pytest.raises(ValueError, match="num_microbatches"):
    sharding.accumulate_grads(_loss, count)
