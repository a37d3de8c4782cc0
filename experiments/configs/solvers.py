r"""Learned and tabular solvers on one game: a run for each of `methods`, and one figure.

Each method runs as its own preset of that name does (`armac:kuhn`, `nfsp:kuhn`, `cfr:kuhn_sampled`,
`cfr:kuhn`). Runs already in the work directory are not repeated.

Command:   python -m experiments.main --config=solvers:kuhn --workdir=runs/solvers-kuhn
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import armac, base

_MEASURED = {
  "kuhn": ("8 minutes", "docs/results/games.md"),
  "leduc": ("50 minutes", "docs/results/games.md"),
  "liars_dice": ("55 minutes beside other work", "docs/results/games.md"),
  "goofspiel": ("34 minutes", "docs/results/games.md"),
}
PRESETS = {
  name: base.Preset(
    f"ARMAC, NFSP, MCCFR and CFR on {game}", *_MEASURED.get(name, ("not measured", "unrun"))
  )
  for name, game in armac.GAMES.items()
  if name not in ("tiny", "paper")
}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  return ml_collections.ConfigDict(
    {
      "paper": "solvers",
      "preset": preset,
      "seed": 0,
      "methods": ("armac", "nfsp", "mccfr", "cfr"),
      "sharding": {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 1, "log_every": 1},
      "eval": {"every": 0},
      "checkpoint": {"every": 0, "keep": 1},
    }
  )
