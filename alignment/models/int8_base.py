"""A frozen base in int8: a quarter of the bytes of float32, and half of those of bfloat16.

Each matrix of the layers is stored as whole numbers of -127 to 127, with a scale for each output
feature. A layer multiplies its own matrix back where it uses it, so that a loop over layers holds
one of them in full. Adapters (`lora`) on such a base are trained as on any other:

  base = int8_base.quantise(params)
  adapters = lora.init(base, key, config=lora_config)

Embeddings, norms, biases and the head stay as they are. `lora.merge` gives plain weights again.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCALE = "kernel_scale"  # beside `kernel`


def quantise(params: Any) -> Any:
  """Returns parameters whose matrices in the layers are int8; other leaves are shared.

  Args:
    params: of `transformer` or `t5`, or a NamedTuple of them; NumPy arrays stay on the host.

  Returns:
    The tree of `params`, where each `kernel` `[L, in, out]` of the layers is int8 beside a
    `kernel_scale` `[L, out]` of the type that the kernel had. Their product is within half a scale
    of it, a 254th of the largest weight of its column.

  Example:
    >>> layers = {"up": {"kernel": np.float32([[[1.0, -4.0], [0.5, 2.0]]])}}
    >>> found = quantise({"layers": layers})["layers"]["up"]
    >>> found["kernel"][0].tolist(), (127 * found["kernel_scale"]).round(3).tolist()
    ([[127, -127], [64, 64]], [[1.0, 4.0]])
  """
  return _quantise(params, in_layers=False)


def _quantise(tree: Any, in_layers: bool) -> Any:
  if hasattr(tree, "_fields"):
    return type(tree)(*(_quantise(part, in_layers) for part in tree))
  if not isinstance(tree, Mapping):
    return tree
  parts = {name: _quantise(part, in_layers or name == "layers") for name, part in tree.items()}
  if in_layers and "kernel" in parts and SCALE not in parts:
    kernel = parts["kernel"]
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    wide = kernel.astype(xp.promote_types(kernel.dtype, xp.float32))
    scale = (abs(wide).max(-2) / 127).astype(kernel.dtype)
    divisor = xp.where(scale == 0, 1, scale)[..., None, :].astype(wide.dtype)
    parts["kernel"] = xp.clip(xp.round(wide / divisor), -127, 127).astype(xp.int8)
    parts[SCALE] = scale
  return parts


def dequantise(kernel: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns a kernel `[..., in, out]` in the type of its scale `[..., out]`."""
  wide = jnp.promote_types(scale.dtype, jnp.float32)
  return (kernel.astype(wide) * scale[..., None, :].astype(wide)).astype(scale.dtype)
