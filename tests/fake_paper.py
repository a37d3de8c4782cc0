"""A paper small enough for tests of the core: linear regression with noise from the step's key.

It is also its own config file: `--config=tests/fake_paper.py:tiny`.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.loop import training
from experiments.report import plots, results, statistics

P = jax.sharding.PartitionSpec
SIZE, DIM = 64, 8


class State(NamedTuple):
  """A typed PRNG key and a bfloat16 leaf are there because they are easily lost on the way."""

  params: Any
  opt_state: Any
  step: jax.Array
  key: jax.Array
  average: jax.Array


class Data:
  """Shuffled examples; the position is one number."""

  def __init__(self, seed: int, batch_size: int, stop: int, delay: float = 0.0):
    self.position, self.stop = 0, stop
    self._seed, self._batch_size, self._delay = seed, batch_size, delay
    rng = np.random.default_rng(seed)
    self.inputs = rng.normal(size=(SIZE, DIM)).astype(np.float32)
    self.outputs = self.inputs @ np.arange(DIM, dtype=np.float32)

  def __iter__(self):
    return self

  def __next__(self):
    if self.position == self.stop:
      raise StopIteration
    time.sleep(self._delay)
    ids = np.random.default_rng([self._seed, self.position]).integers(0, SIZE, self._batch_size)
    self.position += 1
    return ids, {"x": self.inputs[ids], "y": self.outputs[ids]}

  def get_state(self):
    return str(self.position).encode()  # bytes, as some Grain iterators have

  def set_state(self, state):
    self.position = int(state.decode())


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
  """Returns the config of the only preset."""
  return ml_collections.ConfigDict(
    {
      "paper": "fake_paper",
      "preset": preset,
      "seed": 0,
      "algorithm": {"noise": 0.01, "taus": (0.1, 1.0), "flag": False, "nan_at": -1, "bad_at": -1},
      "data": {"batch_size": 16, "stop": -1, "name": "line"},
      "optimizer": {"learning_rate": 0.05},
      "sharding": {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 12, "log_every": 1, "delay": 0.0},
      "eval": {"every": 0},
      "checkpoint": {"every": 4, "keep": 1},
    }
  )


def build(config: Any) -> training.Experiment:
  """Returns the experiment."""
  optimizer = optax.adam(config.optimizer.learning_rate)
  algorithm = config.algorithm

  def init(key):
    init_key, key = jax.random.split(key)
    params = {"kernel": jax.random.normal(init_key, (DIM, 1)), "bias": jnp.zeros(1)}
    average = jnp.zeros((DIM, 1), jnp.bfloat16)
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), key, average)

  def update(state, batch, key):
    def loss_fn(params):
      noise = algorithm.noise * jax.random.normal(key, batch["y"].shape)
      errors = (batch["x"] @ params["kernel"] + params["bias"])[:, 0] - batch["y"] - noise
      return jnp.mean(errors**2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    bias = jnp.where(state.step == algorithm.bad_at, jnp.inf, params["bias"])
    params = {**params, "bias": bias}
    average = 0.9 * state.average + 0.1 * params["kernel"].astype(jnp.bfloat16)
    new = State(params, opt_state, state.step + 1, jax.random.fold_in(state.key, 1), average)
    loss = jnp.where(state.step == algorithm.nan_at, jnp.nan, loss)
    return new, {"loss": loss, "grad_norm": optax.global_norm(grads)}

  def batches():
    return Data(config.seed, config.data.batch_size, config.data.stop, config.train.delay)

  def evaluate(state):
    data = batches()
    outputs = np.asarray(data.inputs @ np.asarray(state.params["kernel"]))[:, 0]
    errors = (outputs - data.outputs) ** 2
    figure, axes = plots.subplots()
    axes[0][0].plot(data.outputs, outputs, ".")
    return results.Result(
      metrics={"error": statistics.mean_interval(errors), "size": SIZE},
      tables=[results.checks_table("Criteria <b>", [("error is finite", True), ("never", False)])],
      figures=[results.Figure("fit", "Predictions & targets", figure)],
      notes=["A note with <script>."],
      arrays={"errors": errors},
    )

  def sample(state):
    kernel = np.asarray(state.params["kernel"])[:, 0]
    return results.Table(
      "Weights", ["weight", "value"], [[i, float(w)] for i, w in enumerate(kernel)]
    )

  def export(state, folder):
    folder.mkdir(exist_ok=True)
    np.save(folder / "kernel.npy", np.asarray(state.params["kernel"]))

  def figures(history, result):
    figure, axes = plots.subplots()
    axes[0][0].plot([record["loss"] for record in history], label="loss")
    axes[0][0].legend()
    assert result.arrays["errors"].shape == (SIZE,)
    return [results.Figure("loss", "The loss.", figure)]

  return training.Experiment(
    init=init,
    update=update,
    batches=batches,
    headline="error",
    maximise=False,
    rules=(("kernel", P("fsdp")), (".*", P())),
    evaluate=evaluate,
    sample=sample,
    export=export,
    figures=figures,
  )
