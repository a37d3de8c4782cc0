"""Places states on a mesh, and compiles the step, the only function that donates its argument."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sharding import batches
from sharding import rules as sharding_rules


def init_sharded(
  init_fn: Callable[..., Any], mesh: jax.sharding.Mesh, rules: sharding_rules.Rules, *args: Any
) -> Any:
  """Returns `init_fn(*args)`; each device computes and holds only its own part.

  Args:
    init_fn: pure function of arrays to a state, e.g. `init(key)`.
    mesh: the devices.
    rules: how the leaves of the state are split.
    *args: arguments of `init_fn`. Arrays that are already on the mesh stay where they are; all
      others are replicated while `init_fn` runs. So `place` pretrained weights first if they are
      too large for one device. None of the arguments is consumed.

  Returns:
    The state as global arrays, no two of which share memory.

  Raises:
    ValueError: as `sharding.infer_shardings`, before anything is computed.

  Example:
    >>> import sharding
    >>> mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
    >>> rules = ((".*", jax.sharding.PartitionSpec("data")),)
    >>> state = init_sharded(lambda size: {"scale": size * jnp.ones(2)}, mesh, rules, 3.0)
    >>> print(state["scale"])
    [3. 3.]
  """
  shapes = jax.eval_shape(init_fn, *args)
  shardings = sharding_rules.infer_shardings(shapes, rules, mesh)
  args = jax.tree.map(lambda leaf: _reachable(leaf, mesh), args)
  return jax.jit(init_fn, out_shardings=shardings)(*args)


def place(tree: Any, mesh: jax.sharding.Mesh, rules: sharding_rules.Rules) -> Any:
  """Returns a copy of a state or parameter tree on the mesh, e.g. of loaded weights.

  Args:
    tree: arrays or numbers; in a run of several processes the same in each.
    mesh: the devices.
    rules: how the leaves are split.

  Returns:
    The same tree as global arrays. Leaves that are already placed by the rules are not copied.

  Raises:
    ValueError: as `sharding.infer_shardings`.
  """
  return _place(tree, sharding_rules.infer_shardings(tree, rules, mesh))


class Step:
  """The step that `jit_update` returns."""

  def __init__(
    self,
    update: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    rules: sharding_rules.Rules,
    batch_axes: Sequence[str],
  ):
    self._update, self._mesh, self._rules, self._batch_axes = update, mesh, rules, batch_axes
    self._whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._jitted: Any = None
    self._shardings: Any = None

  def __call__(self, state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
    args = self._placed(state, batch, key)
    return self._jitted(*args)

  def lower(self, state: Any, batch: Any, key: Any) -> jax.stages.Lowered:
    """Returns the program for these arrays, without running it; the state is not consumed."""
    args = self._placed(state, batch, key)
    return self._jitted.lower(*args)

  def _placed(self, state: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
    if self._jitted is None:
      self._shardings = sharding_rules.infer_shardings(state, self._rules, self._mesh)
      self._jitted = jax.jit(
        self._update,
        in_shardings=(self._shardings, None, self._whole),  # None: the batch comes as it was placed
        out_shardings=(self._shardings, self._whole),
        donate_argnums=0,
      )
    batch = batches.shard_batch(batch, self._mesh, self._batch_axes)
    # Without this, a key on one device and a key made from `state.step` would compile twice.
    key = _place(key, jax.tree.map(lambda _: self._whole, key))
    return _separate(_place(state, self._shardings), (batch, key)), batch, key


def jit_update(
  update: Callable[..., Any],
  mesh: jax.sharding.Mesh,
  rules: sharding_rules.Rules,
  *,
  batch_axes: Sequence[str] = batches.DATA_AXES,
) -> Step:
  """Returns `update` as a step compiled once for a mesh, which reuses the state's memory.

  The step consumes its state: write `state, metrics = step(state, batch, key)` and do not read the
  old state again. Only the state is donated, never the batch or the key. A state that is not on
  this mesh yet (host or single-device arrays, another sharding, one array in two fields) is copied
  first, and the caller's arrays survive. At scale, make the state with `init_sharded` or `place` to
  avoid that copy. Arrays that `update` closes over must not be leaves of a placed state: donation
  would delete them.

  Args:
    update: `update(state, batch, key) -> (state, metrics)` with its static arguments bound
      (`functools.partial`), jitted or not. It must keep the state's tree, shapes and dtypes.
    mesh: the mesh to run on.
    rules: how the state is split; they are applied to the first state, once.
    batch_axes: mesh axes that split the batch, see `shard_batch`.

  Returns:
    `step(state, batch, key) -> (state, metrics)`: the state split by the rules, the metrics
    replicated. `batch` is a host batch or a global one (see `shard_batch`); `key` must be the same
    in all processes (a key made from `state.step` is on the mesh already). The step raises
    `ValueError` as `infer_shardings` and `shard_batch` do, or if an earlier step consumed the
    state. `step.lower(state, batch, key)` is the program, such as for
    `step.lower(...).compile().memory_analysis()`; the step that follows does not compile it again.

  Example:
    >>> import sharding
    >>> mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
    >>> def update(state, batch, key):
    ...   return state + jnp.mean(batch), {"mean": jnp.mean(batch)}
    >>> step = jit_update(update, mesh, sharding.REPLICATED)
    >>> state, metrics = step(jnp.zeros(()), jnp.ones(4), jax.random.key(0))
    >>> print(state, metrics["mean"])
    1.0 1.0
  """
  return Step(update, mesh, rules, batch_axes)


def _place(tree: Any, shardings: Any) -> Any:
  """Returns the tree with these shardings; a leaf that moves shares no memory with its source."""

  def move(leaf, sharding):
    if not isinstance(leaf, jax.Array):
      return jax.device_put(leaf, sharding, may_alias=False)
    if leaf.is_deleted():  # the runtime would crash on it
      raise ValueError(
        f"state holds a deleted array of shape {leaf.shape}: an earlier step consumed it. Write "
        "`state, metrics = step(state, batch, key)`, and copy arrays that you need after a step."
      )
    current = leaf.sharding
    if current == sharding:  # each step after the first
      return leaf
    if isinstance(current, jax.sharding.NamedSharding) and current.mesh == sharding.mesh:
      if current.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    return _copy(leaf, sharding)

  return jax.tree.map(move, tree, shardings)


def _copy(leaf: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  """Returns a copy of an array or of PRNG keys with another sharding."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    # `device_put` takes the numbers of a key to other processes, not the key itself.
    numbers = _copy(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))
  # `device_put` alone keeps the buffer on a device that both shardings have, and donating its
  # result would delete the caller's array.
  return jax.device_put(jnp.copy(leaf), sharding)


def _separate(state: Any, others: Any) -> Any:
  """Returns the state with a copy of each leaf that occurs twice, in it or in `others`."""
  seen = {id(leaf) for leaf in jax.tree.leaves(others)}

  def own(leaf):
    if id(leaf) in seen:
      return jnp.copy(leaf)
    seen.add(id(leaf))
    return leaf

  return jax.tree.map(own, state)


def _reachable(leaf: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the leaf, replicated on the mesh if it is committed to other devices."""
  if not isinstance(leaf, jax.Array) or not leaf.committed:
    return leaf
  if leaf.sharding.device_set == set(mesh.devices.flat):
    return leaf
  return _copy(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
