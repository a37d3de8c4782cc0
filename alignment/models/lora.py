"""Low-rank adapters (LoRA): the change of each matrix is a product of two thin ones.

A frozen kernel W `[in, out]` gets two trained factors A `[in, r]` and B `[r, out]`. The layer
computes x W + (alpha / r) (x A) B, so no array of W's size is added in training. B starts at zero:
the first policy is the base.

The adapters are the parameters of the algorithm. The base is an argument of the step that is
differentiated in nothing, so it has no gradient and no moments, and it is the reference policy too:

  config = lora.Config(rank=16, alpha=32)
  adapters = lora.init(base, key, config=config)
  state = ipo.init(adapters, optimizer=optimizer, config=ipo_config)

  @jax.jit
  def step(state, base, batch, key):
    policy = lora.bind(apply_fn, base, config=config)
    return ipo.update(
      state, batch, key, apply_fn=policy, optimizer=optimizer, config=ipo_config)

  policy_params = lora.join(base, state.params, config=config)  # for `sampling` and `apply_fn`
  merged = lora.merge(policy_params)                            # for `huggingface.save`

`join` copies nothing of the base. Every network whose matrices are `transformer.Dense` layers reads
a joined tree; `sampling` merges it once for each call. `alignment.models.peft` writes and reads
adapters as files.

Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Deviation: A is drawn as PEFT and the
authors' code draw it, uniform within 1 / sqrt(in); the paper says normal.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import sharding
from alignment.models import int8_base
from sharding import checks

A, B = "lora_a", "lora_b"  # beside `kernel`

# The side of a factor that faces the kernel is split as the kernel is; the rank is not. The scales
# are those of an int8 base.
SHARDING_RULES: sharding.Rules = (
  (r"(query|key|value|gate|up)/kernel_scale", P(None, "tensor")),
  (r"(output|down)/kernel_scale", P()),
  (r"attention/(query|key|value)/lora_a", P(None, "fsdp")),
  (r"attention/(query|key|value)/lora_b", P(None, None, "tensor")),
  (r"attention/output/lora_a", P(None, "tensor")),
  (r"attention/output/lora_b", P(None, None, "fsdp")),
  (r"mlp/(gate|up)/lora_a", P(None, "fsdp")),
  (r"mlp/(gate|up)/lora_b", P(None, None, "tensor")),
  (r"mlp/down/lora_a", P(None, "tensor")),
  (r"mlp/down/lora_b", P(None, None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """What is adapted, and how. Hashable.

  Attributes:
    rank: r, columns of A; at most the smaller side of each kernel.
    alpha: positive; the change is A B alpha / r.
    targets: names of the adapted layers, such as `("query", "value")`; None for all matrices of
      the layers.
    whole: names of parts that are trained in full, such as a head that the base does not have.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] | None = None
  whole: tuple[str, ...] = ("scalar_head",)

  def __post_init__(self):
    checks.count("rank", self.rank)
    checks.positive("alpha", self.alpha)
    if self.targets is not None and not self.targets:
      raise ValueError("targets is empty: name at least one layer, or give None for all of them")


