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

from alignment import dro, sequences, srpo
from alignment.models import scalar_head, transformer
from experiments.data import digits
from experiments.loop import presets, training
from experiments.report import statistics
from experiments.studies import comparison
from experiments.studies import digits as runs
from experiments.tasks import bandits, digit_figures, digit_frontiers, digit_language, digit_methods


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


def test_the_worst_single_style_follows_from_the_shares_of_the_styles():
  styles = np.repeat([0, 1, 2], [46, 15, 39])
  # c beats a and loses to b; within c half is won.
  rate, letter = digits.against_one_style(styles)
  assert letter == "c"
  np.testing.assert_allclose(rate, 0.46 * 0.2 + 0.15 * 0.8 + 0.39 * 0.5, atol=1e-6)  # float32
  even = np.array([0, 1, 2, digits.NO_STYLE])
  np.testing.assert_allclose(digits.against_one_style(even)[0], 0.5, atol=1e-6)
  # Drawn against an opponent of that style whose rewards are the policy's.
  rng, count = np.random.default_rng(0), 4000
  rewards, styles = rng.normal(size=(2, count)) * 0.1, rng.choice(3, count, p=[0.46, 0.15, 0.39])
  policy = comparison.Player("policy", 1.0, rewards[0], styles)
  other = comparison.Player("only c", 1.0, rewards[1], np.full(count, 2))
  drawn = comparison.tournament([policy, other], intransitive=True)[0][1].value
  # Four standard errors of 4,000 games.
  np.testing.assert_allclose(drawn, digits.against_one_style(styles)[0], atol=0.032)


@functools.cache
def _problem():
  """Returns abstract parameters and data, enough to trace without computing."""
  config = presets.resolve("comparison:tiny")
  network = digit_language.network_of(config)
  params = jax.eval_shape(lambda: transformer.init_params(network, jax.random.key(0)))
  fitted = jax.eval_shape(scalar_head.from_decoder, params)
  make_data = functools.partial(digit_language.make_data, config)
  data = jax.eval_shape(make_data, params, fitted, fitted)
  one = data._replace(
    judged=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data.judged)
  )
  return network, params, fitted, one


@pytest.mark.parametrize("name", [*digit_methods.METHODS, "exploiter"])
def test_every_method_makes_a_batch_that_its_loss_takes(name):
  method = digit_methods.METHODS.get(name, digit_methods.EXPLOITER)
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
      digit_methods.Opponent(params, params, jnp.float32(0.5)),
    )
    batch = method.batch(state, draw)
    assert isinstance(batch, method.algorithm.Batch)
    own = dro.Params(params, fitted) if is_dro else params
    return method.algorithm.loss(own, state, batch, key, apply_fn=apply_fn, config=knob)[0]

  value = jax.eval_shape(loss, params, fitted, data, jax.random.key(0))
  assert value.shape == () and value.dtype == jnp.float32


def _draw(data, opponent=(), num_rows=8):
  network = digit_language.network_of(presets.resolve("comparison:tiny"))
  return digit_methods.Draw(
    data,
    jnp.arange(num_rows),
    jax.random.key(1),
    digit_language.generate_fn(network),
    transformer.make_apply_fn(network),
    scalar_head.make_apply_fn(network),
    opponent,
  )


@functools.cache
def _small_world():
  """Returns parameters of a small decoder, of two fitted models, and data drawn from it."""
  config = presets.resolve("comparison:tiny")
  config.data.num_prompts = 8
  network = digit_language.network_of(config)
  params = transformer.init_params(network, jax.random.key(0))
  noise = jax.random.normal(jax.random.key(2), (config.network.width,))
  fitted = scalar_head.from_decoder(params)
  fitted["scalar_head"] = {"kernel": noise, "bias": jnp.zeros(())}
  return params, digit_language.make_data(config, params, fitted, fitted)


@pytest.mark.slow  # compiles a study's program
def test_every_other_pair_holds_a_rewrite_with_its_reference_log_probabilities():
  params, data = _small_world()
  mixed = data.rewritten
  np.testing.assert_array_equal(mixed.tokens[:, 0], data.tokens[:, 0])
  np.testing.assert_array_equal(mixed.tokens[::2], data.tokens[::2])
  np.testing.assert_array_equal(mixed.srpo_ref_logps[::2], data.srpo_ref_logps[::2])
  assert np.all(np.any(mixed.tokens[1::2, 1] != data.tokens[1::2, 1], axis=1))
  # In the order of `srpo.SCORED`: the two answers, and each as a rewrite of each.
  one = jax.tree.map(lambda leaf: leaf[1], data.judged)
  state = type("State", (), {"params": params})()
  draw = _draw(data._replace(judged=one))
  batch = digit_methods.METHODS["srpo_rewrites"].batch(state, draw)
  six = srpo.six_sequences(batch)
  want = sequences.sequence_logps(draw.apply_fn(params, six), six.mask, reduction="sum")
  # float32 sums in another order.
  np.testing.assert_allclose(batch.ref_logps, want.reshape(8, 6), atol=1e-4)
  chosen = np.where(one.first_beats_rewrite[:, None], mixed.tokens[:, 0], mixed.tokens[:, 1])
  np.testing.assert_array_equal(batch.chosen_tokens, chosen)


