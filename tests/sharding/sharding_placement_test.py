"""Sharded steps against one device, donation and its traps, and one compilation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding

P = jax.sharding.PartitionSpec
MESHES = [
  {"data": 8},
  {"fsdp": 8},
  {"tensor": 8},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 4, "fsdp": 1, "tensor": 2},
]
OPTIMIZER = optax.sgd(0.1)


class State(NamedTuple):
  params: Any
  opt_state: Any
  key: Any
  step: Any


def _rules(mesh):
  """Column then row splitting; an axis that the mesh lacks is left out."""
  fsdp, tensor = (axis if axis in mesh.shape else None for axis in ("fsdp", "tensor"))
  return (
    ("(query|up)$", P(fsdp, tensor)),
    ("(output|down)$", P(tensor, fsdp)),
    ("embedding$", P(tensor, fsdp)),
    (".*", P()),
  )


def _init(key):
  shapes = {"embedding": (16, 8), "query": (8, 8), "output": (8, 8), "up": (8, 32), "down": (32, 8)}
  keys = jax.random.split(key, len(shapes))
  params = {
    name: jax.random.normal(k, shape) / shape[0] ** 0.5
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }
  params["scale"] = jnp.ones(8)
  return State(params, OPTIMIZER.init(params), key, jnp.zeros((), jnp.int32))


def _loss(params, state, batch, key):
  """One attention layer and one hidden layer, on token ids; the key perturbs the weights."""
  del state
  x = params["embedding"][batch["tokens"]] * params["scale"]  # [B, T, D]
  scores = jnp.einsum("btd,de,bse->bts", x, params["query"], x)
  x = x + jax.nn.softmax(scores, axis=-1) @ x @ params["output"]
  x = x + jnp.tanh(x @ params["up"]) @ params["down"]
  noise = jax.random.normal(key, params["scale"].shape)
  errors = jnp.square(jnp.mean(x * (1 + 0.1 * noise), axis=(1, 2)) - batch["targets"])
  value = jnp.mean(errors * batch["weight"])
  return value, ({"loss": value, "rows": jnp.asarray(errors.size)}, ())


def _update(state, batch, key, num_microbatches=1):
  grad_fn = sharding.accumulate_grads(_loss, num_microbatches)
  (_, (metrics, _)), grads = grad_fn(state.params, state, batch, key)
  updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
  return State(params, opt_state, state.key, state.step + 1), metrics


def _batch(rows=16):
  rng = np.random.default_rng(0)
  return {
    "tokens": rng.integers(0, 16, (rows, 5)),
    "targets": rng.normal(size=rows).astype(np.float32),
    "weight": 1.0,  # a scalar field, as a soft label that all pairs share
    "prompt": None,
  }


def _assert_close(got, want):
  # The compiler sums in another order on each mesh: a few float32 rounding errors, no more.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def _bits(state):
  return state._replace(key=jax.random.key_data(state.key))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_eight_devices_equal_one(axes):
  mesh = sharding.make_mesh(axes)
  rules = _rules(mesh)
  key = jax.random.key(1)
  state = _init(jax.random.key(0))
  want_grads = jax.grad(_loss, has_aux=True)(state.params, state, _batch(), key)[0]
  want, want_metrics = jax.jit(_update)(state, _batch(), key)

  sharded = sharding.init_sharded(_init, mesh, rules, jax.random.key(0))
  _assert_close(_bits(sharded), _bits(state))
  batch = sharding.shard_batch(_batch(), mesh)
  grads = jax.jit(jax.grad(_loss, has_aux=True))(sharded.params, sharded, batch, key)[0]
  _assert_close(grads, want_grads)
  got, metrics = sharding.jit_update(_update, mesh, rules)(sharded, _batch(), key)
  _assert_close(_bits(got), _bits(want))
  _assert_close(metrics, want_metrics)
  # Each device holds its part only: of `up` 32 * 8 numbers over fsdp * tensor devices.
  parts = mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1)
  assert got.params["up"].addressable_shards[0].data.size == 8 * 32 // parts
  assert metrics["loss"].sharding.is_fully_replicated


class _Compilations:
  """Counts what JAX compiles inside a `with` block."""

  def __enter__(self):
    self.count = 0
    self._counting = True
    jax.monitoring.register_event_duration_secs_listener(self._heard)
    return self

  def _heard(self, event, duration, **kwargs):
    self.count += self._counting and event.endswith("backend_compile_duration")

  def __exit__(self, *_):
    self._counting = False


def test_one_compilation():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  traces = []

  def update(state, batch, key):
    traces.append(None)
    return _update(state, batch, key)

  step = sharding.jit_update(update, mesh, _rules(mesh))
  run_key = jax.random.key(1)
  state = _init(jax.random.key(0))
  key = jax.random.fold_in(run_key, 0)  # on one device
  with _Compilations() as first:
    step.lower(state, _batch(), key).compile()  # consumes nothing
  assert first.count > 0  # the counter hears
  with _Compilations() as again:
    state, _ = step(state, _batch(), key)
  assert again.count == 0
  batch, key = sharding.shard_batch(_batch(), mesh), jax.random.fold_in(run_key, state.step)
  with _Compilations() as later:
    state, _ = step(state, _batch(), key)  # the key on the mesh, as state.step is
    state, _ = step(state, batch, key)  # a batch that is there already
  assert later.count == 0
  step(state, batch, jax.device_put(run_key, jax.devices()[3]))  # bound to another device
  assert len(traces) == 1


def test_only_the_state_is_donated():
  mesh = sharding.make_mesh({"data": -1})
  step = sharding.jit_update(_update, mesh, sharding.REPLICATED)
  first = sharding.init_sharded(_init, mesh, sharding.REPLICATED, jax.random.key(0))
  batch, key = sharding.shard_batch(_batch(), mesh), jax.random.key(1)
  step(first, batch, key)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
  assert not batch["tokens"].is_deleted() and not key.is_deleted()
  with pytest.raises(ValueError, match="earlier step consumed"):
    step(first, batch, key)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("kind", ["numpy", "one device", "other sharding"])
def test_a_state_from_elsewhere_survives(num_devices, kind):
  mesh = sharding.make_mesh({"fsdp": -1}, devices=jax.devices()[:num_devices])
  state = _init(jax.random.key(0))
  want = _bits(jax.tree.map(jnp.copy, state))
  if kind == "numpy":
    state = state._replace(params=jax.tree.map(np.asarray, state.params), step=0)
  if kind == "other sharding":
    rest = sharding.make_mesh({"tensor": -1})
    state = sharding.place(state, rest, _rules(rest))
  step = sharding.jit_update(_update, mesh, _rules(mesh))
  new, _ = step(state, _batch(), jax.random.key(1))
  for _ in range(3):
    new, _ = step(new, _batch(), jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, _bits(state), want)


def test_aliased_leaves_do_not_break_donation():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})

  def update(state, batch, key):
    del batch
    noise = jax.random.normal(key, (8, 8))
    online = state["online"] + noise
    return {"online": online, "target": state["target"], "key": state["key"]}, {"x": noise.sum()}

  rules = (("online|target", P("fsdp")),)
  weight, key = jnp.ones((8, 8)), jax.random.key(0)
  placed = sharding.place({"w": weight, "key": key}, mesh, (("w", P("fsdp")),))
  for one, run_key in ((weight, key), (placed["w"], placed["key"])):
    step = sharding.jit_update(update, mesh, rules)
    # One array in two fields of the state, and the state's own key as this step's key.
    state, _ = step({"online": one, "target": one, "key": run_key}, np.ones(8), run_key)
    state, _ = step(state, np.ones(8), run_key)
    np.testing.assert_array_equal(state["target"], 1.0)
    assert not run_key.is_deleted()
    noise = jax.random.normal(jax.random.key(0), (8, 8))
    _assert_close(state["online"], 1 + noise + noise)


def test_init_takes_pretrained_arrays_and_they_survive():
  mesh = sharding.make_mesh({"fsdp": 8})
  rules = (("kernel", P("fsdp")),)
  local = {"kernel": np.arange(16.0, dtype=np.float32)}
  bound = jax.device_put(local, jax.devices()[3])
  placed = sharding.place(local, mesh, rules)

  def init(key, params):
    return {"params": params, "target": params, "key": key}

  step = sharding.jit_update(lambda s, b, k: (s, {"mean": b.mean()}), mesh, rules)
  for params in (local, bound, placed):
    state = sharding.init_sharded(init, mesh, rules, jax.random.key(0), params)
    assert state["params"]["kernel"].addressable_shards[0].data.shape == (2,)
    state, _ = step(state, np.ones(8), jax.random.key(0))
    np.testing.assert_array_equal(params["kernel"], np.arange(16))
    np.testing.assert_array_equal(state["target"]["kernel"], np.arange(16))


def test_rule_errors_come_before_compute():
  mesh = sharding.make_mesh({"fsdp": 8})
  with pytest.raises(ValueError, match=r"'kernel'.*size 6"):
    sharding.init_sharded(lambda: {"kernel": jnp.ones((6, 2))}, mesh, (("kernel", P("fsdp")),))
  step = sharding.jit_update(_update, mesh, (("params", P()),))
  with pytest.raises(ValueError, match="no rule matches leaf 'target'"):
    step({"params": jnp.ones(4), "target": jnp.ones(4)}, _batch(), jax.random.key(0))


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_micro_batches_stay_on_their_devices(num_microbatches):
  mesh = sharding.make_mesh({"data": 8})
  update = functools.partial(_update, num_microbatches=num_microbatches)
  state = sharding.init_sharded(_init, mesh, sharding.REPLICATED, jax.random.key(0))
  batch = sharding.shard_batch(_batch(), mesh)
  text = jax.jit(update).lower(state, batch, jax.random.key(1)).compile().as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
