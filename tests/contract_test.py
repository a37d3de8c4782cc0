"""One contract, run over every algorithm; a paper registers with one builder.

A builder returns a `Case`: the module, a small problem for it and how it may be varied. Each
clause is a plain function of a case, so that the second half of this file can show that every
clause catches an algorithm that breaks it.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

import sharding
from alignment import copg, dro, ipo, nash_md, reward_model, sequences, srpo
from alignment.baselines import dpo, kto, online_ipo, rloo, sft
from representation import bgrl, bidirectional, byol, graphs, latent_prediction, self_predictive
from representation.baselines import grace, supervised
from representation.networks import adapters, gcn, mlp, recurrent
from rl_theory import armac, policy_arrays, qr_dqn, qtd
from rl_theory.baselines import categorical_td, dqn, nfsp, ppo, td


class Init(Protocol):
  """`init(params, *, optimizer, config, **trees) -> State`; pure, so `eval_shape` works."""

  def __call__(self, params: Any, *, optimizer: Any, config: Any, **trees: Any) -> Any: ...


class Loss(Protocol):
  """`loss(...) -> (scalar, (metrics, network_state))`; only `params` gets a gradient."""

  def __call__(
    self, params: Any, state: Any, batch: Any, key: Any, *, apply_fn: Callable, config: Any
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]: ...


class Update(Protocol):
  """`update(...) -> (State, metrics)`: one pure jitted optimisation step, donating nothing."""

  def __call__(
    self, state: Any, batch: Any, key: Any, *, apply_fn: Callable, optimizer: Any, config: Any
  ) -> tuple[Any, dict[str, jax.Array]]: ...


class Algorithm(Protocol):
  """What an algorithm module offers, beside its rung-1 functions."""

  __doc__: str
  __name__: str
  Config: type
  Batch: type
  State: type
  init: Init
  loss: Loss
  update: Update


@dataclasses.dataclass(frozen=True)
class Case:
  """A small problem for one algorithm.

  Attributes:
    module: the algorithm.
    params: float32 parameters of a small network.
    batch: eight examples (so that eight devices have one each).
    apply_fn: the network.
    config: hyper-parameters at which losses and gradients are of size one (for absolute 1e-5).
    hyperparameter: name of a numeric field of the config and another value for it (several where
      the field holds several); None where the config has no such field.
    trees: keyword arguments of `init` beside the parameters, such as `ema_params`.
    couples_examples: True where the loss is not a mean over examples; `update` must then refuse
      micro-batches.
    rules: how the state is split over a mesh with axes `data` and `fsdp`.
  """

  module: Any
  params: Any
  batch: Any
  apply_fn: Callable[..., Any]
  config: Any
  hyperparameter: tuple[str, Any] | None
  trees: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  couples_examples: bool = False
  rules: sharding.Rules = sharding.REPLICATED


# --- the registry: a paper adds one builder ---


def _policy_params():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    "embedding": jax.random.normal(keys[0], (8, 4)),
    "head": {"kernel": jax.random.normal(keys[1], (4, 8)) / 2, "bias": jnp.zeros(8)},
  }


def _policy(params, rows):
  """A recurrence-free policy: logits from the mean embedding of the prompt and the last token."""
  rows = sequences.repeat_prompts(rows)
  embedded = params["embedding"][rows.tokens]
  weights = rows.prompt_mask[..., None]
  prompt = (params["embedding"][rows.prompt_tokens] * weights).sum(1, keepdims=True)
  prompt = prompt / jnp.maximum(weights.sum(1, keepdims=True), 1)
  context = prompt + jnp.concatenate([jnp.zeros_like(prompt), embedded[:, :-1]], axis=1)
  logits = jnp.tanh(context) @ params["head"]["kernel"] + params["head"]["bias"]
  return sequences.token_logps(logits, rows.tokens)


# Moments share the names of their parameters, so one rule splits both.
_POLICY_RULES: sharding.Rules = (("embedding", PartitionSpec("fsdp")), (".*", PartitionSpec()))


def _prompts(rng):
  mask = (np.arange(3) >= rng.integers(0, 3, (8, 1))).astype(np.float32)  # left-padded
  return jnp.asarray(rng.integers(0, 8, (8, 3))), jnp.asarray(mask)


def _completions(rng, shape):
  tokens = jnp.asarray(rng.integers(0, 8, shape))
  mask = sequences.completion_mask(tokens, eos_id=2)
  return tokens, mask, jnp.asarray(-2 * mask.sum(-1) + rng.normal(size=shape[:-1]), jnp.float32)


def _preferences():
  rng = np.random.default_rng(0)
  probs = jnp.asarray(rng.uniform(0.5, 1.0, 8), jnp.float32)
  return sequences.PreferenceBatch(
    *_completions(rng, (8, 5)), *_completions(rng, (8, 4)), probs, *_prompts(rng)
  )


def _ipo() -> Case:
  return Case(
    ipo, _policy_params(), _preferences(), _policy, ipo.Config(tau=0.5, reduction="mean"),
    ("tau", 2.0), rules=_POLICY_RULES,
  )  # fmt: skip


def _dpo() -> Case:
  return Case(
    dpo, _policy_params(), _preferences(), _policy, dpo.Config(beta=0.3), ("beta", 0.1),
    rules=_POLICY_RULES,
  )  # fmt: skip


def _copg() -> Case:
  rng = np.random.default_rng(1)
  batch = copg.Batch(
    *_completions(rng, (8, 3, 5)), jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    *_prompts(rng),
  )  # fmt: skip
  return Case(
    copg, _policy_params(), batch, _policy, copg.Config(beta=0.1), ("beta", 0.2),
    rules=_POLICY_RULES,
  )  # fmt: skip


def _policy_and_value(params, rows):
  prompts = params.value["embedding"][rows.prompt_tokens] * rows.prompt_mask[..., None]
  return _policy(params.policy, rows), jnp.tanh(prompts.sum(1)) @ params.value["head"]


def _dro() -> Case:
  rng = np.random.default_rng(2)
  value = {"embedding": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "head": jnp.ones(4) / 4}
  batch = dro.Batch(
    *_completions(rng, (8, 5)), jnp.asarray(rng.normal(size=8), jnp.float32), *_prompts(rng)
  )
  return Case(
    dro, dro.Params(_policy_params(), value), batch, _policy_and_value, dro.Config(tau=0.5),
    ("tau", 0.7), rules=_POLICY_RULES,
  )  # fmt: skip


def _nash_md() -> Case:
  rng = np.random.default_rng(3)
  tokens, mask, _ = _completions(rng, (8, 5))
  batch = nash_md.Batch(
    tokens, mask, jnp.asarray(rng.normal(-2, 1, (8, 5)), jnp.float32),
    jnp.asarray(rng.uniform(size=8), jnp.float32), *_prompts(rng),
  )  # fmt: skip
  return Case(
    nash_md, _policy_params(), batch, _policy, nash_md.Config(tau=0.1, ema_decay=0.9),
    ("tau", 0.3), trees={"ema_params": jax.tree.map(lambda x: x + 0.1, _policy_params())},
    rules=_POLICY_RULES,
  )  # fmt: skip


def _rloo() -> Case:
  batch = rloo.Batch(*_copg().batch)
  return Case(
    rloo, _policy_params(), batch, _policy, rloo.Config(beta=0.1), ("beta", 0.2),
    rules=_POLICY_RULES,
  )  # fmt: skip


def _srpo() -> Case:
  rng = np.random.default_rng(4)
  chosen, rejected = _completions(rng, (8, 5)), _completions(rng, (8, 4))
  batch = srpo.Batch(
    *chosen[:2], *rejected[:2], jnp.asarray(rng.normal(-6, 1, (8, 6)), jnp.float32),
    *_prompts(rng), *_prompts(rng), *_prompts(rng), jnp.asarray(rng.uniform(size=8), jnp.float32),
  )  # fmt: skip
  return Case(
    srpo, _policy_params(), batch, _policy, srpo.Config(beta=0.1), ("alpha", 0.3),
    rules=_POLICY_RULES,
  )  # fmt: skip


def _online_ipo() -> Case:
  batch = online_ipo.Batch(*_preferences())
  return Case(
    online_ipo, _policy_params(), batch, _policy, online_ipo.Config(tau=0.5), ("tau", 2.0),
    rules=_POLICY_RULES,
  )  # fmt: skip


def _kto() -> Case:
  rng = np.random.default_rng(5)
  batch = kto.Batch(
    *_completions(rng, (8, 5)), jnp.asarray(rng.integers(0, 2, 8)), *_completions(rng, (8, 5)),
    *_prompts(rng),
  )  # fmt: skip
  return Case(
    kto, _policy_params(), batch, _policy, kto.Config(beta=0.3), ("beta", 0.1),
    couples_examples=True, rules=_POLICY_RULES,
  )  # fmt: skip


def _scalar(params, rows):
  rows = sequences.repeat_prompts(rows)
  text = jnp.concatenate([rows.prompt_tokens, rows.tokens], axis=1)
  weights = jnp.concatenate([rows.prompt_mask, rows.mask], axis=1)
  places = jnp.arange(1.0, 1 + text.shape[1]) / 4  # what comes later counts more
  return (params["embedding"][text] * (weights * places)[..., None]).sum((1, 2)) * params["head"]


def _reward_model() -> Case:
  pairs = _preferences()
  batch = reward_model.Batch(
    *pairs[:2], *pairs[3:5], *_prompts(np.random.default_rng(6)), pairs.chosen_probs
  )
  params = {"embedding": _policy_params()["embedding"] / 4, "head": jnp.float32(0.5)}
  config = reward_model.Config(centring=0.1)
  return Case(reward_model, params, batch, _scalar, config, ("centring", 0.2), rules=_POLICY_RULES)


def _sft() -> Case:
  rng = np.random.default_rng(7)
  batch = sft.Batch(*_completions(rng, (8, 5))[:2], *_prompts(rng))
  config = sft.Config(reduction="mean")
  return Case(sft, _policy_params(), batch, _policy, config, None, rules=_POLICY_RULES)


def _act(params, observations):
  hidden = jnp.tanh(observations @ params["kernel"])
  return hidden @ params["regrets"], hidden @ params["policy"]


def _values(params, observations):
  flat = observations.reshape(len(observations), -1)
  return (jnp.tanh(flat @ params["kernel"]) @ params["head"]).reshape(-1, 2, 3)


def _armac(network: str) -> Case:
  """The critic's or the actor's loss and update, which share all the rest."""
  pair = {name: getattr(armac, f"{name}_{network}") for name in ("loss", "update")}
  rng = np.random.default_rng(8)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  policies, past_policies = (
    jnp.asarray(rng.dirichlet(np.ones(3), (8, 4)), jnp.float32) for _ in range(2)
  )
  batch = armac.Batch(
    normal(8, 4, 2, 5), jnp.asarray(rng.integers(0, 2, (8, 4))), jnp.ones((8, 4, 3), bool),
    jnp.asarray(rng.integers(0, 3, (8, 4))), jnp.asarray(rng.random((8, 4)) < 0.8),
    jnp.asarray(rng.integers(0, 2, 8)), jnp.zeros(8, jnp.int32), past_policies, policies,
    normal(8, 2), normal(8, 4, 3) if network == "actor" else None,
  )  # fmt: skip
  params = armac.Params(
    {"kernel": normal(5, 6), "regrets": normal(6, 3), "policy": normal(6, 3)},
    {"kernel": normal(10, 6), "head": normal(6, 6)},
  )
  past = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
  return Case(
    types.SimpleNamespace(**vars(armac) | pair), params, batch, armac.Networks(_act, _values),
    armac.Config(trace_decay=0.9, capacity=2),
    None if network == "actor" else ("trace_decay", 0.2), trees={"past": past},
  )  # fmt: skip


def _nfsp() -> Case:
  rng = np.random.default_rng(9)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  def score(params, observations):
    return jnp.tanh(observations @ params["kernel"]) @ params["head"]

  legal = jnp.asarray(rng.random((8, 2, 3)) < 0.6)
  batch = nfsp.Batch(
    normal(8, 2, 5), jnp.asarray(rng.integers(0, 3, (8, 2))), normal(8, 2), normal(8, 2, 5),
    legal, normal(8, 2, 5), legal.at[..., 0].set(True), jnp.zeros((8, 2), jnp.int32),
  )  # fmt: skip
  params = nfsp.Params(*({"kernel": normal(2, 5, 6), "head": normal(2, 6, 3)} for _ in range(2)))
  config = nfsp.Config(
    learning_starts=1, replay_capacity=16, reservoir_capacity=8, target_period=2
  )  # fmt: skip
  return Case(nfsp, params, batch, nfsp.Networks(score, score), config, None)


def _ppo() -> Case:
  rng = np.random.default_rng(21)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  def score(params, observations):
    return jnp.tanh(observations @ params["kernel"]) @ params["head"]

  params = ppo.Params(*({"kernel": normal(5, 6), "head": normal(6, size)} for size in (3, 1)))
  legal = jnp.asarray(rng.random((8, 4, 3)) < 0.6).at[..., 0].set(True)
  observations = normal(8, 4, 5)
  logits = score(params.policy, observations)
  batch = ppo.Batch(
    observations, legal, jnp.zeros((8, 4), jnp.int32), jnp.asarray(rng.random((8, 4)) < 0.8),
    policy_arrays.softmax(logits + normal(8, 4, 3), legal), normal(8, 4), normal(8, 4),
  )  # fmt: skip
  config = ppo.Config(num_episodes=8, batch_size=8)
  return Case(ppo, params, batch, ppo.Networks(score, score), config, ("temperature_start", 1.0))


def _q_learning(module: Any, num_quantiles: tuple[int, ...]) -> Case:
  rng = np.random.default_rng(20)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  def apply_fn(params, observations):
    hidden = jnp.tanh(observations @ params["kernel"])
    return jnp.tensordot(hidden, params["head"], 1)  # [B, A] or [B, A, N]

  legal = jnp.asarray(rng.random((8, 3)) < 0.6).at[:, 0].set(True)
  batch = qr_dqn.Batch(
    normal(8, 5), jnp.asarray(rng.integers(0, 3, 8)), normal(8), normal(8, 5),
    jnp.asarray(rng.choice([0.0, 0.9], 8), jnp.float32), legal,
  )  # fmt: skip
  params = {"kernel": normal(5, 6), "head": normal(6, 3, *num_quantiles) / 2}
  return Case(
    module, params, batch, apply_fn, module.Config(kappa=0.5, target_period=2), ("kappa", 0.2)
  )  # fmt: skip


def _graph():
  rng = np.random.default_rng(10)
  edges = rng.permutation([(s, r) for s in range(8) for r in range(8) if s != r])[:24]
  return graphs.make_graph(rng.normal(size=(8, 5)), *edges.T, multiple=8)


def _bgrl() -> Case:
  graph = _graph()
  encoder, predictor = adapters.Encoder(gcn.GCN((4,))), adapters.Predictor(mlp.MLP(6, 4))
  keys = jax.random.split(jax.random.key(0), 3)
  (params, online), (target_params, target) = (encoder.init(key, graph) for key in keys[:2])
  params = bgrl.Params(params, predictor.init(keys[2], jnp.zeros((1, 4))))
  trees = {"target_params": target_params, "network_state": bgrl.NetworkState(online, target)}
  return Case(
    bgrl, params, graph, bgrl.Networks(encoder, predictor), bgrl.Config(),
    ("edge_drop_probs", (0.1, 0.8)), trees=trees, couples_examples=True,
  )  # fmt: skip


def _grace(*, num_negatives: int = 0) -> Case:
  graph = _graph()
  encoder = adapters.Encoder(gcn.GCN((4,)))
  projector = adapters.Predictor(mlp.MLP(6, 4, jax.nn.elu))
  params, network_state = encoder.init(jax.random.key(0), graph)
  params = grace.Params(params, projector.init(jax.random.key(1), jnp.zeros((1, 4))))
  return Case(
    grace, params, graph, grace.Networks(encoder, projector),
    grace.Config(num_negatives=num_negatives), ("temperature", 0.8),
    trees={"network_state": network_state}, couples_examples=True,
  )  # fmt: skip


def _transitions():
  rng = np.random.default_rng(11)
  rewards = jnp.asarray(rng.normal(size=8), jnp.float32)
  return qtd.Batch(jnp.arange(8), rewards, jnp.asarray(rng.integers(0, 8, 8)))


def _table(*shape):
  return jnp.asarray(np.random.default_rng(12).normal(size=(8, *shape)), jnp.float32)


def _qtd(config: qtd.Config = qtd.Config()) -> Case:
  return Case(
    qtd, _table(5), _transitions(), qtd.lookup, config, ("discount", 0.3), couples_examples=True
  )  # fmt: skip


def _td(traces: bool) -> Case:
  config = td.Config(trace_decay=0.5)
  trees = {"traces": jnp.ones((8, 8)) if traces else None}
  return Case(
    td, _table(), _transitions(), td.lookup, config, ("discount", 0.3), trees=trees,
    couples_examples=True,
  )  # fmt: skip


def _noisy_views(inputs, key):
  return [inputs + jax.random.normal(k, inputs.shape) / 4 for k in jax.random.split(key)]


def _byol(**options) -> Case:
  rng = np.random.default_rng(11)
  inputs = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
  networks = byol.Networks(
    *(adapters.Encoder(mlp.BatchNormMLP(6, 5)) for _ in range(3)),
    adapters.Predictor(nn.Dense(3)), _noisy_views,
  )  # fmt: skip

  def parts(seed):
    keys, rows = jax.random.split(jax.random.key(seed), 4), jnp.zeros((1, 5))
    made = networks.encoder.init(keys[0], inputs), networks.projector.init(keys[1], rows)
    made = *made, networks.predictor.init(keys[2], rows)
    params, states = zip(*made, strict=True)
    return byol.Parts(*params, networks.classifier.init(keys[3], rows)), byol.Parts(*states)

  (params, online), (target_params, target) = parts(0), parts(1)
  trees = {"network_state": byol.NetworkState(online, target._replace(predictor=()))}
  config = byol.Config(**options)
  if config.target == "moving":
    trees["target_params"] = target_params._replace(predictor=(), classifier=())
  return Case(
    byol, params, byol.Batch(inputs, jnp.asarray(rng.integers(0, 3, 8))), networks, config,
    ("negative_weight", 0.9) if "negative_weight" in options else None, trees=trees,
    couples_examples=True,
  )  # fmt: skip


def _supervised(*, frozen: bool) -> Case:
  rng = np.random.default_rng(11)
  inputs = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
  batch = supervised.Batch(inputs, jnp.asarray(rng.integers(0, 3, 8)))
  networks = supervised.Networks(
    adapters.Encoder(mlp.BatchNormMLP(6, 5)), adapters.Predictor(nn.Dense(3))
  )
  encoder, network_state = networks.encoder.init(jax.random.key(0), inputs)
  classifier = networks.classifier.init(jax.random.key(1), jnp.zeros((1, 5)))
  return Case(
    supervised, supervised.Params(encoder, classifier), batch, networks,
    supervised.Config(frozen=frozen), None, trees={"network_state": network_state},
    couples_examples=not frozen,
  )  # fmt: skip


def _tables(num_tables):
  keys = jax.random.split(jax.random.key(0), num_tables)
  return [jax.random.normal(key, (8, 3)) for key in keys]


def _sampled_transitions():
  return self_predictive.Transitions(*jnp.asarray(np.random.default_rng(11).integers(0, 8, (2, 8))))


def _read_table(table, states):
  return table[states]


def _self_predictive(*, exact: bool, **options) -> Case:
  (table,) = _tables(1)
  chain = jax.random.dirichlet(jax.random.key(1), jnp.ones(8), (8,))
  batch = self_predictive.make_expectation(chain) if exact else _sampled_transitions()
  return Case(
    self_predictive, self_predictive.Params(table, jnp.eye(3) / 2), batch, _read_table,
    self_predictive.Config(**options), ("ridge", 0.5) if exact else None,
    trees={"target_params": table + 0.1}, couples_examples=True,
  )  # fmt: skip


def _bidirectional() -> Case:
  forward, backward = _tables(2)
  params = bidirectional.Params(forward, backward, jnp.eye(3) / 2, jnp.eye(3))
  networks = bidirectional.Networks(_read_table, _read_table)
  config = bidirectional.Config(predictor="gradient", target_decay=0.9)
  return Case(
    bidirectional, params, _sampled_transitions(), networks, config, None,
    trees={"target_params": bidirectional.Targets(forward + 0.1, backward - 0.1)},
    couples_examples=True,
  )  # fmt: skip


def _categorical_td() -> Case:
  config = categorical_td.Config(low=-3.0, high=3.0)
  return Case(
    categorical_td, jax.nn.softmax(_table(5)), _transitions(), categorical_td.lookup, config,
    ("discount", 0.3), couples_examples=True,
  )  # fmt: skip


def _latent_prediction() -> Case:
  rng = np.random.default_rng(11)
  lengths = jnp.array([6, 5, 4, 3, 6, 5, 4, 6])
  batch = latent_prediction.Batch(
    jnp.asarray(rng.normal(size=(8, 6, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, (8, 6))),
    jnp.arange(6) < lengths[:, None],
  )  # fmt: skip
  apply_fn = recurrent.networks(4, 3)
  params, target = (
    recurrent.init(key, apply_fn, batch.observations[:, 0])
    for key in jax.random.split(jax.random.key(0))
  )
  return Case(
    latent_prediction, params, batch, apply_fn, latent_prediction.Config(horizon=2),
    ("backward_weight", 0.3), trees={"target_params": target.agent}, couples_examples=True,
  )  # fmt: skip


BUILDERS: dict[str, Callable[[], Case]] = {
  "armac_actor": functools.partial(_armac, "actor"),
  "armac_critic": functools.partial(_armac, "critic"),
  "bgrl": _bgrl,
  "bidirectional": _bidirectional,
  "byol": _byol,
  "byol_negatives": functools.partial(_byol, negative_weight=0.4, temperature=0.5),
  "categorical_td": _categorical_td,
  "copg": _copg,
  "dpo": _dpo,
  "dqn": functools.partial(_q_learning, dqn, ()),
  "dro": _dro,
  "grace": _grace,
  "grace_negatives": functools.partial(_grace, num_negatives=3),
  "ipo": _ipo,
  "kto": _kto,
  "latent_prediction": _latent_prediction,
  "nash_md": _nash_md,
  "nfsp": _nfsp,
  "online_ipo": _online_ipo,
  "ppo": _ppo,
  "qr_dqn": functools.partial(_q_learning, qr_dqn, (4,)),
  "qtd": _qtd,
  "qtd_visits": functools.partial(
    _qtd, qtd.Config(step_sizes=qtd.StepSizes(0.5, 0.6), random_index=True, method="pairs")
  ),
  "reward_model": _reward_model,
  "rloo": _rloo,
  "self_predictive_exact": functools.partial(_self_predictive, exact=True),
  "self_predictive_sampled": functools.partial(
    _self_predictive, exact=False, predictor="gradient", predictor_ratio=3.0
  ),
  "sft": _sft,
  "srpo": _srpo,
  "supervised": functools.partial(_supervised, frozen=False),
  "supervised_frozen": functools.partial(_supervised, frozen=True),
  "td": functools.partial(_td, False),
  "td_traces": functools.partial(_td, True),
}


# --- helpers of the clauses ---

# Comparisons of two programs use SGD: Adam divides by the size of a gradient and so turns the
# rounding of a gradient near zero into a whole step. Bit-equality clauses use Adam's state.
SGD = optax.sgd(0.1)
ADAM = optax.adam(optax.exponential_decay(1e-2, 10, 0.5))


def _start(case, optimizer):
  return case.module.init(case.params, optimizer=optimizer, config=case.config, **case.trees)


def _step(case, optimizer, **changes):
  config = dataclasses.replace(case.config, **changes)
  return functools.partial(
    case.module.update, apply_fn=case.apply_fn, optimizer=optimizer, config=config
  )


def _key(step):
  return jax.random.fold_in(jax.random.key(7), step)


def _assert_close(actual, expected, what):
  """Equal trees to 1e-5, the project's promise for float32; quantities here are of size one."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected), what
  for path, pair in jax.tree_util.tree_leaves_with_path(
    jax.tree.map(lambda a, b: _Pair(a, b), actual, expected)
  ):
    name = what + jax.tree_util.keystr(path)
    np.testing.assert_allclose(pair.first, pair.second, rtol=1e-5, atol=1e-5, err_msg=name)


