"""Laws of rewards: finitely many values, noise around a mean, or a function that draws."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sharding import checks

NOISES = ("gaussian", "exponential", "student_t2")


def register(*data: str, meta: tuple[str, ...] = ()) -> Callable[[type], type]:
  """Makes a dataclass a pytree whose checks run for the user's arrays alone.

  JAX rebuilds it without them: then the leaves may be tracers, batches or no arrays at all.
  """

  def decorate(cls: type) -> type:
    def flatten(tree):
      leaves = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in data]
      return leaves, tuple(getattr(tree, name) for name in meta)

    def unflatten(static, leaves):
      tree: Any = object.__new__(cls)
      for name, value in zip((*data, *meta), (*leaves, *static), strict=True):
        object.__setattr__(tree, name, value)
      return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls

  return decorate


def as_arrays(tree: Any, *names: str) -> None:
  for name in names:
    object.__setattr__(tree, name, jnp.asarray(getattr(tree, name), float))


@register("values", "probs")
@dataclasses.dataclass(frozen=True)
class FiniteRewards:
  """Rewards with finitely many values.

  Attributes:
    values: `[S, K]`, the values that the reward of each state can have.
    probs: `[S, K]`, their probabilities; rows sum to 1.
  """

  values: Any
  probs: Any

  def __post_init__(self):
    checks.matrix("values", self.values)
    checks.same_shape(values=self.values, probs=self.probs)
    checks.finite("values", self.values, fetch=True)
    checks.distribution("probs", self.probs, fetch=True)
    as_arrays(self, "values", "probs")

  def cdf_at(self, values: jax.Array, states: jax.Array, *, left: bool = False) -> jax.Array:
    """Returns P(reward of the state <= value), or < with `left`."""
    reached = self.values[states]
    below = reached < values[..., None] if left else reached <= values[..., None]
    return jnp.sum(jnp.where(below, self.probs[states], 0), axis=-1)

  def sample(self, key: Any, states: jax.Array) -> jax.Array:
    """Returns one reward for each of the states."""
    return self.values[states, draw(cumulative(self.probs), key, states)]


@register("means", "scales", meta=("noise",))
@dataclasses.dataclass(frozen=True)
class NoisyRewards:
  """Rewards `means + scales * noise`.

  Attributes:
    means: `[S]`.
    scales: `[S]` or a number, not negative; 0 makes a reward certain.
    noise: of mean zero: "gaussian" (N(0, 1)), "exponential" (Exp(1) - 1) or "student_t2" (Student's
      t with two degrees of freedom, whose variance is infinite).
  """

  means: Any
  scales: Any
  noise: str = "gaussian"

  def __post_init__(self):
    checks.choice("noise", self.noise, NOISES)
    checks.vector("means", self.means)
    checks.finite("means", self.means, fetch=True)
    checks.not_negative("scales", self.scales, fetch=True)
    if jnp.ndim(self.scales):
      checks.same_shape(means=self.means, scales=self.scales)
    as_arrays(self, "means", "scales")
    object.__setattr__(self, "scales", jnp.broadcast_to(self.scales, self.means.shape))

  def cdf_at(self, values: jax.Array, states: jax.Array, *, left: bool = False) -> jax.Array:
    """Returns P(reward of the state <= value), or < with `left`."""
    scales, shifted = self.scales[states], values - self.means[states]
    scaled = shifted / jnp.where(scales > 0, scales, 1)
    if self.noise == "gaussian":
      found = jax.scipy.stats.norm.cdf(scaled)
    elif self.noise == "exponential":
      found = -jnp.expm1(-jnp.maximum(scaled + 1, 0))
    else:
      found = 0.5 + scaled / (2 * jnp.sqrt(2 + scaled**2))
    certain = shifted > 0 if left else shifted >= 0
    return jnp.where(scales > 0, found, certain.astype(found.dtype))

  def sample(self, key: Any, states: jax.Array) -> jax.Array:
    """Returns one reward for each of the states."""
    means, shape = self.means[states], jnp.shape(states)
    if self.noise == "gaussian":
      noise = jax.random.normal(key, shape, means.dtype)
    elif self.noise == "exponential":
      noise = jax.random.exponential(key, shape, means.dtype) - 1
    else:  # the quantile function of t_2
      least = jnp.finfo(means.dtype).eps / 4
      levels = jax.random.uniform(key, shape, means.dtype, minval=least, maxval=1 - 2 * least)
      noise = (2 * levels - 1) / jnp.sqrt(2 * levels * (1 - levels))
    return means + self.scales[states] * noise


@register("means", meta=("draw", "cdf"))
@dataclasses.dataclass(frozen=True)
class SampledRewards:
  """Rewards that a function draws.

  Attributes:
    means: `[S]`, the exact means.
    draw: `draw(key, states) -> rewards`, one for each of the states, whatever their shape; static.
    cdf: `cdf(values, states) -> P(reward of the state <= value)`, which quantile dynamic
      programming needs; static.
  """

  means: Any
  draw: Callable[[Any, jax.Array], jax.Array]
  cdf: Callable[[jax.Array, jax.Array], jax.Array] | None = None

  def __post_init__(self):
    checks.vector("means", self.means)
    checks.finite("means", self.means, fetch=True)
    if not callable(self.draw):
      raise ValueError(f"draw must be a function draw(key, states), got {self.draw!r}")
    as_arrays(self, "means")

  def cdf_at(self, values: jax.Array, states: jax.Array, *, left: bool = False) -> jax.Array:
    """Returns P(reward of the state <= value); no value has a probability of its own."""
    if self.cdf is None:
      raise ValueError("rewards.cdf must be a function cdf(values, states), got None")
    return self.cdf(values, states)

  def sample(self, key: Any, states: jax.Array) -> jax.Array:
    """Returns one reward for each of the states."""
    return self.draw(key, states)


def cumulative(probs: jax.Array) -> jax.Array:
  """Returns cumulative sums of rows; from where all probability is used up on, infinity."""
  sums = jnp.cumsum(probs, axis=-1)
  return jnp.where(sums >= sums[..., -1:], jnp.inf, sums)


def draw(cumulative: jax.Array, key: Any, rows: jax.Array) -> jax.Array:
  """Returns one column, int32, for each of the `rows`, from `cumulative` probabilities."""
  levels = jax.random.uniform(key, rows.shape, cumulative.dtype)
  return jnp.sum(cumulative[rows] <= levels[..., None], axis=-1, dtype=jnp.int32)
