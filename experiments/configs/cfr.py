r"""CFR (Zinkevich et al. 2007) and its variants on games of OpenSpiel; `*_sampled` is MCCFR.

Command:   python -m experiments.main --config=cfr:leduc --workdir=runs/cfr-leduc
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import armac, base

# Times and distances of docs/results/games.md.
_MEASURED = {
  "kuhn": ("5 seconds", "NashConv 0.0067"),
  "leduc": ("10 seconds", "NashConv 0.108"),
  "kuhn_sampled": ("15 seconds", "NashConv 0.020, seeds 0.013 to 0.032"),
  "leduc_sampled": ("2 minutes", "NashConv 0.58, seeds 0.43 to 0.71"),
  "liars_dice": ("5 seconds", "NashConv 0.017"),
  "liars_dice_sampled": ("30 seconds", "NashConv 0.104, seeds 0.087 to 0.121"),
  "goofspiel": ("5 seconds", "NashConv 0.046"),
  "goofspiel_sampled": ("40 seconds", "NashConv 0.044, seeds 0.017 to 0.078"),
  "tiny": ("10 seconds", "runs"),
}
PRESETS = {
  name: base.Preset(f"{what} on {where}", *_MEASURED.get(name, ("not measured", "unrun")))
  for name, what, where in (
    *((name, "CFR, alternating", game) for name, game in armac.GAMES.items() if name != "paper"),
    *(
      (f"{name}_sampled", "outcome-sampling MCCFR, three seeds", game)
      for name, game in armac.GAMES.items()
      if name not in ("tiny", "paper")
    ),
  )
}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  name = preset.removesuffix("_sampled")
  sampled = name != preset
  algorithm = {"variant": "mccfr" if sampled else "cfr", "num_samples": 1}
  config = base.game("cfr", preset, armac.GAMES[name], algorithm=algorithm)
  config.environment.num_seeds = 3 if sampled else 1  # nothing is random in CFR
  # As many decisions as ARMAC's preset of the game plays.
  inner_steps = (250 if name == "kuhn" else 2000) if sampled else 1
  config.train.update({"num_steps": 200, "inner_steps": inner_steps})
  if preset == "tiny":
    config.train.num_steps = 20
  return config