def _assert_identical(actual, expected, what):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=what)


@dataclasses.dataclass
class _Pair:  # not a pytree: one leaf
  first: Any
  second: Any


def _gradient(case, state, batch, key):
  """Returns the gradient of the loss at `state.params`."""

  def value(params):
    return case.module.loss(
      params, state, batch, key, apply_fn=case.apply_fn, config=case.config
    )[0]  # fmt: skip

  return jax.grad(value)(state.params)


def _types(tree):
  return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


@contextlib.contextmanager
def _compilations():
  """Collects the names of all programs compiled inside."""
  names: list[str] = []
  handler = logging.Handler()
  handler.emit = lambda record: (  # type: ignore[method-assign]
    names.append(record.getMessage()) if record.getMessage().startswith("Compiling") else None
  )
  logger = logging.getLogger("jax")
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      yield names
  finally:
    logger.removeHandler(handler)


# --- the clauses ---


def has_names_and_documentation(case, tmp_path):
  module = case.module
  assert module.__doc__ and "https://arxiv.org/abs/" in module.__doc__, "docstring cites no paper"
  assert "Deviations:" in module.__doc__ and "| paper | here |" in module.__doc__
  config = module.Config
  assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
  config()  # the paper's defaults
  with pytest.raises(TypeError):
    config(misspelt_key=1)
  leaves, treedef = jax.tree.flatten(case.config)
  numbers = [v for v in jax.tree.leaves(list(vars(case.config).values())) if isinstance(v, float)]
  assert sorted(leaves) == sorted(numbers), "floats are leaves of the config, choices are not"
  jax.tree.unflatten(treedef, [object()] * len(leaves))  # JAX does so; validation must not mind
  for cls in (module.Batch, module.State):
    assert issubclass(cls, tuple) and cls._fields and cls.__doc__
  assert {"params", "opt_state", "step"} <= set(module.State._fields)
  assert set(case.trees) <= set(module.State._fields)

  def signature(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    return positional, {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}

  positional, keywords = signature(module.init)
  assert positional == ["params"] and keywords == {"optimizer", "config", *case.trees}
  assert signature(module.loss) == (["params", "state", "batch", "key"], {"apply_fn", "config"})
  assert signature(module.update) == (
    ["state", "batch", "key"], {"apply_fn", "optimizer", "config"}
  )  # fmt: skip
  rung_1 = [
    function
    for name, function in vars(module).items()
    if name.endswith(("_loss", "_error", "_target", "_advantages")) and name[0] != "_"
  ]
  assert rung_1, "no function of arrays alone"
  for function in (module.init, module.loss, module.update, *rung_1):
    assert function.__doc__ and "Args:" in function.__doc__, function
  hyperparameters = set(vars(case.config))
  for function in rung_1:
    assert not hyperparameters & set(signature(function)[0]), "hyper-parameters are keyword-only"


def jit_equals_eager(case, tmp_path):
  state, step = _start(case, SGD), _step(case, SGD)
  jitted = step(state, case.batch, _key(0))
  with jax.disable_jit():
    eager = step(state, case.batch, _key(0))
  _assert_close(jitted, eager, "jitted against eager: ")


def inputs_survive(case, tmp_path):
  state, key = _start(case, ADAM), _key(0)
  inputs = (state, case.batch, case.params, case.trees)
  before = jax.tree.map(np.array, inputs)
  _step(case, ADAM)(state, case.batch, key)
  for leaf in jax.tree.leaves((inputs, key)):
    assert not leaf.is_deleted(), "update donated its input"
  _assert_identical(inputs, before, "update changed its input")


def state_keeps_its_types(case, tmp_path):
  state, step = _start(case, ADAM), _step(case, ADAM)
  after, _ = step(state, case.batch, _key(0))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert _types(after) == _types(state)
  assert after.step == state.step + 1 and after.step.dtype == jnp.int32


def scan_equals_a_loop(case, tmp_path):
  start, step = _start(case, SGD), _step(case, SGD)
  looped = start
  for index in range(3):
    looped, _ = step(looped, case.batch, _key(index))

  def body(state, _):
    return step(state, case.batch, _key(state.step))

  scanned, metrics = jax.lax.scan(body, start, None, length=3)
  _assert_close(scanned, looped, "scan against loop: ")
  assert all(values.shape == (3,) for values in metrics.values())
  moved = max(
    np.abs(a - b).max()
    for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(looped.params), strict=True)
  )
  assert moved > 1e-4, "the update does nothing, so nothing was tested"


