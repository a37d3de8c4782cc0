"""Conversion between the parameter tree of `transformer` and the flat tensors of a checkpoint.

Checkpoints store one matrix `[out, in]` for each layer. `transformer` and `t5` stack the layers on
axis 0 and multiply from the right, `[L, in, out]`. A file format adds a table from the paths below
to its own names.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment.models import t5, transformer
from alignment.models.architectures import Config


@dataclasses.dataclass(frozen=True)
class Tensors:
  """The tensors of a file format.

  Attributes:
    names: stored names by path, with `{}` in place of the layer's number:
      "layers/mlp/up/kernel" -> "model.layers.{}.mlp.up_proj.weight". Paths with the same stored
      name share a tensor, one behind the other in the order of `names`.
    transposed: matrices are `[out, in]`; False: `[in, out]`.
    by_head: shared tensors hold the first head of each path, then the second of each, and so on.
    optional_prefix: of all names, which files of the bare model leave out.
  """

  names: Mapping[str, str]
  transposed: bool = True
  by_head: bool = False
  optional_prefix: str = ""


def names(layer: Mapping[str, str], prefix: str, **others: str) -> dict[str, str]:
  """Returns the stored names of all parameters by path, for a format that calls them regularly.

  Args:
    layer: what each part of a layer is called.
    prefix: before the names of a layer.
    others: the same for parts outside of the layers.
  """
  stems = others | {f"layers/{part}": prefix + name for part, name in layer.items()}
  result: dict[str, str] = {}
  for part, stem in stems.items():
    kind = "scale" if part.endswith("norm") else "kernel"
    kind = "embedding" if part in ("embed", "positions") else kind
    result |= {f"{part}/{kind}": f"{stem}.weight", f"{part}/bias": f"{stem}.bias"}
  return result


@functools.cache
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
  init: Any = t5.init_params if isinstance(config, t5.T5Config) else transformer.init_params
  leaves = _flatten(jax.eval_shape(functools.partial(init, config), jax.random.key(0)))
  return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _groups(config: Config, tensors: Tensors) -> dict[str, list[str]]:
  """Returns the paths that each stored tensor holds, by its name with `{}` for the layer."""
  has, groups = shapes(config), dict[str, list[str]]()
  if not has.keys() <= tensors.names.keys():
    nameless = _some(sorted(has.keys() - tensors.names.keys()))
    raise ValueError(f"this format of files has no place for {nameless}, which the config asks for")
  for path, name in tensors.names.items():
    if path in has:
      groups.setdefault(name, []).append(path)
  return groups


def stored_shapes(config: Config, tensors: Tensors) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor of a checkpoint by its stored name."""
  result: dict[str, tuple[int, ...]] = {}
  for name, paths in _groups(config, tensors).items():
    parts = [shapes(config)[path] for path in paths]
    layers = range(parts[0][0]) if _in_layers(paths) else ()
    shape = parts[0][1:] if layers else parts[0]
    if len(parts) > 1:
      shape = (*shape[:-1], sum(part[-1] for part in parts))
    if _is_transposed(tensors, paths):
      shape = shape[::-1]
    result |= {name.format(layer): shape for layer in layers} if layers else {name: shape}
  return result


def check_names(config: Config, tensors: Tensors, found: set[str], where: Any) -> None:
  """Raises `ValueError`, which names `where` and the tensors, if any is missing or unknown."""
  wanted = stored_shapes(config, tensors).keys()
  for problem, those in (("lacks", wanted - found), ("has unknown", found - wanted)):
    if those:
      raise ValueError(
        f"{where} {problem} {len(those)} tensor(s): {_some(sorted(those))}; a model of this family "
        f"with {config.num_layers} layers and {'a tied' if config.tied_head else 'its own'} head "
        f"has {len(wanted)} tensors: is the file complete, and of this architecture?"
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
  tensors: Tensors,
  read: Callable[[str], np.ndarray],
  dtype: Any,
) -> transformer.Params:
  """Returns parameters as NumPy arrays, made from the tensors that `read(stored name)` returns.

  Args:
    config: the shape of the model.
    tensors: stored names.
    read: returns a tensor of the shape in `stored_shapes`, of any float type.
    dtype: of the result.

  Returns:
    The tree of `transformer` or `t5`. Memory holds one copy of the model and one tensor at a time.
  """
  arrays = {path: np.empty(shape, dtype) for path, shape in shapes(config).items()}
  for name, paths in _groups(config, tensors).items():
    in_layers = _in_layers(paths)
    for layer in range(len(arrays[paths[0]]) if in_layers else 1):
      places = [arrays[path][layer] if in_layers else arrays[path] for path in paths]
      tensor = read(name.format(layer))
      tensor = tensor.T if _is_transposed(tensors, paths) else tensor
      parts = _split(tensor, [place.shape[-1] for place in places], config, tensors)
      for place, part in zip(places, parts, strict=True):
        place[...] = part
  params: transformer.Params = {}
  for path, array in arrays.items():
    _set(params, path, array)
  return params


