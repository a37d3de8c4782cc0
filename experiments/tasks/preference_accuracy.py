"""How well a model predicts preferences, compared with what length alone predicts.

Longer answers often win, and a model may have learned nothing else. So each number is compared with
three rules that read no word. The first says that the longer completion wins. The second is a
logistic fit to the difference in length, with one coefficient from the training pairs; its sign
says whether longer or shorter answers win. The third is a fair coin.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special

from experiments.data import text
from experiments.report import plots, records, results, statistics


def length_differences(pairs: Sequence[text.Preference]) -> np.ndarray:
  """Returns `[N]` length of chosen minus length of rejected, in hundreds of characters."""
  return np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs]) / 100


def fit_length(pairs: Sequence[text.Preference]) -> float:
  """Returns the maximum-likelihood a of P(chosen wins) = sigmoid(a * length difference).

  The bounds are +-100 per hundred characters: for pairs that length separates a would diverge.
  """
  x, q = length_differences(pairs), _probs(pairs)

  def loss(a):
    return cross_entropy(a * x, q).mean()

  return float(optimize.minimize_scalar(loss, bounds=(-100, 100), method="bounded").x)


def cross_entropy(log_odds: np.ndarray, probs: np.ndarray) -> np.ndarray:
  """Returns `[N]` -q log sigmoid(z) - (1 - q) log sigmoid(-z), in nats."""
  return -probs * special.log_expit(log_odds) - (1 - probs) * special.log_expit(-log_odds)


def evaluate(
  log_odds: np.ndarray, pairs: Sequence[text.Preference], *, length_coefficient: float
) -> results.Result:
  """Compares a model with the rules that read no word, on the same held-out pairs.

  Pairs of one prompt are not independent, but the Clopper-Pearson intervals of the accuracies
  assume it. `accuracy_by_prompt` averages over the pairs of each prompt first.

  Args:
    log_odds: `[N]` the model's log-odds that chosen beats rejected.
    pairs: the N held-out pairs; a `chosen_prob` of 1/2 counts as a tie.
    length_coefficient: the result of `fit_length` on the training pairs.
  """
  q, lengths = _probs(pairs), length_differences(pairs)
  rules = {
    "model": np.asarray(log_odds, float),
    "longer wins": np.sign(lengths),
    "fit to length": length_coefficient * lengths,
    "coin": np.zeros(len(q)),
  }
  rows, accuracies = [], {}
  for name, z in rules.items():
    outcomes = _outcomes(z, q)
    wins, losses = int((outcomes > 0).sum()), int((outcomes < 0).sum())
    accuracies[name] = statistics.win_rate(wins, losses, len(z) - wins - losses)
    if name == "coin":
      accuracies[name] = results.Estimate(0.5, n=len(z))
    # "Longer wins" is a rule, not a probability.
    scores = (
      ["", ""]
      if name == "longer wins"
      else [float(cross_entropy(z, q).mean()), float(_brier(z, q).mean())]
    )
    rows.append([name, accuracies[name], *scores])
  z = rules["model"]
  outcomes, confidence = _outcomes(z, q), special.expit(np.abs(z))
  decided = outcomes != 0
  values = {
    "accuracy": accuracies["model"],
    "accuracy_by_prompt": _by_prompt(outcomes, pairs),
    "accuracy_longer_wins": accuracies["longer wins"],
    "accuracy_length_fit": accuracies["fit to length"],
    "accuracy_coin": accuracies["coin"],
    "log_loss": statistics.mean_interval(cross_entropy(z, q), method="log"),
    "log_loss_length_fit": statistics.mean_interval(
      cross_entropy(rules["fit to length"], q), method="log"
    ),
    "brier": statistics.mean_interval(_brier(z, q), method="logit"),
  }
  if decided.any():
    values["calibration_error"] = statistics.calibration_error(
      confidence[decided], outcomes[decided] > 0
    )
  direction = "longer" if length_coefficient > 0 else "shorter"
  table = results.Table(
    "Held-out pairs",
    ["rule", "accuracy", "log-loss, nats", "Brier score"],
    rows,
    caption=(
      f"The fit to length says that {direction} completions win: {length_coefficient:+.3f} in "
      "log-odds per hundred characters. Accuracies leave ties out. A coin has log-loss 0.6931 and "
      "Brier score 0.25."
    ),
  )
  arrays = {"confidence": confidence[decided], "correct": outcomes[decided] > 0}
  return results.Result(metrics=values, tables=[table], arrays=arrays)


def figures(history: records.History, result: results.Result) -> list[results.Figure]:
  """Draws the calibration: how often the model is right at each confidence."""
  del history
  confidence, correct = result.arrays["confidence"], result.arrays["correct"]
  figure, axes = plots.subplots(1, 1, size=(3.4, 3.0))
  axis = axes[0][0]
  axis.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8)
  for part in np.array_split(np.argsort(confidence), min(8, max(1, len(confidence) // 25))):
    if not len(part):
      continue
    right = statistics.clopper_pearson(int(correct[part].sum()), len(part))
    assert right.low is not None and right.high is not None
    bars = [[right.value - right.low], [right.high - right.value]]
    axis.errorbar(
      confidence[part].mean(), right.value, yerr=bars, marker="o", capsize=2, color="C0"
    )
  axis.set(xlabel="probability of the model's choice", ylabel="share of right choices")
  caption = (
    "The points show how often the model is right, in groups of held-out pairs with similar "
    "confidence and equal size. Bars are 95 % intervals. A calibrated model is on the diagonal."
  )
  return [results.Figure(name="calibration", caption=caption, figure=figure)]


def _probs(pairs: Sequence[text.Preference]) -> np.ndarray:
  return np.array([pair.chosen_prob for pair in pairs])


def _outcomes(log_odds: np.ndarray, probs: np.ndarray) -> np.ndarray:
  """Returns `[N]` +1 where rule and label agree, -1 where they differ, 0 where either is a tie."""
  return np.sign(log_odds) * np.sign(probs - 0.5)


def _brier(log_odds: np.ndarray, probs: np.ndarray) -> np.ndarray:
  return (special.expit(log_odds) - probs) ** 2


def _by_prompt(outcomes: np.ndarray, pairs: Sequence[text.Preference]) -> results.Estimate:
  groups: dict[str, list[float]] = {}
  for outcome, pair in zip(outcomes, pairs, strict=True):
    groups.setdefault(pair.prompt, []).append((1 + outcome) / 2)
  means = [np.mean(group) for group in groups.values()]
  found = statistics.mean_interval(means, method="logit")
  return dataclasses.replace(found, note="prompts; a tie counts as half")