def second_call_does_not_recompile(case, tmp_path):
  state, step, keys = _start(case, ADAM), _step(case, ADAM), [_key(0), _key(1), _key(2)]
  state, _ = step(state, case.batch, keys[0])
  with _compilations() as names:
    for key in keys[1:]:
      state, _ = step(state, case.batch, key)
  assert not names, names


def new_hyperparameter_does_not_recompile(case, tmp_path):
  name, value = case.hyperparameter or pytest.skip("the config has no number")
  state, key = _start(case, ADAM), _key(0)
  _, before = _step(case, ADAM)(state, case.batch, key)
  with _compilations() as names:
    _, after = _step(case, ADAM, **{name: value})(state, case.batch, key)
  assert not names, names
  assert before["loss"] != after["loss"], f"{name} is ignored"


def vmap_over_seeds(case, tmp_path):
  step = _step(case, SGD)

  def perturbed(key):
    leaves, treedef = jax.tree.flatten(case.params)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)

  def run(key):
    state = case.module.init(
      perturbed(key), optimizer=SGD, config=case.config, **case.trees
    )  # fmt: skip
    return step(state, case.batch, key)

  keys = jax.random.split(jax.random.key(3), 3)
  batched = jax.vmap(run)(keys)
  assert np.ptp(batched[1]["loss"]) > 0
  for index, key in enumerate(keys):
    one = jax.tree.map(lambda leaf, i=index: leaf[i], batched)
    _assert_close(one, run(key), f"seed {index}: ")


