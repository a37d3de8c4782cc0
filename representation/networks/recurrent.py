"""Networks of latent prediction: a recurrent reader of episodes, and the open-loop model.

`networks` turns them into the pure functions that `latent_prediction` takes.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from representation import latent_prediction
from representation.networks import adapters, mlp


def cell(width: int) -> nn.GRUCell:
  """Returns a gated recurrent unit that starts from a normal recurrent kernel.

  Flax's default is orthogonal. It takes QR decompositions, and on few CPU cores JAX 0.10 can wait
  for ever where several of them are batched over seeds.
  """
  return nn.GRUCell(width, recurrent_kernel_init=nn.initializers.lecun_normal())


class Reader(nn.Module):
  """Embeds observations and reads them with a gated recurrent unit, from a state of zeros.

  Each step reads the embedding of its observation and the action before it, one-hot; the first
  step has no action before it and reads zeros.

  Attributes:
    width: of the embeddings and of the state.
    num_actions: A.
  """

  width: int
  num_actions: int

  def setup(self):
    self.first, self.second = nn.Dense(self.width), nn.Dense(self.width)
    self.cell = cell(self.width)

  def embed(self, observations: jax.Array) -> jax.Array:
    """Returns embeddings `[..., width]` of observations `[..., O]`."""
    return self.second(nn.relu(self.first(observations)))

  def step(self, state: jax.Array, embedding: jax.Array, before: jax.Array) -> jax.Array:
    """Returns the next state `[..., width]`; `before` `[...]` are actions, -1 for none."""
    inputs = jnp.concatenate([embedding, jax.nn.one_hot(before, self.num_actions)], axis=-1)
    return self.cell(state, inputs)[0]

  def __call__(self, state: jax.Array, observations: jax.Array, before: jax.Array) -> jax.Array:
    """Returns the state after one more observation."""
    return self.step(state, self.embed(observations), before)


class OpenLoop(nn.Module):
  """One step of a gated recurrent unit that reads an action only.

  Attributes:
    width: of the state.
    num_actions: A.
  """

  width: int
  num_actions: int

  @nn.compact
  def __call__(self, hidden: jax.Array, actions: jax.Array) -> jax.Array:
    return cell(self.width)(hidden, jax.nn.one_hot(actions, self.num_actions))[0]


@dataclasses.dataclass(frozen=True)
class Agent:
  """A `Reader` as `agent(params, observations, actions) -> latent_prediction.Encoded`.

  Attributes:
    module: the reader.
  """

  module: Reader

  def __call__(
    self, params: Any, observations: jax.Array, actions: jax.Array
  ) -> latent_prediction.Encoded:
    variables = {"params": params}
    embeddings: Any = self.module.apply(variables, observations, method="embed")
    before = jnp.concatenate([jnp.full_like(actions[:, :1], -1), actions[:, :-1]], axis=1)

    def body(state: Any, step: Any) -> tuple[Any, Any]:
      state = self.module.apply(variables, state, *step, method="step")
      return state, state

    by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (embeddings, before))
    _, states = jax.lax.scan(body, self.start(len(actions)), by_time)
    return latent_prediction.Encoded(embeddings, jnp.swapaxes(states, 0, 1))

  def start(self, batch_size: int) -> jax.Array:
    """Returns the state before the first step, `[B, width]` of zeros."""
    return jnp.zeros((batch_size, self.module.width))

  def step(self, params: Any, state: jax.Array, observations: jax.Array, before: jax.Array) -> Any:
    """Returns the state `[B, width]` after one more observation; see `Reader.step`."""
    return self.module.apply({"params": params}, state, observations, before)

  def init(self, key: jax.Array, observations: jax.Array) -> Any:
    """Returns parameters; `observations` are `[B, O]`."""
    batch_size = len(observations)
    before = jnp.full(batch_size, -1)
    return self.module.init(key, self.start(batch_size), observations, before)["params"]


def networks(width: int, num_actions: int) -> latent_prediction.Networks:
  """Returns all networks, with embeddings, states and hidden layers of one width."""
  head = adapters.Predictor(mlp.MLP(width, width))
  return latent_prediction.Networks(
    Agent(Reader(width, num_actions)), adapters.Predictor(OpenLoop(width, num_actions)), head, head
  )


def init(key: jax.Array, apply_fn: Any, observations: jax.Array) -> latent_prediction.Params:
  """Returns parameters of what `networks` returned; `observations` are `[B, O]`."""
  keys = jax.random.split(key, 4)
  hidden = apply_fn.agent.start(len(observations))
  actions = jnp.zeros(len(observations), int)
  return latent_prediction.Params(
    apply_fn.agent.init(keys[0], observations),
    apply_fn.dynamics.init(keys[1], hidden, actions),
    apply_fn.forward.init(keys[2], hidden),
    apply_fn.backward.init(keys[3], hidden),
  )
