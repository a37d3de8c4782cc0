"""The checks of arguments: what they see, what passes unseen, and what they say."""

import dataclasses
import fractions
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sharding import checks

# Each check of values, with a value that it accepts and one that it refuses.
VALUE_CHECKS = {
  "positive": (functools.partial(checks.positive, "x"), 0.1, 0.0),
  "not_negative": (functools.partial(checks.not_negative, "x"), 0.0, -0.1),
  "probabilities": (functools.partial(checks.probabilities, "x"), 1.0, 1.1),
  "fractions": (functools.partial(checks.fractions, "x"), 0.5, 1.0),
  "finite": (functools.partial(checks.finite, "x"), 0.5, np.nan),
}
each_value_check = pytest.mark.parametrize(
  ("check", "good", "bad"), VALUE_CHECKS.values(), ids=VALUE_CHECKS
)


# --- what is seen ---


@each_value_check
def test_values_on_the_host_are_seen(check, good, bad):
  for make in (
    float,
    np.float32,
    np.asarray,
    lambda x: [good, x],
    lambda x: (good, x),
    lambda x: [[good, good], [good, x]],
    lambda x: np.array([good, x]),
    lambda x: np.array([good, x], ml_dtypes.bfloat16),
    lambda x: ml_dtypes.bfloat16(x),
    lambda x: [np.float32(good), np.float32(x)],
  ):
    check(make(good))
    with pytest.raises(ValueError, match="x must"):
      check(make(bad))


def test_nan_infinities_and_other_kinds_of_number():
  for check in (checks.positive, checks.not_negative, checks.finite):
    for bad in (np.nan, np.inf, [1.0, -np.inf]):
      with pytest.raises(ValueError, match="tau must be"):
        check("tau", bad)
  for check in (checks.probabilities, checks.fractions):
    with pytest.raises(ValueError, match="tau must lie"):
      check("tau", np.nan)
  checks.positive("tau", fractions.Fraction(1, 3))
  checks.positive("tau", 10**30)  # larger than any NumPy integer
  with pytest.raises(ValueError, match="tau must be positive and finite, got -1"):
    checks.positive("tau", fractions.Fraction(-1, 3) * 3)
  checks.positive("tau", [])


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ("0.1", "tau must be a number, got the string '0.1'"),
    (["a", "b"], r"tau must hold real numbers, got \['a', 'b'\]"),
    (1j, "tau must hold real numbers"),
    (np.array([1j]), "tau must hold real numbers"),
    ([[1.0, 2.0], [3.0]], r"tau must hold numbers in rows of equal length, got \[\[1.0, 2.0\]"),
  ],
)
def test_what_is_no_number_is_refused(bad, message):
  for check in (checks.positive, checks.not_negative, checks.probabilities, checks.finite):
    with pytest.raises(ValueError, match=message):
      check("tau", bad)


# --- what passes unseen ---


@each_value_check
def test_device_arrays_are_seen_on_request_only(check, good, bad):
  for make in (jnp.asarray, lambda x: [good, jnp.asarray(x)]):
    check(make(bad))
    check(make(good), fetch=True)
    with pytest.raises(ValueError, match="x must"):
      check(make(bad), fetch=True)
  check(jnp.array([bad], jnp.bfloat16))
  with pytest.raises(ValueError, match="x must"):
    check(jnp.array([bad], jnp.bfloat16), fetch=True)


@each_value_check
def test_traced_values_pass_even_on_request(check, good, bad):
  def traced(value):
    for form in (value, [good, value]):
      check(form)
      check(form, fetch=True)
    return value

  jax.jit(traced)(bad)
  jax.vmap(traced)(jnp.array([bad, bad]))
  jax.grad(traced)(bad)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tau"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Config:
  tau: Any
  size: int = 1

  def __post_init__(self):
    for check, _, _ in VALUE_CHECKS.values():
      check(self.tau)
    checks.count("size", self.size)


def test_a_config_survives_what_jax_puts_in_place_of_its_numbers():
  config = Config(0.5)
  treedef = jax.tree.structure(config)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  for leaf in (
    object(),
    None,
    jax.ShapeDtypeStruct((), jnp.float32),
    jax.sharding.PartitionSpec("data"),
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
  ):
    assert jax.tree.unflatten(treedef, [leaf]).tau is leaf
  jax.eval_shape(lambda c: c, config)
  taus = jnp.array([0.25, 0.5])
  np.testing.assert_array_equal(jax.jit(jax.vmap(lambda c: c.tau))(Config(taus)), taus)
  assert jax.tree.map(lambda _: None, config).tau is None
  with pytest.raises(ValueError, match="x must"):
    Config(-1.0)


# --- integers and choices ---