def vmap_over_hyperparameter(case, tmp_path):
  name, value = case.hyperparameter or pytest.skip("the config has no number")
  values = jnp.array([getattr(case.config, name), value])
  state = _start(case, SGD)

  def run(value):
    return _step(case, SGD, **{name: value})(state, case.batch, _key(0))

  batched = jax.vmap(run)(values)
  for index, value in enumerate(values):
    one = jax.tree.map(lambda leaf, i=index: leaf[i], batched)
    _assert_close(one, run(value), f"{name} = {value}: ")


def eight_devices_equal_one(case, tmp_path):
  assert jax.device_count() == 8, "conftest.py simulates eight devices"
  state, step, key = _start(case, SGD), _step(case, SGD), _key(0)
  one = step(state, case.batch, key)

  def with_gradient(state, batch, key):  # one program for both: most of the time is compilation
    new, metrics = step(state, batch, key)
    return new, (metrics, _gradient(case, state, batch, key))

  one = one[0], (one[1], jax.jit(functools.partial(_gradient, case))(state, case.batch, key))
  for axes in ({"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 4}):
    mesh = sharding.make_mesh(axes)
    batch = sharding.shard_batch(case.batch, mesh)
    split = [leaf for leaf in jax.tree.leaves(batch) if not leaf.sharding.is_fully_replicated]
    assert split, "the batch is not split"
    many = sharding.jit_update(with_gradient, mesh, case.rules)(state, case.batch, key)
    for leaf in jax.tree.leaves(many):
      assert len(leaf.sharding.device_set) == 8
    _assert_close(many, one, f"update, metrics and gradient on {axes}: ")


def donation_goes_through_jit_update(case, tmp_path):
  mesh = sharding.make_mesh({"data": 8, "fsdp": 1})
  leaves = [leaf for leaf in jax.tree.leaves(_start(case, ADAM))]
  pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
  assert len(set(pointers)) == len(pointers), "two fields of the state share memory"
  step = sharding.jit_update(_step(case, ADAM), mesh, case.rules)
  first = sharding.place(_start(case, ADAM), mesh, case.rules)
  second, _ = step(first, case.batch, _key(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params)), "nothing was donated"
  third, _ = step(second, case.batch, _key(1))
  assert third.step == 2
  for leaf in jax.tree.leaves((case.params, case.batch, case.trees)):
    assert not leaf.is_deleted(), "the caller's arrays went with the state"


def init_works_under_eval_shape(case, tmp_path):
  def init(params, trees):
    return case.module.init(params, optimizer=ADAM, config=case.config, **trees)

  shapes = jax.eval_shape(init, case.params, case.trees)
  real = _start(case, ADAM)
  assert jax.tree.structure(shapes) == jax.tree.structure(real)
  assert _types(shapes) == _types(real)


def restored_run_continues_bit_for_bit(case, tmp_path):
  step = _step(case, ADAM)

  def run(state, num_steps):
    for _ in range(num_steps):
      state, metrics = step(state, case.batch, _key(state.step))
    return state, metrics

  halfway, _ = run(_start(case, ADAM), 2)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", halfway)
    checkpointer.wait_until_finished()
    abstract = jax.eval_shape(lambda: _start(case, ADAM))
    restored = checkpointer.restore(tmp_path / "state", abstract)
  assert _types(restored) == _types(halfway)
  _assert_identical(run(restored, 2), run(_start(case, ADAM), 4), "after the restart")


def nothing_but_params_gets_a_gradient(case, tmp_path):
  """References, targets and whatever else the state holds are constants of the loss.

  And nothing but that gradient moves the parameters: the step is the optimiser's.
  """
  state = _start(case, ADAM)
  leaves, treedef = jax.tree.flatten(state)
  floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def value(params, parts):
    merged = list(leaves)
    for index, part in zip(floating, parts, strict=True):
      merged[index] = part
    return case.module.loss(
      params, jax.tree.unflatten(treedef, merged), case.batch, _key(0),
      apply_fn=case.apply_fn, config=case.config,
    )[0]  # fmt: skip

  # Away from a point where the policy is its own reference and gradients may vanish anyway.
  params = jax.tree.map(lambda leaf: 1.1 * leaf + 0.01, case.params)
  gradients, others = jax.jit(jax.grad(value, (0, 1)))(params, [leaves[i] for i in floating])
  assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradients))
  for gradient in others:
    np.testing.assert_array_equal(gradient, 0)
  state = _start(case, SGD)._replace(params=params)
  after, _ = _step(case, SGD)(state, case.batch, _key(0))
  expected = jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients)
  _assert_close(after.params, expected, "a step of SGD: ")


