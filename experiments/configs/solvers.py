r"""ARMAC and the methods beside it on one game: one run for each of `methods`, and one figure.

Each method runs as its own preset (`armac:kuhn`, `armac_sums:kuhn`, `nfsp:kuhn`, `ppo:kuhn`,
`cfr:kuhn_sampled`, `cfr:kuhn`, `cfr:kuhn_predictive`, `cfr:kuhn_magnetic`, `cfr:kuhn_optimistic`).
Runs that are already finished in the work directory are not repeated. `--config.game=mine.efg`
plays a game of your own with the settings of the preset.

Command:   python -m experiments.main --config=solvers:kuhn --workdir=runs/solvers-kuhn
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import armac, base

METHODS = {
  "armac": "armac:{preset}",
  "armac_sums": "armac_sums:{preset}",
  "nfsp": "nfsp:{preset}",
  "ppo": "ppo:{preset}",
  "mccfr": "cfr:{preset}_sampled",
  "cfr": "cfr:{preset}",
  "predictive": "cfr:{preset}_predictive",
  "magnetic": "cfr:{preset}_magnetic",
  "optimistic": "cfr:{preset}_optimistic",
}
# Time of ARMAC, both ways, NFSP, MCCFR and CFR, and where ARMAC, NFSP, MCCFR and CFR end;
# docs/results/games.md has the others.
_MEASURED = {
  "kuhn": ("13 minutes and PPO", "NashConv of ARMAC 0.076, NFSP 0.041, MCCFR 0.020, CFR 0.0067"),
  "leduc": ("2 hours and PPO", "NashConv of ARMAC 0.571, NFSP 1.117, MCCFR 0.578, CFR 0.108"),
  "liars_dice": (
    "80 minutes and PPO",
    "NashConv of ARMAC 0.319, NFSP 0.527, MCCFR 0.104, CFR 0.017",
  ),
  "goofspiel": (
    "52 minutes and PPO",
    "NashConv of ARMAC 0.517, NFSP 0.215, MCCFR 0.044, CFR 0.046",
  ),
}
PRESETS = {
  name: base.Preset(f"ARMAC and all other methods on {armac.TITLES[name]}", *measured)
  for name, measured in _MEASURED.items()
}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  return ml_collections.ConfigDict(
    {
      "paper": "solvers",
      "preset": preset,
      "seed": 0,
      "game": "",  # another game for all methods: OpenSpiel's string or the path of an .efg file
      "methods": tuple(METHODS),
      "sharding": {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 1, "log_every": 1},
      "eval": {"every": 0},
      "checkpoint": {"every": 0, "keep": 1},
    }
  )
