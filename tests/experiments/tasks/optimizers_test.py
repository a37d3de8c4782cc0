"""The first update moves, weight decay spares scales and biases, old configs train as before."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from alignment.models import transformer
from experiments.configs import base
from experiments.tasks import graph_runs, language, optimizers


def _section(**changes):
  config = base.language_model("ipo", "x", algorithm={})
  config.optimizer.update({"learning_rate": 1.0, "warmup_steps": 4} | changes)
  return config.optimizer


def test_the_schedule_wastes_no_update_and_meets_the_old_one_at_the_peak():
  new, old = (
    optimizers.schedule(_section(warmup_from=first), 12, warmup_steps=4) for first in (1, 0)
  )
  rates = [float(new(step)) for step in range(12)]
  np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
  assert rates[-1] > 0  # neither the last update
  np.testing.assert_allclose(rates[4:], [float(old(step)) for step in range(4, 12)], rtol=1e-6)
  assert float(old(0)) == 0
  assert float(optimizers.schedule(_section(), 12, warmup_steps=0)(0)) == 1


def test_configs_of_old_runs_train_as_they_did():
  section = ml_collections.ConfigDict(
    {"learning_rate": 0.1, "warmup_steps": 2, "final_scale": 0.5, "clip_norm": 1.0}
    | {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1}
  )
  rates = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 8, 0.05)
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rates, b1=0.9, b2=0.99, weight_decay=0.1)
  )
  params = {"scale": jnp.ones(2), "kernel": jnp.ones((2, 2))}
  results = []
  for optimizer in (language.make_optimizer(section, 8), theirs):
    found, state = params, optimizer.init(params)
    for _ in range(3):
      updates, state = optimizer.update(jax.tree.map(jnp.ones_like, found), state, found)
      found = optax.apply_updates(found, updates)
    results.append(found)
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_weight_decay_leaves_norm_scales_and_biases_alone():
  config = transformer.TransformerConfig(
    vocab_size=5, num_layers=2, width=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_width=4,
    max_length=8,
  )  # fmt: skip
  params = jax.eval_shape(lambda key: transformer.init_params(config, key), jax.random.key(0))
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
  params["dense"] = {"bias": jnp.ones(3)}
  optimizer = language.make_optimizer(_section(weight_decay=0.1, warmup_steps=0), 8)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  stays = {"attention_norm", "mlp_norm", "final_norm", "dense"}
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    names = {key.key for key in path}
    assert np.all(update == 0) == bool(names & stays), path


def test_graphs_keep_the_warm_up_and_the_decay_of_their_authors():
  graph = ml_collections.ConfigDict(
    {"optimizer": base.graph("bgrl", "x", algorithm={}).optimizer, "train": {"num_steps": 9}}
  )
  graph.optimizer.weight_decay = 0.1
  optimizer = graph_runs.make_optimizer(graph)
  leaves = {"scale": jnp.ones(2), "kernel": jnp.ones(2)}
  state, zeros = optimizer.init(leaves), jax.tree.map(jnp.zeros_like, leaves)
  first, state = optimizer.update(zeros, state, leaves)
  second, _ = optimizer.update(zeros, state, leaves)
  assert all(np.all(leaf == 0) for leaf in first.values())
  assert all(np.all(leaf != 0) for leaf in second.values())
