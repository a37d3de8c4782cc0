"""Training on device meshes: make a mesh, place a state by rules, take one step.

  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  state = sharding.init_sharded(init, mesh, rules, key)
  step = sharding.jit_update(update, mesh, rules)
  for batch in batches:
    state, metrics = step(state, batch, jax.random.fold_in(key, state.step))

An update is the same pure function on one device and on a mesh. `jax.jit` with `NamedSharding`
splits its work: the batch over the axes `data` and `fsdp`, the state by the rules. `gradient_step`
is the step that all algorithms take, `averages` moves the slow copies that some of them keep, and
`checks` validates their arguments (`from sharding import averages, checks`).
"""

from sharding.batches import DATA_AXES, accumulate_grads, local_rows, num_shards, shard_batch
from sharding.mesh import default_device, initialize_multihost, make_mesh
from sharding.placement import init_sharded, jit_update, place
from sharding.rules import REPLICATED, Rules, decay_mask, infer_shardings, tree_paths
from sharding.updates import gradient_step

__all__ = [
  "DATA_AXES",
  "REPLICATED",
  "Rules",
  "accumulate_grads",
  "decay_mask",
  "default_device",
  "gradient_step",
  "infer_shardings",
  "init_sharded",
  "initialize_multihost",
  "jit_update",
  "local_rows",
  "make_mesh",
  "num_shards",
  "place",
  "shard_batch",
  "tree_paths",
]
