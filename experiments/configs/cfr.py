r"""CFR (Zinkevich et al. 2007) on compiled games; `*_sampled` is Monte Carlo CFR.

Command:   python -m experiments.main --config=cfr:leduc --workdir=runs/cfr-leduc
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import armac, base

# Measured times and distances; docs/results/games.md has them with their spread.
_MEASURED = {
  "kuhn": ("5 seconds", "NashConv 0.0067"),
  "leduc": ("10 seconds", "NashConv 0.108"),
  "kuhn_sampled": ("15 seconds", "NashConv 0.020, seeds 0.013 to 0.032"),
  "leduc_sampled": ("2 minutes", "NashConv 0.58, seeds 0.43 to 0.71"),
  "liars_dice": ("5 seconds", "NashConv 0.017"),
  "liars_dice_sampled": ("30 seconds", "NashConv 0.104, seeds 0.087 to 0.121"),
  "goofspiel": ("5 seconds", "NashConv 0.046"),
  "goofspiel_sampled": ("40 seconds", "NashConv 0.044, seeds 0.017 to 0.078"),
  "tiny": ("10 seconds", "smoke test"),
}
PRESETS = {
  name: base.Preset(f"{what} on {where}", *_MEASURED.get(name, ("not measured", "not run")))
  for name, what, where in (
    *((name, "CFR, alternating updates,", title) for name, title in armac.TITLES.items()),
    *(
      (f"{name}_sampled", "outcome-sampling MCCFR, three seeds,", title)
      for name, title in armac.TITLES.items()
      if name != "tiny"
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
  config.environment.num_seeds = 3 if sampled else 1  # CFR is deterministic
  # As many decisions as ARMAC's preset of the game plays.
  inner_steps = (250 if name == "kuhn" else 2000) if sampled else 1
  config.train.update({"num_steps": 200, "inner_steps": inner_steps})
  if preset == "tiny":
    config.train.num_steps = 20
  return config