@pytest.mark.slow
def test_fitted_preferences_are_antisymmetric_and_replace_only_the_intransitive_judge():
  _, data = _small_world()
  first, second = (
    sequences.Sequences(data.tokens[:, i], data.mask[:, i], *data.prompts) for i in (0, 1)
  )
  for judge, oracle in enumerate(digits.ORACLES):
    draw = _draw(data._replace(judged=jax.tree.map(lambda leaf, i=judge: leaf[i], data.judged)))
    found, swapped = draw.fitted_preferences(first, second), draw.fitted_preferences(second, first)
    np.testing.assert_allclose(found + swapped, 1, atol=1e-6)
    same = np.allclose(found, draw.preferences(first, second))
    assert same == (oracle == "scalar")


@pytest.mark.slow  # compiles a study's program
def test_an_exploiter_plays_against_the_two_points_of_its_victim():
  params, data = _small_world()
  one = jax.tree.map(lambda leaf: leaf[1], data.judged)
  # A policy that always writes one token, whatever the prompt.
  fixed = jax.tree.map(jnp.zeros_like, params)
  drawn = {}
  nash_md_sample = digit_methods.nash_md.sample

  def spy(*args, **kwargs):
    drawn["pair"] = nash_md_sample(*args, **kwargs)
    return drawn["pair"]

  state = type("State", (), {"params": params, "ema_params": params})()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(digit_methods.nash_md, "sample", spy)
    for weight, played in ((0.0, params), (1.0, fixed)):
      draw = _draw(data._replace(judged=one), digit_methods.Opponent(params, fixed, weight))
      digit_methods.EXPLOITER.batch(state, draw)
      _, opponent_key = jax.random.split(draw.key)
      near_key, far_key, _ = jax.random.split(opponent_key, 3)
      want = draw.generate(played, *draw.prompts(), far_key if weight else near_key)
      np.testing.assert_array_equal(drawn["pair"][1].tokens, want.tokens)


def test_neighbours_are_the_settings_around_a_kl():
  kls = [4.0, 1.0, 2.0]
  assert digit_methods.neighbours(kls, 3.0) == (2, 0, 0.5)
  assert digit_methods.neighbours(kls, 0.25) == (-1, 1, 0.25)
  assert digit_methods.neighbours(kls, 9.0) == (0, 0, 1.0)


def _frontier(kl):
  return 0.2 * np.sqrt(kl) - 0.03 * kl


def test_a_fitted_frontier_reads_a_concave_curve_that_a_chord_underestimates():
  kls = np.array([5.0, 0.3, 1.0])
  log_ratios = np.broadcast_to(kls[:, None, None], (3, 2, 50))
  found = digit_frontiers.value_at(log_ratios, 0.5 + _frontier(log_ratios), np.full(50, 0.5), 2.0)
  near, far, weight = digit_methods.neighbours(kls, 2.0)
  chord = (1 - weight) * _frontier(kls[near]) + weight * _frontier(kls[far])
  missed, error = _frontier(2.0) - chord, abs(found.value - 0.5 - _frontier(2.0))
  assert missed > 0.015 > 5 * error
  # Without noise every resample is the same, up to rounding.
  np.testing.assert_allclose([found.low, found.high], found.value, atol=1e-9)


def test_a_fitted_frontier_has_no_extremum_between_settings_and_ends_at_the_last():
  kls, heights = np.array([0.3, 1.0, 4.0, 9.0]), np.array([0.1, 0.3, 0.35, -2.0])  # one diverged
  fitted = digit_frontiers.curve(kls, heights, 0.0)
  grid = np.linspace(0, 4, 200)
  assert np.all(np.diff(fitted(grid)) > -1e-12) and fitted(4.0) == pytest.approx(0.35)
  np.testing.assert_allclose(fitted(kls), heights, atol=1e-12)
  np.testing.assert_array_equal(fitted(np.array([9.0, 20.0])), -2.0)
  # Settings at the reference, some by noise below it, say nothing.
  np.testing.assert_array_equal(
    digit_frontiers.curve(np.array([-0.1, 0.0]), kls[:2], 0.5)(1.0), 0.5
  )


def test_the_interval_of_a_frontier_covers_seeds_and_prompts():
  rng = np.random.default_rng(0)
  log_ratios = np.broadcast_to(np.array([0.5, 2.0, 4.0])[:, None, None], (3, 3, 400))
  values = _frontier(log_ratios) + rng.normal(size=(3, 3, 400))
  found = digit_frontiers.value_at(log_ratios, values, np.zeros(400), 2.0)
  assert found.low < _frontier(2.0) < found.high
  shifted = values + np.array([-0.3, 0.0, 0.3])[:, None]  # seeds that differ
  wider = digit_frontiers.value_at(log_ratios, shifted, np.zeros(400), 2.0)
  # The seeds' means spread by 0.3 / sqrt(3); a resample of three has 0.14 of it.
  assert wider.high - wider.low > 0.3 > found.high - found.low


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
  assert capsys.readouterr().err.count("is finished") == 6
  titles = [table.title for table in again.result.tables]
  assert any("opponents that are not in the table" in title for title in titles)
  assert again.result.metrics == outcome.result.metrics
  # Each of its runs can be used like any other run.
  for name in ("srpo_rewrites", "exploiter_of_nash_md_fitted"):
    sub = comparison.sub_config(config, name)
    experiment = runs.build_in(sub, tmp_path / name)
    state = training.restore(experiment, sub, tmp_path / name).state
    found = experiment.evaluate(state)
    saved = training.train(experiment, sub, tmp_path / name).result
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


def test_nobody_is_its_own_worst_opponent():
  best, other = (comparison.Player(name, 0.0, np.zeros(4), np.zeros(4, int)) for name in "xy")
  row = [statistics.clopper_pearson(50, 100), statistics.clopper_pearson(60, 100)]
  assert digit_figures.worst(best, [best, other], row)[0] == "y"
