"""The MLP that predicts or projects embeddings, and the layers that it shares with the encoders."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# Uniform within 1 / sqrt(inputs): PyTorch's default for linear layers, and so the authors'.
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def prelu() -> nn.Module:
  """Returns a PReLU layer with PyTorch's initial slope."""
  return nn.PReLU(negative_slope_init=0.25)


class MLP(nn.Module):
  """A linear layer, PReLU and a linear layer, without normalisation.

  With batch normalisation in its predictor BGRL can collapse.

  Attributes:
    hidden: size of the hidden layer.
    width: size of the output.
    activation: used in place of PReLU, such as `jax.nn.elu` in the projector of GRACE.
  """

  hidden: int
  width: int
  activation: Callable[[jax.Array], jax.Array] | None = None

  @nn.compact
  def __call__(self, embeddings: jax.Array) -> jax.Array:
    """Returns `[N, width]` from `[N, K]`."""

    def linear(rows: jax.Array, width: int) -> jax.Array:
      def bias(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) / rows.shape[-1] ** 0.5

      return nn.Dense(width, kernel_init=UNIFORM, bias_init=bias)(rows)

    hidden = (self.activation or prelu())(linear(embeddings, self.hidden))
    return linear(hidden, self.width)
