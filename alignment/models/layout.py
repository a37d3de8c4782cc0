"""Conversion between the parameter tree of `transformer` and the flat tensors of a checkpoint.

Checkpoints store one matrix `[out, in]` for each layer. `transformer` and `t5` stack the layers on
axis 0 and multiply from the right, `[L, in, out]`. A file format adds a table from the paths below
to its own names, with `{}` in place of the layer's number.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment.models import t5, transformer
from alignment.models.architectures import Config

Names = Mapping[str, str]  # "layers/mlp/up/kernel" -> "model.layers.{}.mlp.up_proj.weight"


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter of a config by its path; the layers are axis 0.

  Example:
    >>> tiny = transformer.TransformerConfig(
    ...   vocab_size=32, num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_dim=4,
    ...   mlp_width=16, max_length=64,
    ... )
    >>> shapes(tiny)["layers/attention/key/kernel"]
    (2, 8, 4)
  """
  if isinstance(config, t5.T5Config):
    tree = jax.eval_shape(lambda key: t5.init_params(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in _flatten(tree).items()}
  depth, width, mlp = config.num_layers, config.width, config.mlp_width
  queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  result: dict[str, tuple[int, ...]] = {
    "embed/embedding": (config.vocab_size, width),
    "layers/attention_norm/scale": (depth, width),
    "layers/attention/query/kernel": (depth, width, queries),
    "layers/attention/key/kernel": (depth, width, keys),
    "layers/attention/value/kernel": (depth, width, keys),
    "layers/attention/output/kernel": (depth, queries, width),
    "layers/mlp_norm/scale": (depth, width),
    "layers/mlp/gate/kernel": (depth, width, mlp),
    "layers/mlp/up/kernel": (depth, width, mlp),
    "layers/mlp/down/kernel": (depth, mlp, width),
    "final_norm/scale": (width,),
  }
  if not config.tied_head:
    result["head/kernel"] = (width, config.vocab_size)
  return result


def stored_shapes(config: Config, names: Names) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor of a checkpoint by its stored name."""
  result = {}
  for path, shape in shapes(config).items():
    if "layers/" in path:
      for layer in range(shape[0]):
        result[names[path].format(layer)] = _stored(path, shape[1:])
    else:
      result[names[path]] = _stored(path, shape)
  return result


def check_names(config: Config, names: Names, found: set[str], where: Any) -> None:
  """Raises `ValueError`, which names `where` and the tensors, if any is missing or unknown."""
  wanted = stored_shapes(config, names).keys()
  family = "T5" if isinstance(config, t5.T5Config) else "Llama"
  for problem, those in (("lacks", wanted - found), ("has unknown", found - wanted)):
    if those:
      raise ValueError(
        f"{where} {problem} {len(those)} tensor(s): {_some(sorted(those))}; a {family} of "
        f"{config.num_layers} layers with {'a tied' if config.tied_head else 'its own'} head has "
        f"{len(wanted)} tensors and no biases: is the file complete, and of this architecture?"
      )


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], where: Any) -> None:
  """Raises `ValueError` unless a stored tensor has the shape that the config asks for."""
  if tuple(shape) != tuple(expected):
    raise ValueError(
      f"{where}: tensor {name} has shape {list(shape)}, its configuration asks for "
      f"{list(expected)}: configuration and weights belong to different models"
    )


def check_finite(name: str, tensor: np.ndarray, where: Any) -> None:
  """Raises `ValueError` if a stored tensor holds NaN or infinity."""
  finite = np.isfinite(tensor)
  if not finite.all():
    raise ValueError(
      f"{where}: tensor {name} holds {finite.size - np.count_nonzero(finite)} values that are NaN "
      "or infinite: the model diverged in training, or the file is corrupt; choose another "
      "checkpoint, or copy it again"
    )


def stack(
  config: Config,
  names: Names,
  read: Callable[[str], np.ndarray],
  dtype: Any,
) -> transformer.Params:
  """Returns parameters as NumPy arrays, made from the tensors that `read(stored name)` returns.

  Args:
    config: the shape of the model.
    names: stored names.
    read: returns a tensor of the shape in `stored_shapes`, of any float type.
    dtype: of the result.

  Returns:
    The tree of `transformer` or `t5`. Memory holds one copy of the model and one tensor at a time.
  """
  params: transformer.Params = {}
  for path, shape in shapes(config).items():
    array = np.empty(shape, dtype)
    if "layers/" in path:
      for layer in range(shape[0]):
        array[layer] = _stored_view(path, read(names[path].format(layer)))
    else:
      array[...] = _stored_view(path, read(names[path]))
    _set(params, path, array)
  return params


def unstack(config: Config, names: Names, params: transformer.Params) -> dict[str, np.ndarray]:
  """Returns contiguous tensors by stored name: the inverse of `stack`.

  Raises:
    ValueError: `params` is not the tree of `config`; the message names the path.
  """
  expected, leaves = shapes(config), _flatten(params)
  if leaves.keys() != expected.keys():
    different = sorted(leaves.keys() ^ expected.keys())
    raise ValueError(
      f"params do not fit the config: {_some(different)} is in one and not in the other "
      f"(tied_head={config.tied_head}): pass the config that the params were made with"
    )
  tensors = {}
  for path, leaf in leaves.items():
    if tuple(leaf.shape) != expected[path]:
      raise ValueError(
        f"params: {path} has shape {list(leaf.shape)}, the config asks for "
        f"{list(expected[path])}: pass the config that the params were made with"
      )
    array = np.asarray(leaf)
    if "layers/" in path:
      for layer in range(len(array)):
        view = _stored_view(path, array[layer])
        tensors[names[path].format(layer)] = np.ascontiguousarray(view)
    else:
      tensors[names[path]] = np.ascontiguousarray(_stored_view(path, array))
  return tensors


def common_dtype(params: transformer.Params) -> np.dtype:
  """Returns the narrowest type that holds every leaf exactly."""
  return np.dtype(jnp.result_type(*(leaf.dtype for leaf in _flatten(params).values())))


def adjacent_to_half(kernel: np.ndarray, head_dim: int) -> np.ndarray:
  """Reorders query or key columns from rotary pairs (2i, 2i + 1) to (i, i + head_dim / 2).

  Args:
    kernel: `[..., heads * head_dim]`.
    head_dim: even.

  Returns:
    The same shape. With "half" pairing it gives the attention that `kernel` gives with "adjacent".

  Example:
    >>> adjacent_to_half(np.arange(8), head_dim=4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
  """
  pairs = kernel.reshape(*kernel.shape[:-1], -1, head_dim // 2, 2)
  return pairs.swapaxes(-1, -2).reshape(kernel.shape)


def _stored(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape[::-1] if path.endswith("kernel") else shape


def _stored_view(path: str, array: np.ndarray) -> np.ndarray:
  return array.T if path.endswith("kernel") else array


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
  *parents, last = path.split("/")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  leaves: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      leaves.update(_flatten(value, f"{prefix}{key}/"))
    else:
      leaves[f"{prefix}{key}"] = value
  return leaves


def _some(names: list[str], limit: int = 3) -> str:
  return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
