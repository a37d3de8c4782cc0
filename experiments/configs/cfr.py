r"""CFR (Zinkevich et al. 2007) and what stands beside it, on compiled games.

`*_sampled` is Monte Carlo CFR, `*_predictive` predictive CFR+ (arXiv:2007.14358). `*_magnetic` is
magnetic mirror descent (arXiv:2206.05825), whose last policy is measured, and `*_optimistic`
optimistic mirror descent. A magnetic run with `--config.mirror_descent.temperature_decay=0
--config.mirror_descent.learning_rate_decay=0` ends at a quantal response equilibrium.

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
  "kuhn_predictive": ("a minute beside other work", "NashConv 0.0000061"),
  "leduc_predictive": ("a minute beside other work", "NashConv 0.0139"),
  "liars_dice_predictive": ("a minute beside other work", "NashConv 0.00037"),
  "goofspiel_predictive": ("a minute beside other work", "NashConv 0.000022"),
  "kuhn_magnetic": ("a minute beside other work", "NashConv 0.065, of the last policy"),
  "leduc_magnetic": ("a minute beside other work", "NashConv 0.268, of the last policy"),
  "liars_dice_magnetic": ("a minute beside other work", "NashConv 0.103, of the last policy"),
  "goofspiel_magnetic": ("a minute beside other work", "NashConv 0.083, of the last policy"),
  "kuhn_optimistic": ("a minute beside other work", "NashConv 0.0025"),
  "leduc_optimistic": ("a minute beside other work", "NashConv 0.532"),
  "liars_dice_optimistic": ("a minute beside other work", "NashConv 0.032"),
  "goofspiel_optimistic": ("a minute beside other work", "NashConv 0.021"),
  "tiny": ("10 seconds", "smoke test"),
}
PRESETS = {
  name: base.Preset(f"{what} on {where}", *_MEASURED.get(name, ("not measured", "not run")))
  for name, what, where in (
    *((name, "CFR, alternating updates,", title) for name, title in armac.TITLES.items()),
    *(
      (f"{name}_{kind}", what, title)
      for kind, what in (
        ("sampled", "outcome-sampling MCCFR, three seeds,"),
        ("predictive", "predictive CFR+"),
        ("magnetic", "magnetic mirror descent"),
        ("optimistic", "optimistic mirror descent"),
      )
      for name, title in armac.TITLES.items()
      if name != "tiny"
    ),
  )
}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  name = max((name for name in armac.TITLES if preset.startswith(name)), key=len)
  kind = preset.removeprefix(name).removeprefix("_")
  sampled, optimistic = kind == "sampled", kind == "optimistic"
  variant = {"sampled": "mccfr", "predictive": "predictive", "": "cfr"}.get(kind, "mirror_descent")
  algorithm = {"variant": variant, "num_samples": 1}
  config = base.game("cfr", preset, armac.GAMES[name], algorithm=algorithm)
  # Of `mirror_descent.Config`, for utilities of at most 1; the wiring divides by the largest.
  config.mirror_descent = ml_collections.ConfigDict(
    {
      "learning_rate": 30.0 if optimistic else 3.0,
      "temperature": 0.0 if optimistic else 0.2 if name == "leduc" else 1.0,
      "learning_rate_decay": 0.0 if optimistic else 0.5,
      "temperature_decay": 0.0 if optimistic else 0.5,
      "averaging_power": 1.0,
      "form": "dilated" if optimistic else "behavioural",
      "optimistic": optimistic,
    }
  )
  config.environment.num_seeds = 3 if sampled else 1  # the others are deterministic
  # As many decisions as ARMAC's preset of the game plays.
  inner_steps = (250 if name == "kuhn" else 2000) if sampled else 1
  config.train.update({"num_steps": 200, "inner_steps": inner_steps})
  if preset == "tiny":
    config.train.num_steps = 20
  return config