def _split(tensor, sizes, config, tensors) -> list[np.ndarray]:
  if len(sizes) == 1:
    return [tensor]
  if not tensors.by_head:
    return np.split(tensor, np.cumsum(sizes)[:-1], axis=-1)
  shape = (*tensor.shape[:-1], config.num_heads, len(sizes), config.head_dim)
  return [
    part.reshape(*tensor.shape[:-1], -1) for part in np.moveaxis(tensor.reshape(shape), -2, 0)
  ]


def _join(parts, config, tensors) -> np.ndarray:
  """The inverse of `_split`."""
  if len(parts) == 1:
    return parts[0]
  if not tensors.by_head:
    return np.concatenate(parts, axis=-1)
  shape = (*parts[0].shape[:-1], config.num_heads, config.head_dim)
  return np.stack([x.reshape(shape) for x in parts], axis=-2).reshape(*shape[:-2], -1)


def check_params(config: Config, params: transformer.Params) -> None:
  """Raises `ValueError`, which names the path, unless `params` is the tree of `config`."""
  expected, leaves = shapes(config), _flatten(params)
  if leaves.keys() != expected.keys():
    different = sorted(leaves.keys() ^ expected.keys())
    raise ValueError(
      f"params do not fit the config: {_some(different)} is in one and not in the other "
      f"(tied_head={config.tied_head}): pass the config that the params were made with"
    )
  for path, leaf in leaves.items():
    if tuple(leaf.shape) != expected[path]:
      raise ValueError(
        f"params: {path} has shape {list(leaf.shape)}, the config asks for "
        f"{list(expected[path])}: pass the config that the params were made with"
      )


def unstack(config: Config, tensors: Tensors, params: transformer.Params) -> dict[str, np.ndarray]:
  """Returns contiguous tensors by stored name: the inverse of `stack`.

  Raises:
    ValueError: `params` is not the tree of `config`; the message names the path.
  """
  check_params(config, params)
  leaves = _flatten(params)
  stored = {}
  for name, paths in _groups(config, tensors).items():
    arrays = [np.asarray(leaves[path]) for path in paths]
    in_layers = _in_layers(paths)
    for layer in range(len(arrays[0]) if in_layers else 1):
      tensor = _join([x[layer] if in_layers else x for x in arrays], config, tensors)
      tensor = tensor.T if _is_transposed(tensors, paths) else tensor
      stored[name.format(layer)] = np.ascontiguousarray(tensor)
  return stored


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


def with_half_pairs(
  config: transformer.TransformerConfig, params: transformer.Params
) -> transformer.Params:
  """Returns parameters of the same function with "half" rotary pairs; unchanged leaves are shared.

  Queries, keys, their biases and the scales of their norms are reordered if they are "adjacent".
  """
  if config.rope_pairing == "half":
    return params
  parts = dict(params["layers"]["attention"])
  for name in {"query", "key", "query_norm", "key_norm"} & parts.keys():
    leaves = parts[name].items()
    parts[name] = {kind: adjacent_to_half(np.asarray(x), config.head_dim) for kind, x in leaves}
  return {**params, "layers": {**params["layers"], "attention": parts}}


def _in_layers(paths: list[str]) -> bool:
  return "layers/" in paths[0]


def _is_transposed(tensors: Tensors, paths: list[str]) -> bool:
  # The head is a plain matrix also where those of the layers are not.
  head = paths == ["head/kernel"]
  return paths[0].endswith("kernel") and (tensors.transposed or head)


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
