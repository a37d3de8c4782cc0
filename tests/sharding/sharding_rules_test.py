"""Rules: first match, the shape of state paths, what is exempt, and every error."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding

P = jax.sharding.PartitionSpec
MESH = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))


class State(NamedTuple):
  params: Any
  opt_state: Any
  step: Any


def _specs(tree, rules):
  shardings = sharding.infer_shardings(tree, rules, MESH)
  specs = [leaf.spec for leaf in jax.tree.leaves(shardings)]
  return dict(zip(sharding.tree_paths(tree), specs, strict=True))


def test_paths_name_fields_keys_and_indices():
  params = {"Dense_0": {"kernel": jnp.ones((4, 4))}}
  state = State(params, optax.adam(1e-3).init(params), 0)
  assert sharding.tree_paths(state) == [
    "params/Dense_0/kernel",
    "opt_state/0/count",
    "opt_state/0/mu/Dense_0/kernel",
    "opt_state/0/nu/Dense_0/kernel",
    "step",
  ]


def test_first_match_wins_and_one_rule_reaches_parameters_and_moments():
  params = {"Dense_0": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))}}
  state = jax.eval_shape(lambda: State(params, optax.adam(1e-3).init(params), 0))
  rules = (("Dense_0/kernel", P("fsdp", "tensor")), ("kernel", P("data")), ("bias$", P("tensor")))
  specs = _specs(state, rules)
  for prefix in ("params", "opt_state/0/mu", "opt_state/0/nu"):
    assert specs[f"{prefix}/Dense_0/kernel"] == P("fsdp", "tensor")
    assert specs[f"{prefix}/Dense_0/bias"] == P("tensor")


def test_one_element_needs_no_rule():
  leaves = {"count": jnp.zeros(()), "step": 3, "key": jax.random.key(0), "v_row": jnp.zeros(1)}
  assert set(_specs(leaves, (("v_row", P("fsdp")),)).values()) == {P()}


def test_none_is_no_leaf():
  assert sharding.infer_shardings({"a": None}, (), MESH) == {"a": None}


def test_several_axes_split_one_dimension():
  rules = (("kernel", P(("data", "fsdp"), None)),)
  assert _specs({"kernel": np.ones((8, 3))}, rules) == {"kernel": P(("data", "fsdp"), None)}
  with pytest.raises(ValueError, match=r"size 6 .*'data' x 'fsdp' of size 4"):
    _specs({"kernel": np.ones((6, 3))}, rules)


def test_adafactor_takes_the_rules_of_its_parameters():
  params = {"kernel": jnp.ones((256, 128)), "bias": jnp.ones(128)}
  opt_state = optax.adafactor(1e-3).init(params)
  rules = (("kernel", P("fsdp", "tensor")), ("bias", P("tensor")))
  specs = _specs(State(params, opt_state, 0), rules)
  factors = [path for path in specs if "v_row/kernel" in path or "v_col/kernel" in path]
  assert len(factors) == 2 and all(specs[path] == P() for path in factors)
  assert specs["params/kernel"] == P("fsdp", "tensor")
  sharded = _specs(State(params, opt_state, 0), (("v_(row|col)/", P("fsdp")), *rules))
  assert all(sharded[path] == P("fsdp") for path in factors)


@pytest.mark.parametrize(
  ("leaf", "rules", "words"),
  [
    ((4, 4), (("bias", P()),), ["'params/w'", "(4, 4)", "no rule matches"]),
    ((4, 5), (("w", P(None, "tensor")),), ["'params/w'", "size 5", "'tensor' of size 2"]),
    ((4,), (("w", P("fsdp", "tensor")),), ["'params/w'", "(4,)", "fewer dimensions"]),
    ((4, 4), (("w", P("model")),), ["'model'", "'tensor': 2", "rules[0]"]),
    ((4, 4), ((".*", P()), ("w", P("model"))), ["'model'", "rules[1]"]),  # even when not reached
    ((4, 4), (("w", P("data", "data")),), ["'data'", "twice"]),
    ((4, 4), ("w", P("data")), ["rules[0]", "comma"]),
    ((4, 4), (("w", ("data",)),), ["rules[0]", "PartitionSpec"]),
    ((4, 4), (("w(", P()),), ["rules[0]", "regular expression"]),
  ],
)
def test_errors_name_the_leaf_and_the_rule(leaf, rules, words):
  with pytest.raises(ValueError) as error:
    sharding.infer_shardings({"params": {"w": np.ones(leaf)}}, rules, MESH)
  for word in words:
    assert word in str(error.value)


def test_replicated_matches_everything():
  assert _specs({"a": np.ones((3, 5)), "b": [np.ones(7)]}, sharding.REPLICATED) == {
    "a": P(),
    "b/0": P(),
  }
