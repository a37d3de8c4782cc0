"""MLPs that predict or project embeddings, and the layers that they share with the encoders."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Uniform within 1 / sqrt(inputs): PyTorch's default for linear layers, and so the authors'.
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# A normal distribution with deviation 1 / sqrt(inputs), cut off at two deviations: Haiku's default,
# and so that of BYOL. Flax would widen it until its deviation after the cut is 1 / sqrt(inputs).
TRUNCATED = nn.initializers.variance_scaling(0.87962566103423978**2, "fan_in", "truncated_normal")


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


class BatchNormMLP(nn.Module):
  """A linear layer, batch normalisation, ReLU and a linear layer without a bias.

  This is the projector and the predictor of BYOL; the output is not normalised.

  Attributes:
    hidden: size of the hidden layer.
    width: size of the output.
    batch_norm_decay: share of the old running statistics that is kept in a training pass.
    dtype: of the computation; parameters and statistics stay float32. The default is the input's.
  """

  hidden: int = 4096
  width: int = 256
  batch_norm_decay: float = 0.9
  dtype: Any = None

  @nn.compact
  def __call__(self, embeddings: jax.Array, *, train: bool) -> jax.Array:
    """Returns `[N, width]` from `[N, K]`."""
    hidden = nn.Dense(self.hidden, kernel_init=TRUNCATED, dtype=self.dtype)(embeddings)
    hidden = nn.BatchNorm(
      momentum=self.batch_norm_decay, use_running_average=not train, dtype=self.dtype
    )(hidden)
    return nn.Dense(self.width, use_bias=False, kernel_init=TRUNCATED, dtype=self.dtype)(
      nn.relu(hidden)
    )
