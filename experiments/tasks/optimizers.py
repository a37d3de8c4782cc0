"""The optimiser of language models and graphs: AdamW with a warm-up and a cosine."""

from typing import Any

import optax

import sharding


def schedule(section: Any, num_steps: int, *, warmup_steps: int) -> optax.Schedule:
  """Returns the learning rate of each update, counted from 0.

  It rises linearly to `section.learning_rate` at update `warmup_steps`, then falls by a cosine to
  `section.final_scale` (0 if absent) of it at `num_steps`. With `section.warmup_from` of 1 the
  first update has its share of the rise. With 0, or without the field, the first rate is 0 and the
  first update changes nothing.
  """
  peak = section.learning_rate
  return optax.warmup_cosine_decay_schedule(
    init_value=peak * section.get("warmup_from", 0) / (warmup_steps + 1),
    peak_value=peak,
    warmup_steps=warmup_steps,
    decay_steps=num_steps,
    end_value=peak * section.get("final_scale", 0.0),
  )


def adamw(section: Any, rates: optax.Schedule, **settings: Any) -> optax.GradientTransformation:
  """Returns AdamW with `section.weight_decay`; `section.decay_all` decays scales and biases too.

  Without that field all parameters decay, as in the code of BGRL.
  """
  mask = None if section.get("decay_all", True) else sharding.decay_mask
  return optax.adamw(rates, weight_decay=section.weight_decay, mask=mask, **settings)
