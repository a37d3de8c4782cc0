"""Runs on images: their batches, features and reports, and comparisons of several runs."""

import json

import jax
import numpy as np
import optax
import pytest

from experiments import main
from experiments.configs import byol as byol_config
from experiments.configs import image_comparison as comparison_config
from experiments.loop import presets, suite
from experiments.papers import byol as byol_paper
from experiments.report import records, results
from experiments.studies import image_comparison
from experiments.tasks import image_runs
from representation import byol_recipes

# The smallest network that has all parts: tests wait for its compilation.
SMALL = [
  "--config.network.encoder=resnet4",
  "--config.network.hidden=8",
  "--config.network.projection=4",
  "--config.eval.num_epochs=2",
  "--config.eval.probes=knn,linear",
]


def _config(preset="tiny", **fields):
  config = presets.resolve(f"byol:{preset}")
  config.network.update({"encoder": "resnet4", "hidden": 8, "projection": 4})
  for name, value in fields.items():
    section, _, field = name.partition("__")
    config[section][field] = value
  return config


@pytest.mark.slow  # half a minute
@pytest.mark.xdist_group("byol_run")
def test_a_tiny_run_reports_probes_views_and_neighbours(tmp_path):
  folder = tmp_path / "run"
  command = ["--config=byol:tiny", f"--workdir={folder}", "--config.train.num_steps=3", *SMALL]
  assert main.run([*command, "--config.eval.every=2"]) == 0
  result = json.loads((folder / "results.json").read_text())["result"]
  names = {
    f"{probe}_accuracy{end}" for probe in ("knn", "linear") for end in ("", "_untrained", "_pixels")
  }
  assert names <= set(result["metrics"])
  history = records.JsonLines(folder / "metrics.jsonl").read()
  assert [row["step"] for row in history.evals] == [2, 3]
  assert history[0]["byol/target_decay"] == pytest.approx(0.99)
  # The rows of a step are images of the training set, each once in an epoch.
  assert len(set(history[0]["ids"])) == 64
  drawn = {path.stem for path in (folder / "figures").glob("*.png")}
  assert {"collapse", "views", "neighbours", "features"} <= drawn


def test_features_do_not_depend_on_the_size_of_a_batch():
  images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
  found = []
  for batch_size in (2, 7):
    config = _config(eval__batch_size=batch_size)
    embedder = image_runs.Embedder(config, image_runs.make_encoder(config))
    # One state for both: how its statistics are found depends on the size.
    if not found:
      params, state = embedder.untrained(images)
    found.append(embedder(params, state, images))
  assert found[0].shape == (7, 8)
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)  # rounding in another order


def test_untrained_statistics_are_those_of_the_images():
  # Bytes of 0 and 255 alone: without calibration, the means would be 0.
  images = np.random.default_rng(0).choice([0, 255], (64, 8, 8, 3)).astype(np.uint8)
  config = _config()
  embedder = image_runs.Embedder(config, image_runs.make_encoder(config))
  _, state = embedder.untrained(images)
  assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(state))


def test_the_rows_of_a_step_are_its_images():
  config = _config()
  data = image_runs.load(config)
  ids, batch = next(image_runs.make_batches(config, data)())
  images, labels = image_runs.take(batch)
  np.testing.assert_array_equal(images, data.images[ids])
  np.testing.assert_array_equal(labels, data.labels[ids])


def test_images_of_files_are_cropped_by_the_host():
  config = _config(data__from_files=True, eval__baselines=False)
  data = image_runs.load(config)
  ids, batch = next(image_runs.make_batches(config, data)())
  pair, labels = image_runs.take(batch)
  assert [view.shape for view in pair] == [(64, 8, 8, 3)] * 2
  np.testing.assert_array_equal(labels, data.labels[ids])
  np.testing.assert_array_equal(data.images[ids], image_runs.load(_config()).images[ids])
  experiment = byol_paper.build(config)
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  new, metrics = jax.eval_shape(experiment.update, state, batch, jax.random.key(1))
  assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics


@pytest.mark.slow
def test_a_run_on_images_of_files_ends_in_a_report(tmp_path):
  options = ["--config.data.from_files=True", "--config.eval.baselines=False"]
  command = ["--config=byol:tiny", f"--workdir={tmp_path}", "--config.train.num_steps=2"]
  assert main.run([*command, *SMALL, *options]) == 0
  result = json.loads((tmp_path / "results.json").read_text())["result"]
  assert {"knn_accuracy", "linear_accuracy"} <= set(result["metrics"])
  assert {path.stem for path in (tmp_path / "figures").glob("*.png")} >= {"views", "neighbours"}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"data__size": 8}, "config.data.size=8 has no meaning"),
    ({"views__first": {"min_area": 0.2}}, "first.min_area=0.2 must equal .*second.min_area=0.5"),
  ],
)
def test_settings_that_do_not_fit_crops_of_the_host_are_named(changes, words):
  config = _config(data__from_files=True, eval__baselines=False)
  for name, value in changes.items():
    section, _, field = name.partition("__")
    if isinstance(value, dict):
      config[section][field].update(value)
    else:
      config[section][field] = value
  with pytest.raises(ValueError, match=words):
    image_runs.make_batches(config, image_runs.load(config))


