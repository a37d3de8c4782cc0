"""NaN and None are refused by name, in every loss on arrays and in every config."""

import dataclasses
import importlib
import pkgutil

import finite_test
import numpy as np
import pytest

import alignment
import representation
import rl_theory
import sharding
from representation import image_augmentations
from rl_theory import markov, qtd, return_distributions
from sharding import checks


@pytest.mark.parametrize("name", finite_test.FUNCTIONS)
def test_nan_on_the_host_is_refused_by_name(name):
  shape = (finite_test.ROWS, finite_test.COLUMNS)
  x = np.full((6, *shape), np.nan, np.float32)
  p, mask = np.full(shape, 0.25, np.float32), np.ones(shape, bool)
  with pytest.raises(ValueError, match=r"\w+ must .* got nan"):
    finite_test.FUNCTIONS[name](x, p, mask, np.zeros(len(p), np.int32))


@pytest.mark.parametrize(
  "call",
  [
    lambda bad: qtd.quantile_td_error(np.zeros(2), bad),
    lambda bad: return_distributions.wasserstein(np.zeros(2), bad),
    lambda bad: markov.chain(means=bad),
  ],
)
def test_nan_in_other_arguments_is_refused_by_name(call):
  with pytest.raises(ValueError, match=r"\w+ must .* got nan at position"):
    call(np.array([0.0, np.nan]))


def _configs():
  for package in (alignment, rl_theory, representation):
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
      if not any(word in info.name for word in ("models", "networks", "openspiel")):
        module = importlib.import_module(info.name)
        config = getattr(module, "Config", None)
        if config is not None and config.__module__ == module.__name__:
          yield config
  yield image_augmentations.Augmentation


def test_none_in_a_config_is_refused_by_name():
  """When the config is made or, where JAX may have put it there, when something is computed."""
  configs = list(_configs())
  assert len(configs) > 25
  for config in configs:
    required = {
      field.name: 32
      for field in dataclasses.fields(config)
      if field.default is field.default_factory is dataclasses.MISSING
    }
    for field in dataclasses.fields(config):
      if field.default is not None:
        with pytest.raises(ValueError, match=field.name):
          checks.given(config(**{**required, field.name: None}))
    checks.given(config(**required))


@pytest.mark.parametrize("module", ["cfr", "mccfr"])
def test_solvers_look_at_their_config(module):
  module = importlib.import_module(f"rl_theory.{module}")
  field = "averaging_power" if module.__name__.endswith(".cfr") else "epsilon"
  with pytest.raises(ValueError, match=f"{field} of Config must be given, got None"):
    module.update(None, None, None, config=module.Config(**{field: None}))


def test_a_gradient_step_looks_at_its_config():
  with pytest.raises(ValueError, match="discount of Config must be given, got None: leave it out"):
    sharding.gradient_step(
      None, None, None, None, apply_fn=None, optimizer=None, config=qtd.Config(discount=None)
    )
