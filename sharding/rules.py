r"""Rules that say how each leaf of a state is split over a mesh.

A rule is a pair (regular expression, `PartitionSpec`). The expression is searched in the leaf's
path, such as `params/layers/mlp/up/kernel` or `opt_state/0/mu/layers/mlp/up/kernel`, and the
first rule that matches wins. So one rule places a parameter, its moving-average target and its
optimiser moments alike:

  RULES = (
    (r"mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"scale$", P()),                                       # normalisation: whole on each device
    (r".*", P(None, "fsdp")),
  )

A pattern is not anchored: write `^params/` or `kernel$` where that matters. A leaf without a rule,
or one that its rule cannot split evenly, is an error that names the leaf. Two kinds of leaf are
exempt and are replicated:

- a leaf of one element (step counters, PRNG keys, adafactor's `[1]` placeholders), and
- under `opt_state`, a leaf of lower rank than its rule: adafactor's row and column moments have the
  path of a matrix but one axis less. To shard them, put a rule such as
  `("v_(row|col)/", P("fsdp"))` before it.
"""

import math
import re
from typing import Any

import jax
import numpy as np

# Pairs (regular expression on the path, PartitionSpec); the first match wins.
Rules = tuple[tuple[str, jax.sharding.PartitionSpec], ...]

REPLICATED: Rules = ((".*", jax.sharding.PartitionSpec()),)


def tree_paths(tree: Any) -> list[str]:
  """Returns the path of every leaf, keys joined by `/`, in the order of `jax.tree.leaves`.

  Example:
    >>> tree_paths({"params": {"Dense_0": {"bias": 1, "kernel": 2}}, "opt_state": (3, 4)})
    ['opt_state/0', 'opt_state/1', 'params/Dense_0/bias', 'params/Dense_0/kernel']
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def decay_mask(params: Any) -> Any:
  """Returns which leaves weight decay shrinks: all but those named `bias` or `scale`, as a tree.

  By name, since the layers of a model may be stacked, so that the scale of a norm has two axes.
  optax takes it as a mask.

  Example:
    >>> decay_mask({"norm": {"scale": 1}, "dense": {"kernel": 2, "bias": 3}})
    {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
  """
  names = [path.rpartition("/")[2] for path in tree_paths(params)]
  return jax.tree.unflatten(
    jax.tree.structure(params), [name not in ("scale", "bias") for name in names]
  )


def infer_shardings(
  tree: Any, rules: Rules, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> Any:
  """Returns the sharding of every leaf of a tree, by the first rule that matches its path.

  Args:
    tree: arrays, or their shapes as `jax.eval_shape` returns them.
    rules: ordered pairs (regular expression, `PartitionSpec`), see the module's docstring.
    mesh: the mesh (or an `AbstractMesh`: no device is needed) whose axes the rules name.

  Returns:
    The same tree with a `jax.sharding.NamedSharding` at each leaf.

  Raises:
    ValueError: if a rule is malformed or names an axis that the mesh lacks, and, with the path
      of the leaf, if no rule matches, the rule has more entries than the leaf has dimensions,
      or a dimension does not divide.

  Example:
    >>> P = jax.sharding.PartitionSpec
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    >>> rules = (("kernel", P("fsdp", "tensor")), (".*", P()))
    >>> tree = {"kernel": np.zeros((8, 6)), "bias": np.zeros(6)}
    >>> {name: leaf.spec for name, leaf in infer_shardings(tree, rules, mesh).items()}
    {'bias': P(), 'kernel': P('fsdp', 'tensor')}
    >>> infer_shardings({"kernel": np.zeros((6, 6))}, rules, mesh)
    Traceback (most recent call last):
    ...
    ValueError: leaf 'kernel' of shape (6, 6): dimension 0 of size 6 does not divide over mesh \
axis 'fsdp' of size 4, as rule ('kernel', P('fsdp', 'tensor')) asks. Change the size or the \
mesh, or put a rule for this path before it.
  """
  sizes = dict(mesh.shape)
  _check_rules(rules, sizes)
  leaves, treedef = jax.tree.flatten(tree)
  specs = [
    _infer_spec(path, np.shape(leaf), rules, sizes)
    for path, leaf in zip(tree_paths(tree), leaves, strict=True)
  ]
  shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
  return jax.tree.unflatten(treedef, shardings)


def _infer_spec(
  path: str, shape: tuple[int, ...], rules: Rules, sizes: dict[str, int]
) -> jax.sharding.PartitionSpec:
  """Returns the spec of one leaf; `sizes` are those of the mesh axes."""
  if math.prod(shape) <= 1:
    return jax.sharding.PartitionSpec()
  rule = next((rule for rule in rules if re.search(rule[0], path)), None)
  if rule is None:
    raise ValueError(
      f"no rule matches leaf {path!r} of shape {shape}: add one, or end the rules with "
      "('.*', PartitionSpec()) to replicate all other leaves."
    )
  spec = rule[1]
  if len(spec) > len(shape):
    if re.search("(^|/)opt_state/", path):  # a factored moment, see the module's docstring
      return jax.sharding.PartitionSpec()
    raise ValueError(
      f"leaf {path!r} of shape {shape} has fewer dimensions than rule {rule} has entries: put "
      "a rule for this path before it."
    )
  for dimension, (size, entry) in enumerate(zip(shape, spec, strict=False)):
    names = _axis_names(entry)
    shards = math.prod(sizes[name] for name in names)
    if size % shards:
      axes = " x ".join(repr(name) for name in names)
      raise ValueError(
        f"leaf {path!r} of shape {shape}: dimension {dimension} of size {size} does not divide "
        f"over mesh axis {axes} of size {shards}, as rule {rule} asks. Change the size or the "
        "mesh, or put a rule for this path before it."
      )
  return spec


def _check_rules(rules: Rules, sizes: dict[str, int]) -> None:
  """Raises `ValueError` for a malformed rule, even if no leaf uses it."""
  for index, rule in enumerate(rules):
    # Without its comma, `(("kernel", spec),)` is the pair itself, whose items are not rules.
    pair = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)
    if not pair or not isinstance(rule[1], jax.sharding.PartitionSpec):
      raise ValueError(
        f"rules[{index}] is {rule!r}: each rule is a pair (regular expression, PartitionSpec), "
        "and a tuple of one rule needs its comma: ((pattern, spec),)."
      )
    try:
      re.compile(rule[0])
    except re.error as error:
      raise ValueError(
        f"rules[{index}]: {rule[0]!r} is not a regular expression: {error}."
      ) from error
    names = [name for entry in rule[1] for name in _axis_names(entry)]
    for name in names:
      if name not in sizes:
        raise ValueError(
          f"rules[{index}] {rule} names axis {name!r}, and the mesh has {sizes}: make the mesh "
          f"with {name!r} (size 1 switches an axis off), or correct the rule."
        )
      if names.count(name) > 1:
        raise ValueError(
          f"rules[{index}] {rule} uses axis {name!r} twice: an axis can split one dimension only."
        )


def _axis_names(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes in one entry of a spec: None, a name, or several names."""
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)