def test_a_bool_is_no_integer():
  for value in (1, np.int64(1), np.uint8(1)):
    checks.count("n", value)
  for value in (True, np.True_, 1.0, "1", None, jnp.array(1)):
    assert not checks.is_integer(value)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got"):
      checks.count("n", value)
  with pytest.raises(ValueError, match="n must be an integer >= 0, got -1"):
    checks.count("n", -1, least=0)


def test_choice_lists_the_choices():
  checks.choice("side", "left", ("left", "right"))
  with pytest.raises(ValueError, match="side must be one of 'left', 'right', got 'up'"):
    checks.choice("side", "up", ("left", "right"))


# --- each message names argument, value and remedy ---


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: checks.positive("tau", -2.5), "tau must be positive and finite, got -2.5"),
    (
      lambda: checks.positive("tau", [1, -2]),
      r"tau must be positive and finite, got \[ 1 -2\]",
    ),
    (lambda: checks.not_negative("c", -1), "c must be finite and not negative, got -1"),
    (lambda: checks.probabilities("p", 2), r"p must lie in \[0, 1\], got 2"),
    (lambda: checks.fractions("a", 1), "a must lie strictly between 0 and 1, got 1"),
    (lambda: checks.finite("r", np.nan), "r must be finite, got nan: leave the row out"),
    (
      lambda: checks.finite("r", [0, np.inf]),
      "r must be finite, got inf at position 1: leave the row out",
    ),
    (
      lambda: checks.finite("r", np.array([[0, 1], [np.nan, 0]])),
      r"r must be finite, got nan at position \(1, 0\): leave the row out",
    ),
    (
      lambda: checks.distribution("mu", [0.5, 0.4]),
      r"mu must sum to 1 over the last axis, got \[0.5 0.4\]",
    ),
    (lambda: checks.distribution("mu", [1.5, -0.5]), r"mu must lie in \[0, 1\]"),
    (
      lambda: checks.same_shape(a=np.ones(2), b=jnp.ones((2, 1))),
      r"shapes must be equal, got a \[2\], b \[2, 1\]",
    ),
    (
      lambda: checks.shape("a", np.ones((2, 3)), (2, 4), "[B, T]"),
      r"a must have shape \[B, T\] = \[2, 4\], got \[2, 3\]",
    ),
    (
      lambda: checks.not_empty(a=np.ones(1), b=np.ones((0, 2))),
      r"b must not be empty, got shape \[0, 2\]",
    ),
    (lambda: checks.vector("x", 1.0), r"x must be a list of numbers, got 1.0: give \[1.0\]"),
    (
      lambda: checks.matrix("x", np.ones((2, 3, 4))),
      r"x must have shape \[N, D\] .* got \[2, 3, 4\]: fold further axes",
    ),
    (
      lambda: checks.matrix("x", np.ones((2, 3)), 5),
      "x must have one row for each label, 5, got 2",
    ),
    (
      lambda: checks.row_mask(np.ones(3), 3),
      r"mask must have shape \[3\], one bool for each row, got float64 \[3\]",
    ),
    (
      lambda: checks.token_ids("tokens", [[0, 7]], 7),
      r"tokens must lie in \[0, 7\), got 0 to 7: another model's tokenizer",
    ),
    (
      lambda: checks.labels(np.array([0, 3]), 3),
      r"labels must lie in .* \[0, 3\), got 0 to 3: leave rows without a label out",
    ),
    (lambda: checks.labels(np.ones(2), 3), r"labels must be integers .* got float64 \[2\]"),
    (lambda: checks.binary("y", [[0, 2]]), "y must be 0 or 1, got 0 to 2: encode the labels"),
    (
      lambda: checks.row_numbers("rows", [0, 4], 4, 1),
      r"rows must lie in \[0, 4\), got 0 to 4",
    ),
    (
      lambda: checks.row_numbers("rows", [True, False], 4, 1),
      "rows must be row numbers, got bool: turn a mask into",
    ),
    (
      lambda: checks.disjoint("test", [[0, 1], [2, 3]], "train", [[4, 5], [3, 2]]),
      r"test must share no row with train, got 2 at \[1\], for example row 2",
    ),
  ],
)
def test_messages(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_shapes_of_traced_arrays_are_checked():
  with pytest.raises(ValueError, match=r"a \[2\], b \[3\]"):
    jax.jit(lambda a, b: checks.same_shape(a=a, b=b))(jnp.ones(2), jnp.ones(3))
  assert checks.same_shape(a=np.ones((2, 1)), b=[[0], [1]]) == (2, 1)


def test_rows_that_are_on_the_device_are_fetched_on_request_only():
  for check in (
    functools.partial(checks.labels, jnp.array([0, 5]), 3),
    functools.partial(checks.binary, "y", jnp.array([[0, 5]])),
    functools.partial(checks.row_numbers, "rows", jnp.array([0, 5]), 3, 1),
    functools.partial(checks.disjoint, "a", jnp.array([0, 1]), "b", np.array([1, 2])),
  ):
    check()
    with pytest.raises(ValueError):
      check(fetch=True)
  checks.token_ids("tokens", jnp.array([9]), 3)


# --- preferences ---


def test_preference_matrix():
  fair = np.full((2, 3, 3), 0.5)
  checks.preference_matrix(fair, logps=np.zeros(3), ref_logps=jnp.zeros((2, 3)))
  jax.jit(lambda p: checks.preference_matrix(p, fetch=True))(fair)
  unfair = jnp.array([[0.5, 0.7], [0.7, 0.5]])
  checks.preference_matrix(unfair)
  for call, message in (
    (lambda: checks.preference_matrix(unfair, fetch=True), "preferences must be antisymmetric"),
    (lambda: checks.preference_matrix(unfair.tolist()), "preferences must be antisymmetric"),
    (lambda: checks.preference_matrix(2 * fair + 1), r"preferences must lie in \[0, 1\]"),
    (lambda: checks.preference_matrix(0.5), r"preferences \[..., A, A\], got preferences \[\]"),
    (lambda: checks.preference_matrix(np.ones(3)), r"got preferences \[3\]"),
    (lambda: checks.preference_matrix(fair[:, :2]), r"got preferences \[2, 2, 3\]"),
    (
      lambda: checks.preference_matrix(fair, mu=np.ones(2)),
      r"preferences \[..., A, A\], mu \[..., A\], got preferences \[2, 3, 3\], mu \[2\]",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.parametrize(
  "check",
  [
    lambda x: checks.matrix("x", x),
    lambda x: checks.vector("x", x),
    lambda x: checks.shape("x", x, (2, 2), "[A, A]"),
    lambda x: checks.not_empty(x=x),
    lambda x: checks.same_shape(x=x, y=[1]),
    lambda x: checks.row_numbers("x", x, 4, 1),
    lambda x: checks.disjoint("x", x, "y", [1]),
    lambda x: checks.finite("x", x),
  ],
)
def test_ragged_lists_are_named(check):
  with pytest.raises(ValueError, match=r"^x must .*rows of equal length"):
    check([[1, 2], [3]])


def test_numbers_that_no_float_holds_and_keys_are_refused():
  with pytest.raises(ValueError, match="x must be finite, got inf"):
    checks.finite("x", 10**400)
  with pytest.raises(ValueError, match="x must hold real numbers, got a PRNG key"):
    checks.positive("x", jax.random.key(0), fetch=True)


# --- all arguments of a function ---


def _scaled(rewards, mask=None, *, tau):
  checks.finite("rewards", rewards)
  return jnp.asarray(rewards) / tau


@pytest.mark.parametrize(
  ("rewards", "settings", "message"),
  [
    ([1.0, np.nan], {"tau": 1.0}, "rewards must be numbers, got nan at position 1"),
    (None, {"tau": 1.0}, "rewards must be given to _scaled, got None"),
    ([1.0], {"tau": None}, "tau must be given to _scaled, got None"),
    ([[1.0], [1.0, 2.0]], {"tau": 1.0}, "rows of equal length"),
    (["a"], {"tau": 1.0}, "rewards must hold real numbers"),
    ([], {"tau": 1.0}, r"rewards must not be empty, got shape \[0\]"),
    (np.zeros((0, 2)), {"tau": 1.0}, r"rewards must not be empty, got shape \[0, 2\]"),
    (
      [1.0, 2.0],
      {"tau": [1.0, 2.0, 3.0]},
      r"tau must have shape \[\], or one that fits rewards \[2\], got \[3\]",
    ),
  ],
)
def test_arguments_of_a_function_are_converted_then_checked(rewards, settings, message):
  with pytest.raises(ValueError, match=message):
    checks.array_arguments(_scaled)(rewards, **settings)


def test_good_arguments_pass_and_lists_are_arrays_of_jax_dtypes():
  scaled = checks.array_arguments(_scaled)
  for good in ([1, 2], (1.0, 2.0), np.array([1, 2]), jnp.array([1, 2]), [jnp.float32(1), 2.0]):
    result = scaled(good, tau=[1.0, 2.0])
    np.testing.assert_array_equal(result, [1, 1])
    assert result.dtype == jnp.float32
  np.testing.assert_array_equal(jax.jit(scaled)(jnp.ones(2), tau=0.5), [2, 2])
  with pytest.raises(ValueError, match="must not be empty"):
    jax.jit(scaled)(jnp.ones(0), tau=0.5)
