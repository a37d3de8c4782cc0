"""Tests of the comparison: interpolation to one KL, the tournament, and every method's batch."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import dro
from alignment.models import scalar_head, transformer
from experiments.data import digits
from experiments.loop import presets, training
from experiments.report import statistics
from experiments.studies import comparison
from experiments.studies import digits as runs
from experiments.tasks import bandits, digit_language, digit_methods


def _arrays(kls, rewards, num_seeds=2, count=4000):
  shape = (len(kls), num_seeds, count)
  ones = np.ones(shape)
  return {
    "log_ratios": ones * np.array(kls)[:, None, None],
    "rewards": ones * np.array(rewards)[:, None, None],
    "styles": np.zeros(shape, int),
  }


REFERENCE = comparison.Player("reference", 0.0, np.zeros(4000), np.zeros(4000, int))


def test_a_policy_between_two_settings_is_their_coin_toss():
  player = comparison._at_kl("x", _arrays([4.0, 1.0, 2.0], [4.0, 1.0, 2.0]), REFERENCE, 2.5)
  assert player.kl == 2.5
  assert set(player.rewards) == {2.0, 4.0}
  # Four standard errors of 4,000 tosses at 1/4.
  np.testing.assert_allclose(np.mean(player.rewards == 4.0), 0.25, atol=0.028)


def test_below_the_nearest_setting_the_reference_is_the_neighbour():
  player = comparison._at_kl("x", _arrays([2.0, 4.0], [2.0, 4.0]), REFERENCE, 1.0)
  assert set(player.rewards) == {0.0, 2.0}
  np.testing.assert_allclose(np.mean(player.rewards == 2.0), 0.5, atol=0.032)


def test_a_method_that_does_not_get_there_is_taken_as_far_as_it_goes():
  player = comparison._at_kl("x", _arrays([0.5, 0.2], [5.0, 2.0]), REFERENCE, 2.0)
  assert player.kl == 0.5 and set(player.rewards) == {5.0}


def test_prompts_are_played_by_the_seeds_in_turn():
  arrays = _arrays([2.0], [0.0], num_seeds=2, count=4)
  arrays["rewards"] = np.array([[[1.0, 2, 3, 4], [10, 20, 30, 40]]])
  small = comparison.Player("reference", 0.0, np.zeros(4), np.zeros(4, int))
  player = comparison._at_kl("x", arrays, small, 2.0)
  np.testing.assert_array_equal(player.rewards, [1, 20, 3, 40])


def test_the_tournament_is_antisymmetric_and_its_intervals_are_binomial():
  better = comparison.Player("better", 1.0, np.full(4000, 0.1), np.zeros(4000, int))
  other = comparison.Player("b", 1.0, np.zeros(4000), np.ones(4000, int))
  rates = comparison.tournament([REFERENCE, better, other], intransitive=True)
  won = 1 / (1 + np.exp(-1))  # one unit of the Bradley-Terry scale
  assert rates[1][0].low < won < rates[1][0].high
  assert rates[0][2].low < digits.CYCLE_PROB < rates[0][2].high  # style a beats b
  for i, j in np.ndindex(3, 3):
    np.testing.assert_allclose(rates[i][j].value + rates[j][i].value, 1)
  want = statistics.clopper_pearson(round(rates[1][0].value * 4000), 4000)
  assert (rates[1][0].low, rates[1][0].high) == (want.low, want.high)


@functools.cache
def _problem():
  """Returns abstract parameters and data, enough to trace without computing."""
  config = presets.resolve("comparison:tiny")
  network = digit_language.network_of(config)
  params = jax.eval_shape(lambda: transformer.init_params(network, jax.random.key(0)))
  fitted = jax.eval_shape(scalar_head.from_decoder, params)
  data = jax.eval_shape(functools.partial(digit_language.make_data, config), params, fitted)
  one = data._replace(
    judged=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data.judged)
  )
  return network, params, fitted, one


@pytest.mark.parametrize("name", digit_methods.METHODS)
def test_every_method_makes_a_batch_that_its_loss_takes(name):
  method = digit_methods.METHODS[name]
  network, params, fitted, data = _problem()
  knob = method.algorithm.Config(**{method.knob: 0.5}, **method.options)
  logps_fn = transformer.make_apply_fn(network)
  is_dro = method.algorithm is dro
  apply_fn = scalar_head.make_policy_and_value_fn(network) if is_dro else logps_fn

  class _State:
    pass

  def loss(params, fitted, data, key):
    state = _State()
    state.params = state.ema_params = params
    draw = digit_methods.Draw(
      data,
      jnp.arange(4),
      key,
      digit_language.generate_fn(network),
      logps_fn,
      scalar_head.make_apply_fn(network),
    )
    batch = method.batch(state, draw)
    assert isinstance(batch, method.algorithm.Batch)
    own = dro.Params(params, fitted) if is_dro else params
    return method.algorithm.loss(own, state, batch, key, apply_fn=apply_fn, config=knob)[0]

  value = jax.eval_shape(loss, params, fitted, data, jax.random.key(0))
  assert value.shape == () and value.dtype == jnp.float32


def test_the_settings_of_a_method_are_one_config_with_an_axis():
  config = digit_methods.METHODS["nash_ema"].configs((0.5, 0.1))
  np.testing.assert_allclose(config.tau, [0.5, 0.1])
  np.testing.assert_allclose(config.ema_decay, [0.99, 0.99])
  with pytest.raises(ValueError, match="tau must be positive"):
    digit_methods.METHODS["ipo"].configs((0.5, -0.1))


def test_bad_settings_are_named_before_any_work(tmp_path):
  config = presets.resolve("comparison:tiny")
  config.methods = ("ppo",)
  with pytest.raises(ValueError, match=r"config.methods must be one of .*'dpo'"):
    comparison.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config.methods = ()
  with pytest.raises(ValueError, match=r"config.methods is empty"):
    comparison.run(config, tmp_path / "run")


@pytest.mark.slow  # six programs are compiled
def test_the_tiny_comparison_runs_and_resumes(tmp_path, capsys):
  config = presets.resolve("comparison:tiny")
  outcome = comparison.run(config, tmp_path)
  assert outcome.status == "finished"
  assert (tmp_path / "figures").is_dir() and (tmp_path / "report.html").stat().st_size > 10_000
  again = comparison.run(config, tmp_path)  # nothing is trained twice
  assert capsys.readouterr().err.count("is finished") == 4
  assert again.result.metrics == outcome.result.metrics
  # Each of its runs can be used like any other run.
  sub = comparison.sub_config(config, "srpo")
  experiment = runs.build_in(sub, tmp_path / "srpo")
  state = training.restore(experiment, sub, tmp_path / "srpo").state
  found = experiment.evaluate(state)
  saved = training.train(experiment, sub, tmp_path / "srpo").result
  np.testing.assert_array_equal(found.arrays["revised"], saved.arrays["revised"])


@pytest.mark.slow  # two compilations of a scan
def test_a_part_that_scans_over_several_steps_resumes_where_it_stopped(tmp_path):
  config = presets.resolve("comparison:tiny")
  config.train.inner_steps = 2
  config.sft.num_steps = 3
  part = comparison.sub_config(config, "sft")

  class Stopping(bandits.NoData):
    def __next__(self):
      if self.get_state()["step"] == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().__next__()

  records = []
  for name in ("whole", "stopped"):
    folder = tmp_path / name
    experiment = runs.build_in(part, folder)
    if name == "stopped":
      stopping = dataclasses.replace(experiment, batches=Stopping)
      assert training.train(stopping, part, folder).status == "interrupted"
    assert training.train(experiment, part, folder).status == "finished"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records.append([{**json.loads(line), "seconds": 0} for line in lines])
  assert records[0] == records[1]


@pytest.mark.parametrize(("methods", "match"), [(("dpo", "dpo"), "once"), ((), "is empty")])
def test_methods_are_given_once(methods, match, tmp_path):
  config = presets.resolve("comparison:tiny")
  config.methods = methods
  with pytest.raises(ValueError, match=match):
    comparison.run(config, tmp_path)
