r"""Ablations of BYOL and its rivals on images, at the scale of a CPU (arXiv:2006.07733, section 5).

`targets` changes the target network and the predictor, `augmentations` what the views hide, for
BYOL and for SimCLR. A criterion is an ordering of the paper's ablations. A variant is a name, a
preset, and the fields that differ from it.

Command:   python -m experiments.main --config=image_comparison:targets --workdir=runs/targets \
             --config.data.source=CIFAR.npz
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

from collections.abc import Mapping, Sequence

import ml_collections

from experiments.configs import base, byol

PRESETS = {
  "cifar10_cpu": base.Preset(
    "byol:cifar10_cpu beside the same network with labels, 3 seeds",
    "2.5 hours",
    "3 of 3 criteria; linear layer on BYOL 0.591, untrained 0.309, with labels 0.667",
  ),
  "targets": base.Preset("target decay, no target, no predictor; 3 seeds", "1 hour", "not run"),
  "augmentations": base.Preset("what the views hide; 3 seeds", "1 hour", "not run"),
  "tiny": base.Preset("BYOL and SimCLR on digits, 2 seeds", "2 minutes", "smoke test"),
}
_NO_TARGET = ("algorithm.target=stopped",)
_SIMCLR = ("algorithm.target=online", "algorithm.predictor=none", "algorithm.negative_weight=1.0")


def _views(*changes: str) -> tuple[str, ...]:
  return tuple(f"views.{view}.{change}" for view in ("first", "second") for change in changes)


_NO_COLOUR = _views("jitter_prob=0", "grey_prob=0")
_NO_SOLARISE = ("views.second.solarise_prob=0",)
_NO_FLIP = _views("flip_prob=0")

_TARGETS = {
  "decay 0.96": (),
  "decay 0.9": ("algorithm.target_decay=0.9",),
  "decay 0.99": ("algorithm.target_decay=0.99",),
  "decay 0.999": ("algorithm.target_decay=0.999",),
  "random target": ("algorithm.target_decay=1.0",),
  "no target": _NO_TARGET,
  "no target, predictor 10 times faster": (*_NO_TARGET, "algorithm.predictor_rate=10.0"),
  "no target, optimal linear predictor": (*_NO_TARGET, "algorithm.predictor=least_squares"),
  "no predictor": ("algorithm.predictor=none",),
  "negatives added": ("algorithm.negative_weight=1.0",),
  "SimCLR": _SIMCLR,
}
_AUGMENTATIONS = {
  "all": (),
  "smaller crops": _views("min_area=0.08"),
  "no flip": _NO_FLIP,
  "no solarise": _NO_SOLARISE,
  "no jitter": _views("jitter_prob=0"),
  "no grey": _views("grey_prob=0"),
  "no colour": _NO_COLOUR,
  "crop and colour": (*_NO_FLIP, *_NO_SOLARISE),
  "crop only": (*_NO_COLOUR, *_NO_SOLARISE, *_NO_FLIP),
  "SimCLR": _SIMCLR,
  "SimCLR, no colour": (*_SIMCLR, *_NO_COLOUR),
  "SimCLR, crop only": (*_SIMCLR, *_NO_COLOUR, *_NO_SOLARISE, *_NO_FLIP),
}
# Orderings of the paper's tables, written before the runs. The paper's runs have 80 times as many
# steps, and 0.99 is its best decay; a target with a shorter memory, 0.96, stands for it here.
_CRITERIA = {
  "targets": (
    ("decay 0.96", "decay 0.9"),
    ("decay 0.96", "decay 0.999"),
    ("decay 0.96", "random target"),
    ("random target", "no target"),
    ("no target, predictor 10 times faster", "no target"),
    ("no target, optimal linear predictor", "no target"),
    ("decay 0.96", "no target, optimal linear predictor"),
    ("random target", "no predictor"),
    ("decay 0.96", "negatives added"),
    ("negatives added", "SimCLR"),
    ("decay 0.96", "SimCLR"),
  ),
  "augmentations": (
    ("all", "no flip"),
    ("all", "no solarise"),
    ("all", "no jitter"),
    ("all", "no grey"),
    ("all", "no colour"),
    ("no jitter", "no colour"),
    ("no grey", "no colour"),
    ("no colour", "crop only"),
    ("crop and colour", "no colour"),
    ("all", "SimCLR"),
    ("SimCLR", "SimCLR, no colour"),
    ("no colour", "SimCLR, no colour"),
    ("crop only", "SimCLR, crop only"),
  ),
}


def get_config(preset: str = "targets") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  method = {"tiny": "byol:tiny", "cifar10_cpu": "byol:cifar10_cpu"}.get(preset, "byol:ablation")
  sections = byol.get_config(method.partition(":")[2])
  config = ml_collections.ConfigDict(
    {
      "paper": "image_comparison",
      "preset": preset,
      "seed": 0,  # the first of the seeds
      "data": {"source": "", "directory": "", "num_seeds": 2 if preset == "tiny" else 3},
    }
  )
  if preset == "cifar10_cpu":
    config.variants = (
      ("BYOL", method),
      # Each run of the comparison has the steps of BYOL, other fields are those of its preset.
      ("supervised", "supervised:cifar10_cpu", "train.num_steps=1500", "train.batch_size=128"),
    )
    config.rows = tuple(
      (name, variant, metric)
      for name, variant, metric in (
        ("BYOL, linear layer", "BYOL", "linear_accuracy"),
        ("BYOL, k-NN", "BYOL", "knn_accuracy"),
        ("untrained encoder, linear layer", "BYOL", "linear_accuracy_untrained"),
        ("untrained encoder, k-NN", "BYOL", "knn_accuracy_untrained"),
        ("pixels, logistic regression", "BYOL", "logistic_accuracy_pixels"),
        ("pixels, k-NN", "BYOL", "knn_accuracy_pixels"),
        ("the same network with labels", "supervised", "test_accuracy"),
      )
    )
    config.criteria = (
      ("BYOL, linear layer", "untrained encoder, linear layer", 0.05),
      ("BYOL, linear layer", "pixels, logistic regression", 0.1),
      ("BYOL, k-NN", "untrained encoder, k-NN", 0.05),
    )
  else:
    variants: Mapping[str, Sequence[str]] = {"BYOL": (), "SimCLR": _SIMCLR}
    if preset != "tiny":
      variants = _TARGETS if preset == "targets" else _AUGMENTATIONS
    config.variants = tuple((name, method, *changes) for name, changes in variants.items())
    config.rows = tuple((name, name, "knn_accuracy") for name in variants)
    criteria = _CRITERIA.get(preset, (("BYOL", "SimCLR"),))
    config.criteria = tuple((better, worse, 0.0) for better, worse in criteria)
  for section in ("sharding", "train", "eval", "checkpoint"):
    config[section] = sections[section]
  return config