def micro_batches_equal_one_batch(case, tmp_path):
  state = _start(case, SGD)
  if case.couples_examples:
    with pytest.raises(ValueError, match="num_microbatches"):
      _step(case, SGD, num_microbatches=2)(state, case.batch, _key(0))
    return
  whole = _step(case, SGD)(state, case.batch, _key(0))
  for count in (2, 8):
    parts = _step(case, SGD, num_microbatches=count)(state, case.batch, _key(0))
    _assert_close(parts, whole, f"{count} micro-batches: ")
  with pytest.raises(ValueError, match="num_microbatches"):
    _step(case, SGD, num_microbatches=3)(state, case.batch, _key(0))


def masked_tokens_teach_nothing(case, tmp_path):
  """Whatever stands under a mask leaves no trace; completions without a token move no policy."""
  batch = case.batch._asdict()
  masks = [name for name in batch if f"{name.removesuffix('mask')}tokens" in batch]
  if not masks:
    pytest.skip("the batch has no completions")

  @jax.jit
  def gradient(batch):
    def value(params):
      return case.module.loss(
        params, _start(case, SGD), batch, _key(0), apply_fn=case.apply_fn, config=case.config
      )[0]

    return jax.value_and_grad(value)(case.params)

  def with_tokens(change):
    changed = {}
    for mask in masks:
      name = mask.removesuffix("mask") + "tokens"
      changed[name] = jnp.where(batch[mask] > 0, batch[name], change(batch[name]))
      assert not np.array_equal(changed[name], batch[name]), f"{name} has no padding to change"
    return case.batch._replace(**changed)

  before = gradient(case.batch)
  _assert_identical(gradient(with_tokens(lambda tokens: (tokens + 3) % 8)), before, "padding")
  completions = [name for name in masks if not name.startswith(("prompt", "given"))]
  empty = case.batch._replace(**{name: jnp.zeros_like(batch[name]) for name in completions})
  value, grads = gradient(empty)
  assert np.isfinite(value)
  if case.apply_fn is not _scalar:  # a reward reads the prompt too
    for leaf in jax.tree.leaves(getattr(grads, "policy", grads)):
      np.testing.assert_array_equal(leaf, 0, err_msg="completions without tokens")


