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
    "byol:cifar10_cpu beside the same network with labels, 3 seeds", "2 hours", "not run"
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
_NO_BLUR = _views("blur_prob=0", "solarise_prob=0")
_NO_FLIP = _views("flip_prob=0")

_TARGETS = {
  "decay 0.99": (),
  "decay 0.9": ("algorithm.target_decay=0.9",),
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
  "no flip": _NO_FLIP,
  "no blur": _NO_BLUR,
  "no jitter": _views("jitter_prob=0"),
  "no grey": _views("grey_prob=0"),
  "no colour": _NO_COLOUR,
  "crop and colour": (*_NO_FLIP, *_NO_BLUR),
  "crop only": (*_NO_COLOUR, *_NO_BLUR, *_NO_FLIP),
  "SimCLR": _SIMCLR,
  "SimCLR, no colour": (*_SIMCLR, *_NO_COLOUR),
  "SimCLR, crop only": (*_SIMCLR, *_NO_COLOUR, *_NO_BLUR, *_NO_FLIP),
}
# Orderings of the paper's tables, written before the runs.
_CRITERIA = {
  "targets": (
    ("decay 0.99", "decay 0.9"),
    ("decay 0.99", "decay 0.999"),
    ("decay 0.99", "random target"),
    ("random target", "no target"),
    ("no target, predictor 10 times faster", "no target"),
    ("no target, optimal linear predictor", "no target"),
    ("decay 0.99", "no target, optimal linear predictor"),
    ("random target", "no predictor"),
    ("decay 0.99", "negatives added"),
    ("negatives added", "SimCLR"),
    ("decay 0.99", "SimCLR"),
  ),
  "augmentations": (
    ("all", "no flip"),
    ("all", "no blur"),
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
  variants: Mapping[str, Sequence[str]]
  criteria: Sequence[tuple[str, str]] = _CRITERIA.get(preset, ())
  method = "byol:ablation"
  if preset == "tiny":
    method, criteria = "byol:tiny", (("BYOL", "SimCLR"),)
    variants = {"BYOL": (), "SimCLR": _SIMCLR}
  else:
    variants = _TARGETS if preset == "targets" else _AUGMENTATIONS
  sections = byol.get_config(method.partition(":")[2])
  config = ml_collections.ConfigDict(
    {
      "paper": "image_comparison",
      "preset": preset,
      "seed": 0,  # the first of the seeds
      "metric": "knn_accuracy",
      "data": {"source": "", "directory": "", "num_seeds": 2 if preset == "tiny" else 3},
    }
  )
  config.variants = tuple((name, method, *changes) for name, changes in variants.items())
  config.criteria = tuple(criteria)
  for section in ("sharding", "train", "eval", "checkpoint"):
    config[section] = sections[section]
  return config