def test_images_that_do_not_fit_are_refused(monkeypatch):
  monkeypatch.setattr(image_runs.memory, "available", lambda devices: 1000)
  with pytest.raises(ValueError, match=r"images of 8x8 need .*config\.data\.from_files"):
    image_runs.load(_config())


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
  config = _config(train__batch_size=30)
  config.sharding.mesh.data = 8
  with pytest.raises(ValueError, match=r"train\.batch_size=30 must be a multiple of the 8 data"):
    image_runs.make_batches(config, image_runs.load(config))
  # Along the tensor axis each device has the whole batch.
  config.sharding.mesh.update({"data": 2, "tensor": 4})
  ids, batch = next(image_runs.make_batches(config, image_runs.load(config))())
  np.testing.assert_array_equal(batch.rows, ids)
  assert len(ids) == 30


@pytest.mark.slow  # compiles two updates
def test_predictor_rate_multiplies_the_steps_of_the_predictor_alone():
  params = {}
  for rate in (1.0, 10.0):
    config = _config(
      algorithm__predictor_rate=rate, optimizer__name="sgd", optimizer__warmup_steps=0
    )
    experiment = byol_paper.build(config)
    state = experiment.init(jax.random.key(0))
    _, batch = next(experiment.batches())
    new, _ = experiment.update(state, batch, jax.random.key(1))
    params[rate] = jax.tree.map(lambda a, b: a - b, new.params, state.params)
  for name, factor in (("encoder", 1), ("projector", 1), ("predictor", 10), ("classifier", 1)):
    once, faster = (jax.tree.leaves(getattr(params[rate], name)) for rate in (1.0, 10.0))
    for a, b in zip(once, faster, strict=True):
      # Differences of float32 parameters near 1 keep about four digits.
      np.testing.assert_allclose(factor * a, b, rtol=1e-2, atol=2e-6)


def test_the_presets_of_imagenet_are_the_papers():
  for preset, num_epochs in byol_config._IMAGENET_EPOCHS.items():
    config, recipe = presets.resolve(f"byol:{preset}"), byol_recipes.PRESETS[num_epochs]
    assert config.optimizer.learning_rate == recipe.base_learning_rate
    assert config.optimizer.weight_decay == recipe.weight_decay
    assert config.algorithm.target_decay == recipe.target_decay
    assert config.train.num_steps == byol_recipes.num_steps(num_epochs, config.train.batch_size)
    schedule = byol_recipes.learning_rate_schedule(
      recipe.base_learning_rate, num_epochs=num_epochs, batch_size=config.train.batch_size
    )
    optimizer = image_runs.make_optimizer(config)
    leaves = {"bias": np.ones(1, np.float32)}  # LARS leaves biases to plain momentum SGD
    state = optimizer.init(leaves)
    state = optax.tree_utils.tree_set(state, count=np.int32(3127))  # the end of the warm-up
    updates, _ = optimizer.update(leaves, state, leaves)
    np.testing.assert_allclose(updates["bias"], -schedule(3127), rtol=1e-6)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("network.encoder", "resnet19", "config.network.encoder"),
    ("network.dtype", "float16", "config.network.dtype"),
    ("optimizer.name", "adam", "config.optimizer.name"),
    ("eval.probes", ("linear",), "must contain 'knn'"),
    ("eval.probes", ("knn", "svm"), "svm"),
    ("eval.batch_size", 0, "config.eval.batch_size"),
    ("views.first.flip_prob", 1.5, "flip_prob"),
    ("algorithm.target", "still", "target"),
    ("train.batch_size", 2000, "batch_size is 2000"),
    ("views.size", 9, "views.size=9 is larger than the images of 8x8"),
  ],
)
def test_bad_settings_are_named(field, value, words):
  config = _config()
  *sections, last = field.split(".")
  section = config
  for name in sections:
    section = section[name]
  section[last] = value
  with pytest.raises(ValueError, match=words):
    byol_paper.build(config).batches()


# --- comparisons ----------------------------------------------------------------------------------


def _part(config, score):
  return suite.Part(config, results.Result(metrics={"knn_accuracy": score}), records.History())


def test_a_criterion_needs_an_interval_above_zero():
  config = comparison_config.get_config("tiny")
  config.criteria = (("BYOL", "SimCLR", 0.2), ("SimCLR", "BYOL", 0.0), ("BYOL", "SimCLR", 0.25))
  parts = image_comparison.parts(config)
  assert list(parts) == ["BYOL-0", "SimCLR-0", "BYOL-1", "SimCLR-1"]
  assert parts["SimCLR-1"].algorithm.negative_weight == 1.0 and parts["SimCLR-1"].seed == 1

  def summary(scores):
    finished = {
      name: _part(part, score) for (name, part), score in zip(parts.items(), scores, strict=True)
    }
    return image_comparison._summarise(config, finished).result

  # Differences of 0.30 and 0.31: Student's interval is [0.241, 0.369].
  clear = summary([0.80, 0.50, 0.81, 0.50])
  assert [row[1] for row in clear.tables[0].rows] == ["pass", "fail", "fail"]
  # Differences of 0.30 and 0.05 have the interval [-1.41, 1.76].
  unclear = summary([0.80, 0.50, 0.55, 0.50])
  assert [row[1] for row in unclear.tables[0].rows] == ["fail", "fail", "fail"]
  assert clear.metrics["BYOL"].value == pytest.approx(0.805)


def test_an_unknown_variant_in_a_criterion_is_named():
  config = comparison_config.get_config("tiny")
  config.criteria = (("BYOL", "MoCo", 0.0),)
  with pytest.raises(ValueError, match="MoCo"):
    image_comparison.parts(config)


@pytest.mark.parametrize("preset", comparison_config.PRESETS)
def test_every_variant_of_a_comparison_is_a_valid_config(preset):
  config = presets.resolve(f"image_comparison:{preset}")
  names = {name for name, *_ in config.variants}
  parts = image_comparison.parts(config)
  assert len(parts) == len(names) * config.data.num_seeds  # no two variants share a folder