def metrics_are_flat_scalars_with_constant_keys(case, tmp_path):
  state, step, keys = _start(case, ADAM), _step(case, ADAM), []
  prefix = case.module.__name__.rsplit(".", 1)[-1] + "/"
  for index in range(3):
    state, metrics = step(state, case.batch, _key(index))
    assert isinstance(metrics, dict) and {"loss", "grad_norm"} <= set(metrics)
    for name, metric in metrics.items():
      assert metric.shape == () and np.isfinite(metric), name
      # What all papers on representations are watched by has one name.
      assert name in ("loss", "grad_norm") or name.startswith((prefix, "collapse/")), name
    keys.append(sorted(metrics))
  assert keys[0] == keys[1] == keys[2]


CLAUSES = (
  has_names_and_documentation,
  jit_equals_eager,
  inputs_survive,
  state_keeps_its_types,
  scan_equals_a_loop,
  second_call_does_not_recompile,
  new_hyperparameter_does_not_recompile,
  vmap_over_seeds,
  vmap_over_hyperparameter,
  eight_devices_equal_one,
  donation_goes_through_jit_update,
  init_works_under_eval_shape,
  restored_run_continues_bit_for_bit,
  nothing_but_params_gets_a_gradient,
  micro_batches_equal_one_batch,
  masked_tokens_teach_nothing,
  metrics_are_flat_scalars_with_constant_keys,
)