def init(params: Any, key: jax.Array, *, config: Config) -> Any:
  """Returns the trained parameters: for each target A and B in float32, and the parts in `whole`.

  Args:
    params: of the base: nested dicts, or a NamedTuple of them. Layers may be stacked on axis 0.
    key: for A; B is zero.
    config: rank and targets.

  Returns:
    The tree of `params`, pruned: a target has `lora_a` `[..., in, r]` and `lora_b` `[..., r, out]`.

  Raises:
    ValueError: if a target is not a matrix of the layers, or the rank exceeds a side of one.

  Example:
    >>> layers = {"query": {"kernel": jnp.ones((2, 8, 6))}, "norm": {"scale": jnp.ones((2, 8))}}
    >>> adapters = init({"layers": layers}, jax.random.key(0), config=Config(rank=3))
    >>> jax.tree.map(jnp.shape, adapters)
    {'layers': {'query': {'lora_a': (2, 8, 3), 'lora_b': (2, 3, 6)}}}
  """
  kernels = {}
  for path, leaf in zip(sharding.tree_paths(params), jax.tree.leaves(params), strict=True):
    module, _, name = path.rpartition("/")
    if name == "kernel" and "layers" in module.split("/") and leaf.ndim >= 2:
      kernels[module] = leaf
  names = sorted({module.rpartition("/")[2] for module in kernels})
  targets = names if config.targets is None else config.targets
  unknown = [target for target in targets if target not in names]
  if unknown or not names:
    raise ValueError(
      f"targets has {unknown}: the matrices in the layers of this model are {', '.join(names)}"
    )
  factors = {}
  kernels = {path: k for path, k in kernels.items() if path.rpartition("/")[2] in targets}
  for (path, kernel), one in zip(kernels.items(), jax.random.split(key, len(kernels)), strict=True):
    *layers, rows, columns = kernel.shape
    if config.rank > min(rows, columns):
      raise ValueError(
        f"rank={config.rank} exceeds the smaller side of {path}, {rows} x {columns}: lower it, or "
        "leave this layer out of targets"
      )
    bound = 1 / math.sqrt(rows)
    a = jax.random.uniform(one, (*layers, rows, config.rank), jnp.float32, -bound, bound)
    factors[path] = {A: a, B: jnp.zeros((*layers, config.rank, columns), jnp.float32)}

  def trained(tree, path):
    if path in factors:
      return factors[path]
    if hasattr(tree, "_fields"):
      return type(tree)(*(trained(getattr(tree, name), name) for name in tree._fields))
    if not isinstance(tree, Mapping):
      return {}
    parts = {
      name: part if name in config.whole else trained(part, f"{path}/{name}" if path else name)
      for name, part in tree.items()
    }
    return {
      name: part for name, part in parts.items() if not (isinstance(part, Mapping) and not part)
    }

  return trained(params, "")


def join(params: Any, trained: Any, *, config: Config) -> Any:
  """Returns the parameters of the adapted network: the base with the trained parts in it.

  Args:
    params: of the base, shared and not copied.
    trained: from `init`, or changed by an optimiser.
    config: the one that `init` got.

  Returns:
    The tree of `params`, where a target has `lora_a`, and B alpha / r as `lora_b`, beside `kernel`.

  Raises:
    ValueError: if the adapters were made for another base or rank.
  """

  def beside(base, part, path):
    if hasattr(part, "_fields"):
      return type(part)(*(beside(getattr(base, n), getattr(part, n), n) for n in part._fields))
    if B in part:
      return {**base, A: part[A], B: _scaled(base, part, path, config)}
    joined = dict(base)
    for name, below in part.items():
      where = f"{path}/{name}" if path else name
      if name not in base:
        raise ValueError(f"params has no {where}: the adapters were made for another base")
      joined[name] = below if name in config.whole else beside(base[name], below, where)
    return joined

  return beside(params, trained, "")


def _scaled(base: Any, part: Any, path: str, config: Config) -> jax.Array:
  """Returns B alpha / r of one layer, whose shapes are checked."""
  shape = base["kernel"].shape
  wanted = {A: (*shape[:-1], config.rank), B: (*shape[:-2], config.rank, shape[-1])}
  for name, expected in wanted.items():
    if part[name].shape != expected:
      raise ValueError(
        f"{path}/{name} has shape {list(part[name].shape)}, and a base with a kernel "
        f"{list(shape)} at rank={config.rank} needs {list(expected)}: the adapters were made for "
        "another base or rank"
      )
  return part[B] * (config.alpha / config.rank)


def merge(params: Any) -> Any:
  """Returns a joined tree as a plain one: each change is added to its kernel, in its dtype.

  A tree without adapters is returned as it is, but for kernels in int8 (`int8_base`), which are
  multiplied out. The sum is made in float32 or wider.
  """
  if hasattr(params, "_fields"):
    return type(params)(*map(merge, params))
  if not isinstance(params, Mapping):
    return params
  beside = (A, B, int8_base.SCALE)
  plain = {name: merge(part) for name, part in params.items() if name not in beside}
  if int8_base.SCALE in params:
    plain["kernel"] = int8_base.dequantise(plain["kernel"], params[int8_base.SCALE])
  if B in params:
    kernel = plain["kernel"]
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    change = jnp.matmul(params[A], params[B], precision="highest", preferred_element_type=wide)
    plain["kernel"] = (kernel.astype(wide) + change).astype(kernel.dtype)
  return plain


def bind(apply_fn: Callable[..., Any], params: Any, *, config: Config) -> Callable[..., Any]:
  """Returns `apply_fn` as a function of the adapters: what an algorithm takes.

  Call it inside the compiled step, with the base as an argument of the step: outside of `jax.jit`
  the base would become a constant of the program.
  """

  def adapted(trained: Any, *inputs: Any) -> Any:
    return apply_fn(join(params, trained, config=config), *inputs)

  return adapted
