"""Tabular experiments as one compiled program: every method, setting and seed runs side by side.

A run of the training loop is a *sweep*: `Sweep.runs` holds the state of each method with leading
axes for settings and seeds, and one step of the loop is a scan of optimisation steps, vmapped over
those axes. The updates are the algorithms' own; nothing here knows a loss.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignment import sequences
from experiments.report import results
from sharding import checks


class Sweep(NamedTuple):
  """State of the loop.

  runs: the state of each method, leaves `[..., num_seeds, ...]`.
  step: `[]` int32, counts steps of the loop (scans), not optimisation steps.
  averages: of each method, what its last scan observed on average; `()` where nothing is.
  """

  runs: dict[str, Any]
  step: jax.Array
  averages: Any = ()


def apply_fn(params: jax.Array, completions: sequences.Sequences) -> jax.Array:
  """The tabular policy: `params [A]` are logits, tokens `[B, 1]` are arms; returns `[B, 1]`."""
  return jax.nn.log_softmax(params)[completions.tokens]


def contextual_apply_fn(params: jax.Array, completions: sequences.Sequences) -> jax.Array:
  """The same with contexts: `params [C, A]`, the row chosen by the last prompt token."""
  rows = sequences.repeat_prompts(completions)
  return jax.nn.log_softmax(params)[rows.prompt_tokens[:, -1:], rows.tokens]


def scan_updates(
  update: Callable[..., Any],
  draw: Callable[..., Any],
  num_steps: int,
  observe: Callable[[Any], Any] = lambda state: (),
) -> Callable[..., Any]:
  """Returns `run(state, data, key, config)`: `num_steps` updates in one scan.

  It gives the state, the last loss, and the mean over the scan of what `observe` sees in the state.

  Args:
    update: `(state, batch, key, config) -> (state, metrics)`.
    draw: `(data, keys) -> batches`, all batches of the scan with a leading axis of `num_steps`.
    num_steps: updates per call.
    observe: `state -> pytree` of arrays.
  """

  def run(state, data, key, config):
    draw_key, update_key = jax.random.split(key)
    batches = draw(data, draw_key)

    def body(state, inputs):
      batch, key = inputs
      state, metrics = update(state, batch, key, config=config)
      return state, (metrics["loss"], observe(state))

    keys = jax.random.split(update_key, num_steps)
    state, (losses, observed) = jax.lax.scan(body, state, (batches, keys))
    return state, losses[-1], jax.tree.map(lambda leaf: leaf.mean(0), observed)

  return run


def draw_arms(key: jax.Array, logits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws arms of the policy softmax(logits `[A]`), one uniform number each.

  `jax.random.categorical` needs A of them, which is most of a step's time here.
  """
  edges = jnp.cumsum(jax.nn.softmax(logits))[:-1]
  return jnp.sum(jax.random.uniform(key, shape)[..., None] > edges, axis=-1)


class NoData:
  """The batch iterator of a run that draws its batches on the device: ids count the steps.

  Every step gets the same `data`, arrays to draw from.
  """

  def __init__(self, data: Any = ()):
    self._data, self._step = data, 0

  def __iter__(self):
    return self

  def __next__(self):
    ids = np.array([self._step])
    self._step += 1
    return ids, self._data

  def get_state(self) -> dict[str, int]:
    return {"step": self._step}

  def set_state(self, state: Mapping[str, int]) -> None:
    self._step = state["step"]


def positives(config: Any, name: str) -> tuple[float, ...]:
  """Returns the field `name` of a config, a number or several, as floats.

  Raises:
    ValueError: if there is none, or one is not positive and finite.
  """
  field = functools.reduce(getattr, name.split("."), config)
  values = tuple(float(value) for value in np.atleast_1d(np.asarray(field, float)))
  if not values:
    raise ValueError(f"config.{name} is empty: give at least one number, such as (0.5, 1.0)")
  for value in values:
    checks.positive(f"config.{name}", value)
  return values


def check_counts(config: Any, **least: int) -> None:
  """Raises ValueError where `train.inner_steps` or a named field of `data` is too small."""
  sizes = {"train.inner_steps": (config.train.inner_steps, 1)}
  sizes |= {f"data.{name}": (config.data[name], bound) for name, bound in least.items()}
  for name, (value, bound) in sizes.items():
    checks.count(f"config.{name}", value, least=bound)


def cosine_adam(config: Any) -> optax.GradientTransformation:
  """Adam whose rate falls to zero over the run: what is random about the steps averages out."""
  num_steps = config.train.num_steps * config.train.inner_steps
  return optax.adam(optax.cosine_decay_schedule(config.optimizer.learning_rate, num_steps))


def broadcast(tree: Any, shape: tuple[int, ...]) -> Any:
  """Copies every leaf of `tree` along new leading axes `shape`."""
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape + jnp.shape(leaf)), tree)


def sample_table(
  sweep: Sweep, num_draws: int = 20, logits_of: Callable[[Any], Any] = lambda params: params
) -> results.Table:
  """Arms drawn from each method's policy (mean over the seeds), a row for each setting.

  Args:
    sweep: a run.
    num_draws: arms in a row.
    logits_of: from the parameters to the logits `[..., num_seeds, A]` of the policy.
  """
  rng, rows = np.random.default_rng(0), []
  for name, run in sweep.runs.items():
    probs = np.asarray(jax.nn.softmax(logits_of(run.params)), float).mean(-2)
    for setting in np.ndindex(*probs.shape[:-1]):
      chances = probs[setting] / probs[setting].sum()
      arms = np.array(arm_names(len(chances)))[rng.choice(len(chances), num_draws, p=chances)]
      rows.append([name, ", ".join(map(str, setting)), " ".join(arms)])
  return results.Table("Arms drawn from the trained policies", ["method", "setting", "arms"], rows)


@functools.lru_cache
def arm_names(num_actions: int) -> tuple[str, ...]:
  """The papers' names of the arms: a, b, c, ..."""
  return tuple("abcdefghijklmnopqrstuvwxyz"[:num_actions])
