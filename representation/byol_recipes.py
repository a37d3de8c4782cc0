"""The numbers of BYOL that depend on the length of a run, and its learning rate.

  recipe = PRESETS[300]
  rate = learning_rate_schedule(recipe.base_learning_rate, num_epochs=300, batch_size=4096)
  optimizer = lars.lars(rate, weight_decay=recipe.weight_decay)
  config = byol.Config(target_decay=recipe.target_decay, num_steps=num_steps(300, 4096))

The presets are those of the authors' code.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733, section 3.3.
"""

from typing import Any, NamedTuple

import optax

from sharding import checks


class Preset(NamedTuple):
  """What the paper changes with the number of epochs.

  Attributes:
    base_learning_rate: for 256 images a step; it grows in proportion to the batch.
    weight_decay: of LARS.
    target_decay: tau at the first step.
  """

  base_learning_rate: float
  weight_decay: float
  target_decay: float


# By number of epochs.
PRESETS = {
  40: Preset(0.45, 1e-6, 0.97),
  100: Preset(0.45, 1e-6, 0.99),
  300: Preset(0.3, 1e-6, 0.99),
  1000: Preset(0.2, 1.5e-6, 0.996),
}
IMAGENET_SIZE = 1_281_167


def num_steps(num_epochs: int, batch_size: int, num_images: int = IMAGENET_SIZE) -> int:
  """Returns the number of steps of a run, as the authors count: epochs * images // batch.

  Example:
    >>> num_steps(1000, 4096)
    312784
  """
  for name, value in (
    ("num_epochs", num_epochs), ("batch_size", batch_size), ("num_images", num_images)
  ):  # fmt: skip
    checks.count(name, value)
  return num_epochs * num_images // batch_size


def learning_rate_schedule(
  base_learning_rate: Any,
  *,
  num_epochs: int,
  batch_size: int,
  num_images: int = IMAGENET_SIZE,
  num_warmup_epochs: int = 10,
) -> optax.Schedule:
  """Returns a schedule that rises linearly from 0, then falls to 0 by half a cosine.

  Args:
    base_learning_rate: the peak for 256 images a step; the peak is this times batch_size / 256.
    num_epochs: length of the run.
    batch_size: images in a step.
    num_images: size of the training set.
    num_warmup_epochs: length of the rise, less than `num_epochs`.

  Example:
    >>> schedule = learning_rate_schedule(0.2, num_epochs=1000, batch_size=4096)
    >>> print(f"{schedule(3127):.3f} {schedule(312_784):.3f}")
    3.200 0.000
  """
  checks.count("num_warmup_epochs", num_warmup_epochs, least=0)
  if num_warmup_epochs >= num_epochs:
    raise ValueError(
      f"num_warmup_epochs must be less than num_epochs, {num_epochs}, got {num_warmup_epochs}"
    )
  warmup = num_warmup_epochs and num_steps(num_warmup_epochs, batch_size, num_images)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=base_learning_rate * batch_size / 256,
    warmup_steps=warmup,
    decay_steps=num_steps(num_epochs, batch_size, num_images),
  )