# These always run, one algorithm of each shape. The others are marked slow: continuous integration
# runs them.
_ALWAYS = {
  "a policy and pairs": "ipo",
  "several completions of a prompt": "copg",
  "a policy and a value function": "dro",
  "a moving target": "nash_md",
  "a loss that couples examples": "kto",
  "two networks with a state of their own, and a target": "byol",
  "two networks that are trained in turn, and their past": "armac_critic",
  "a table over the states of a process": "qtd",
}
_case = functools.cache(lambda name: BUILDERS[name]())


def _parameters():
  for name in BUILDERS:
    # One process runs all clauses of an algorithm (`--dist loadgroup`) and compiles it once.
    marks = [pytest.mark.xdist_group(name)]
    if name not in _ALWAYS.values():
      marks.append(pytest.mark.slow)
    yield pytest.param(name, marks=marks)


def test_an_algorithm_of_each_shape_always_runs():
  assert set(_ALWAYS.values()) <= set(BUILDERS)


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("name", _parameters())
def test_contract(name, clause, tmp_path):
  clause(_case(name), tmp_path)


# --- the contract can fail: broken copies of IPO, each caught by the clause that is about it ---


def _module(**changes):
  return types.SimpleNamespace(**(vars(ipo) | changes))


def _with_loss(change):
  """IPO with the loss and metrics that `change(value, metrics, params, state, batch)` returns."""

  def loss(params, state, batch, key, *, apply_fn, config):
    """Broken. Args: those of `ipo.loss`."""
    value, (metrics, rest) = ipo.loss(params, state, batch, key, apply_fn=apply_fn, config=config)
    value, metrics = change(value, metrics, params, state, batch)
    return value, (metrics, rest)

  def update(state, batch, key, *, apply_fn, optimizer, config):
    grad_fn = sharding.accumulate_grads(loss, config.num_microbatches)
    (_, (metrics, _)), grads = grad_fn(
      state.params, state, batch, key, apply_fn=apply_fn, config=config
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return ipo.State(params, opt_state, state.step + 1), metrics | {
      "grad_norm": optax.global_norm(grads)
    }

  jitted = jax.jit(update, static_argnames=("apply_fn", "optimizer"))
  return _module(loss=loss, update=jitted)


def _donating():
  update = jax.jit(
    ipo.update.__wrapped__, static_argnames=("apply_fn", "optimizer"), donate_argnames="state"
  )
  return _module(update=update)


def _changed_state(change):
  def update(*args, **kwargs):
    state, metrics = ipo.update(*args, **kwargs)
    return change(state), metrics

  return _module(update=update)


def _static_config():
  update = jax.jit(
    ipo.update.__wrapped__, static_argnames=("apply_fn", "optimizer", "config")
  )  # fmt: skip
  return _module(update=update)


def _rejitting():
  def update(*args, **kwargs):
    fresh = lambda *args, **kwargs: ipo.update.__wrapped__(*args, **kwargs)  # noqa: E731
    return jax.jit(fresh, static_argnames=("apply_fn", "optimizer"))(*args, **kwargs)

  return _module(update=update)


def _host_code():
  def update(state, batch, key, **kwargs):
    float(jax.tree.leaves(state.params)[0].sum())  # looks at a value that may be traced
    return ipo.update(state, batch, key, **kwargs)

  return _module(update=update)


def _host_init():
  def init(params, *, optimizer, config):
    float(jax.tree.leaves(params)[0].sum())
    return ipo.init(params, optimizer=optimizer, config=config)

  return _module(init=init)


def _hidden_state():
  calls = []

  def update(state, batch, key, **kwargs):
    calls.append(1)
    state, metrics = ipo.update(state, batch, key, **kwargs)
    drift = jax.tree.map(lambda leaf: leaf + 1e-3 * len(calls), state.params)
    return state._replace(params=drift), metrics

  return _module(update=update)


def _tracing_dependent():
  def update(state, batch, key, **kwargs):
    new, metrics = ipo.update(state, batch, key, **kwargs)
    scale = 1.0 if isinstance(new.step, jax.core.Tracer) or not jax.config.jax_disable_jit else 0.5
    return new._replace(params=jax.tree.map(lambda leaf: scale * leaf, new.params)), metrics

  return _module(update=update)


def _ignoring_tau():
  def update(state, batch, key, *, config, **kwargs):
    return ipo.update(state, batch, key, config=ipo.Config(tau=0.5), **kwargs)

  return _module(update=update)


def _aliased_init():
  def init(params, *, optimizer, config):
    state = ipo.init(params, optimizer=optimizer, config=config)
    return state._replace(opt_state=(state.opt_state, params))

  return _module(init=init)


BROKEN: dict[str, tuple[Callable, Callable[[], Any]]] = {
  "no docstring": (has_names_and_documentation, lambda: _module(__doc__="Broken.")),
  "no rung 1": (
    has_names_and_documentation,
    lambda: types.SimpleNamespace(
      **{k: v for k, v in vars(ipo).items() if not k.endswith(("_loss", "_target"))}
    ),
  ),
  "eager differs": (jit_equals_eager, _tracing_dependent),
  "donates": (inputs_survive, _donating),
  "weak type": (state_keeps_its_types, lambda: _changed_state(
    lambda state: state._replace(step=jnp.asarray(1)))),
  "float step": (state_keeps_its_types, lambda: _changed_state(
    lambda state: state._replace(step=state.step + 0.0))),
  "other tree": (scan_equals_a_loop, lambda: _changed_state(
    lambda state: state._replace(params=list(state.params.values())))),
  "learns nothing": (scan_equals_a_loop, lambda: _with_loss(
    lambda value, metrics, *_: (jax.lax.stop_gradient(value), metrics))),
  "jits anew": (second_call_does_not_recompile, _rejitting),
  "static config": (new_hyperparameter_does_not_recompile, _static_config),
  "ignored option": (new_hyperparameter_does_not_recompile, _ignoring_tau),
  "host code": (vmap_over_seeds, _host_code),
  "static config under vmap": (vmap_over_hyperparameter, _static_config),
  "aliased state": (donation_goes_through_jit_update, _aliased_init),
  "host init": (init_works_under_eval_shape, _host_init),
  "hidden state": (restored_run_continues_bit_for_bit, _hidden_state),
  "gradient into the state": (nothing_but_params_gets_a_gradient, lambda: _with_loss(
    lambda value, metrics, params, state, batch: (
      value + optax.global_norm(state.params), metrics))),
  "decay beside the optimiser": (nothing_but_params_gets_a_gradient, lambda: _changed_state(
    lambda state: state._replace(params=jax.tree.map(lambda leaf: 0.999 * leaf, state.params)))),
  "sum over examples": (micro_batches_equal_one_batch, lambda: _with_loss(
    lambda value, metrics, params, state, batch: (
      value * batch.chosen_tokens.shape[0], metrics))),
  "mask ignored by a penalty": (masked_tokens_teach_nothing, lambda: _with_loss(
    lambda value, metrics, params, state, batch: (
      value + jnp.mean(_policy(params, sequences.Sequences(
        batch.chosen_tokens, None, batch.prompt_tokens, batch.prompt_mask))), metrics))),
  "metric per example": (metrics_are_flat_scalars_with_constant_keys, lambda: _with_loss(
    lambda value, metrics, *_: (value, metrics | {"ipo/margins": jnp.zeros(8)}))),
  "foreign metric": (metrics_are_flat_scalars_with_constant_keys, lambda: _with_loss(
    lambda value, metrics, *_: (value, metrics | {"accuracy": value}))),
}  # fmt: skip


@pytest.mark.parametrize(
  "clause", [micro_batches_equal_one_batch, metrics_are_flat_scalars_with_constant_keys]
)
def test_contract_accepts_the_copy_that_is_not_broken(clause, tmp_path):
  """So what is caught below is the break, not the copying."""
  unbroken = _with_loss(lambda value, metrics, *_: (value, metrics))
  clause(dataclasses.replace(_ipo(), module=unbroken), tmp_path)


@pytest.mark.slow  # a compilation each; continuous integration runs them
@pytest.mark.parametrize("name", BROKEN)
def test_contract_catches(name, tmp_path):
  clause, build = BROKEN[name]
  case = dataclasses.replace(_ipo(), module=build())
  # A clause fails by its own assertion, or because JAX cannot run the broken update at all.
  with pytest.raises((AssertionError, TypeError, ValueError, jax.errors.JAXTypeError)):
    clause(case, tmp_path)


def test_contract_catches_devices_that_compute_something_else(tmp_path, monkeypatch):
  """Breaks the sharded step itself: one device's examples are counted twice."""
  real = sharding.jit_update

  def broken(update, mesh, rules):
    step = real(update, mesh, rules)
    return lambda state, batch, key: step(
      state, jax.tree.map(lambda leaf: leaf.at[0].set(leaf[1]), batch), key
    )

  monkeypatch.setattr(sharding, "jit_update", broken)
  with pytest.raises(AssertionError):
    eight_devices_equal_one(_ipo(), tmp_path)


def test_contract_catches_a_coupled_loss_that_accepts_micro_batches(tmp_path):
  with pytest.raises(pytest.fail.Exception):
    micro_batches_equal_one_batch(dataclasses.replace(_ipo(), couples_examples=True), tmp_path)
