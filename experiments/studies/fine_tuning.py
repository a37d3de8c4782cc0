"""Semi-supervised learning: BYOL's encoder fine-tuned on few labels, and the same from scratch.

Each share of the labels, start, number of epochs and learning rate is an ordinary run of
`supervised` in a folder of its own; finished runs are not trained again. Both starts see the same
labels. For each share and start the run that is best on validation images counts, and its score on
the test images is reported, as in BYOL's protocol (https://arxiv.org/abs/2006.07733, appendix C).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments.data import images as image_data
from experiments.loop import presets, suite, training
from experiments.papers import supervised
from experiments.report import plots, results
from experiments.tasks import image_runs
from sharding import checks

STARTS = {"byol": "BYOL, fine-tuned", "scratch": "from scratch"}


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains BYOL, unless `init_from` has done so, and every run of the sweep; writes one report."""
  data = image_runs.load(_method(config, "supervised"))
  configs = parts(config, workdir, data)
  read: dict[str, Any] = {}

  def build(part, folder):
    if part.paper != "supervised":
      return presets.build(part, folder)
    source = part.network.init_from
    if source and source not in read:
      read[source] = supervised.read_encoder(part)
    return supervised.build(part, data=data, start=read.get(source))

  if config.init_from:  # before anything is trained
    build(next(part for part in configs.values() if part.network.init_from), workdir)
  return suite.run(config, workdir, configs, _summarise, build=build)


def parts(
  config: Any, workdir: pathlib.Path, data: image_data.Images
) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of each run by its folder."""
  for field in ("label_shares", "learning_rates", "epochs"):
    values = tuple(config[field])
    if not values or len(set(values)) < len(values):
      raise ValueError(f"config.{field}={values} must have entries, each of them once")
  checks.positive("config.learning_rates", tuple(config.learning_rates))
  source, configs = config.init_from, {}
  if not source:
    configs["byol"] = _method(config, "byol")
    configs["byol"].train.num_steps = config.train.num_steps
    # Fine-tuning is what evaluates it here.
    configs["byol"].eval.update({"probes": ("knn",), "baselines": False})
    source = str(workdir / "byol")
  mesh = training.make_mesh(config.sharding.mesh)
  for share in config.label_shares:
    for start in STARTS:
      for num_epochs in config.epochs:
        for rate in config.learning_rates:
          part = _method(config, "supervised")
          part.network.init_from = source if start == "byol" else ""
          part.data.update({"label_share": share, "validate": True})
          part.optimizer.update(config.optimizer)
          part.optimizer.learning_rate = rate
          count = len(supervised.training_rows(part, data))
          batch_size = min(config.train.batch_size, count)
          batch_size -= batch_size % mesh.size  # the last batch of an epoch goes on in the next
          checks.count("config.epochs", num_epochs)
          part.train.update(
            {
              "batch_size": batch_size,
              "num_steps": num_epochs * count // max(batch_size, 1),
              "log_every": config.train.log_every,
            }
          )
          for section in ("sharding", "eval", "checkpoint"):
            part[section].update(config[section])
          configs[f"{start}-{share:g}-{num_epochs}-{rate:g}"] = part
  return configs


def _method(config: Any, paper: str) -> ml_collections.ConfigDict:
  """Returns the config of the preset `method` of a paper, on the data of the study."""
  part = presets.resolve(f"{paper}:{config.method}")
  part.seed = config.seed
  for section in ("network", "data", "sharding"):
    part[section].update(config[section])
  return part


def _summarise(finished: Mapping[str, suite.Part]) -> suite.Summary:
  runs: dict[tuple[float, str], list[suite.Part]] = {}
  for name, part in finished.items():
    if part.config.paper == "supervised":
      share = part.config.data.label_share
      runs.setdefault((share, STARTS[name.partition("-")[0]]), []).append(part)
  metrics, rows, all_rows = {}, [], []
  for (share, start), group in runs.items():
    best = max(group, key=lambda part: part.result.metrics["validation_accuracy"].value)
    test = best.result.metrics["test_accuracy"]
    metrics[f"test_accuracy/{start}, {100 * share:g} %"] = test
    for part in group:
      section, found = part.config, part.result.metrics
      row = [
        f"{100 * share:g} %", start, section.train.num_steps, section.optimizer.learning_rate,
        *(results.percent(found[f"{split}_accuracy"]) for split in ("validation", "test")),
      ]  # fmt: skip
      all_rows.append(row)
      if part is best:
        rows.append(row)
  columns = ["labels", "start", "steps", "learning rate", "validation", "test"]
  caption = "Brackets hold 95 % intervals over the images. "
  tables = [
    results.Table(
      "Accuracy in percent of the runs that are best on the validation images",
      columns, rows, caption=caption + "Both starts see the same labels.", digits=1,
    ),
    results.Table("All runs of the sweep", columns, all_rows, caption=caption, digits=1),
  ]  # fmt: skip
  result = results.Result(metrics=metrics, tables=tables, figures=[_figure(runs)])
  return suite.Summary(result, next(iter(metrics)))


def _figure(runs: Mapping[tuple[float, str], list[suite.Part]]) -> results.Figure:
  """Draws validation accuracy against learning rate, one panel for each share of labels."""
  shares = list(dict.fromkeys(share for share, _ in runs))
  figure, axes = plots.subplots(1, len(shares), sharey=True)
  for axis, share in zip(axes[0], shares, strict=True):
    for colour, start in enumerate(STARTS.values()):
      group = runs[share, start]
      for style, steps in enumerate(sorted({part.config.train.num_steps for part in group})):
        chosen = [part for part in group if part.config.train.num_steps == steps]
        rates, scores = np.array(
          sorted(
            (p.config.optimizer.learning_rate, p.result.metrics["validation_accuracy"].value)
            for p in chosen
          )
        ).T
        axis.plot(
          rates, 100 * scores, marker="o", ms=3, color=plots.PALETTE[colour],
          linestyle=("-", "--", ":", "-.")[style % 4], label=f"{start}, {steps} steps",
        )  # fmt: skip
    axis.set(xscale="log", xlabel="learning rate", title=f"{100 * share:g} % of the labels")
    axis.legend(fontsize=7)
  axes[0][0].set_ylabel("validation accuracy, percent")
  caption = "The sweep. Each point is a run, scored on the validation images, which choose one."
  return results.Figure("sweep", caption, figure)
