"""LARS: momentum SGD whose step of each weight matrix is in proportion to the matrix's norm.

`optax.lars` multiplies by the learning rate before the momentum, so a step mixes the learning rates
of the steps before. In the code of BYOL, the learning rate multiplies the momentum. Both are equal
for a constant learning rate. With one that rises and falls, as BYOL's does, they are not.

Reference: You et al. 2017, https://arxiv.org/abs/1708.03888, as used by Grill et al. 2020,
https://arxiv.org/abs/2006.07733.
"""

import optax

import sharding
from sharding import checks


def lars(
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: float = 1.5e-6,
  trust_coefficient: float = 1e-3,
  momentum: float = 0.9,
) -> optax.GradientTransformation:
  """Returns LARS as an optax transformation.

  For a leaf w with gradient g, one step is

    u  = g + weight_decay * w
    u  = trust_coefficient * |w| / |u| * u     if neither norm is 0
    mu = momentum * mu + u
    w  = w - learning_rate * mu

  The first two lines are left out for biases and for the scales of normalisation layers
  (`sharding.decay_mask`).

  Args:
    learning_rate: a number, or a function of the step such as `byol.learning_rate_schedule`.
    weight_decay: not negative.
    trust_coefficient: positive.
    momentum: in [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([1.0])}
    >>> grads = {"kernel": jnp.array([[0.6, 0.8]]), "bias": jnp.array([0.5])}
    >>> optimizer = lars(0.1)
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> print(updates["kernel"], updates["bias"])
    [[-0.0003 -0.0004]] [-0.05]
  """
  checks.not_negative("weight_decay", weight_decay)
  checks.positive("trust_coefficient", trust_coefficient)
  checks.probabilities("momentum", momentum)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=sharding.decay_mask),
    optax.masked(
      optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), sharding.decay_mask
    ),
    optax.trace(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )
