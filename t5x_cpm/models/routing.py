"""Routers: which experts each token goes to, with which weight.

A router is one function of ROUTERS: (config, params, u_GTD, ctx) -> Routing. It works on groups of T tokens [G, T], by token:
K experts each, of which some may be NOBODY. Scores, softmax and weights are in at least float32 (Fedus et al. 2022, selective
precision). Names and formulas: Switch (Fedus et al. 2022), GShard (Lepikhin et al. 2021), expert choice (Zhou et al. 2022),
hash layers (Roller et al. 2021), BASE (Lewis et al. 2021), random projection (CPM-2, Zhang et al. 2021), prototypes (M6-T, Yang
et al. 2021), DEMix (Gururangan et al. 2022), loss-free balancing (Wang et al. 2024).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig
from t5x_cpm.models.assignment import balanced
from t5x_cpm.models.layers import at_least_float32, normal


class Frozen(nnx.Variable):
  """A parameter that is drawn once and never trained."""


class State(nnx.Variable):
  """A parameter that a rule of its own changes after each step, outside the gradient."""


@dataclasses.dataclass(frozen=True)
class RouteContext:
  """What a router sees beside its input.

  Attributes:
    valid_GT: False at padding, which is never routed.
    ids_GT: token ids.
    row: config.row_features of each token's row, [G, T] by name; those that the batch has.
    key: for random draws; None outside training.
  """

  valid_GT: jax.Array
  ids_GT: jax.Array
  row: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  key: jax.Array | None = None

  @property
  def train(self) -> bool:
    """Balanced routers balance, and tokens may overflow, in training only."""
    return self.key is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Where tokens go.

  Attributes:
    expert_GTK: int32; the number of experts where a choice is nobody.
    weight_GTK: of each choice in the sum of outputs; at least float32.
    num_experts: as in the configuration.
    places: tokens that an expert takes of a group; None: all that come.
    priority_GT: tokens are placed in the order of falling priority; None: in the order of the text.
    losses: already weighted, by name.
    metrics: by name, pairs (sum, weight); `load` [E] counts the choices of each expert, before anything overflows.
  """

  expert_GTK: jax.Array
  weight_GTK: jax.Array
  num_experts: int = dataclasses.field(metadata={'static': True})
  places: int | None = dataclasses.field(metadata={'static': True})
  priority_GT: jax.Array | None
  losses: dict[str, jax.Array]
  metrics: dict[str, tuple[jax.Array, jax.Array]]


def orthonormal(key: jax.Array, D: int, E: int, dtype: Any) -> jax.Array:
  """Random columns [D, E] of length 1, at right angles to each other as far as D dimensions have room for.

  By Gram and Schmidt, twice for rounding. Not by jnp.linalg.qr: on CPU each call over a stack of matrices waits in a thread of
  the pool for others to do its parts, and two at a time on two cores wait for ever (jaxlib 0.10.2).
  """
  x_DE = jax.random.normal(key, (D, E), dtype)

  def column(e: jax.Array, x_DE: jax.Array) -> jax.Array:
    done = (jnp.arange(E) < e) & (jnp.arange(E) >= e // D * D)
    before_DE, v_D = jnp.where(done, x_DE, 0), x_DE[:, e]
    for _ in range(2):
      v_D = v_D - before_DE @ (before_DE.T @ v_D)
    return x_DE.at[:, e].set(v_D / jnp.linalg.norm(v_D))

  return jax.lax.fori_loop(0, E, column, x_DE)


class Router(nnx.Module):
  """The parameters of a router; one without any is not made."""

  def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs):
    D, E, dtype = config.d_model, config.moe.num_experts, jnp.dtype(config.param_dtype)
    if kind in ('random_projection', 'base'):
      value = 0.1 * orthonormal(rngs.params(), D, E, dtype)
      variable: type[nnx.Variable] = nnx.Param if kind == 'base' else Frozen
      self.centroids = variable(value, out_sharding=('embed', None))
    else:
      std = config.init_std if config.initializer == 'cpm2' else math.sqrt(0.1 / D)
      self.kernel = normal(rngs, (D, E), std, ('embed', None), config)
    if kind == 'loss_free':
      self.bias = State(jnp.zeros(E, dtype), out_sharding=(None,))


def has_parameters(kind: str) -> bool:
  return kind not in ('hash', 'domain')


def has_capacity(config: MoEConfig, kind: str) -> bool:
  """Whether tokens may overflow in training, by MoEConfig.capacity_factor."""
  return config.dispatch == 'einsum' and kind not in ('base', 'random_projection')


# Routers with probabilities that need no balance loss.
BALANCED_OTHERWISE = ('expert_choice', 'loss_free')

# Parts that several routers share.


def _scores(u_GTD: jax.Array, kernel_DE: jax.Array, config: MoEConfig, ctx: RouteContext) -> jax.Array:
  wide = at_least_float32(u_GTD.dtype)
  u_GTD = u_GTD.astype(wide)
  if config.jitter and ctx.key is not None:
    key = jax.random.fold_in(ctx.key, 0)
    u_GTD = u_GTD * jax.random.uniform(key, u_GTD.shape, wide, 1 - config.jitter, 1 + config.jitter)
  return u_GTD @ kernel_DE.astype(wide)


def _one_hot(expert_GTK: jax.Array, E: int, dtype: Any) -> jax.Array:
  return jax.nn.one_hot(expert_GTK, E, dtype=dtype)  # nobody is a row of zeros


def balance_loss(probs_GTE: jax.Array, expert_GTK: jax.Array, valid_GT: jax.Array) -> jax.Array:
  """E * sum_i f_i P_i, mean over groups: 1 for one choice a token and a uniform router, K for K choices.

  f_i is the share of a group's valid tokens that chose expert i (no gradient), P_i its mean probability (Fedus et al. 2022,
  equation 4). A group without a valid token counts as balanced with 0.
  """
  E = probs_GTE.shape[-1]
  tokens_G1 = jnp.maximum(valid_GT.sum(axis=-1, keepdims=True), 1)
  f_GE = jnp.sum(_one_hot(expert_GTK, E, probs_GTE.dtype), axis=(1, 2)) / tokens_G1
  p_GE = jnp.sum(jnp.where(valid_GT[..., None], probs_GTE, 0), axis=1) / tokens_G1
  return E * jnp.mean(jnp.sum(f_GE * p_GE, axis=-1))


def _routing(
    config: MoEConfig, kind: str, expert_GTK: jax.Array, weight_GTK: jax.Array, ctx: RouteContext, *,
    logits_GTE: jax.Array | None = None, probs_GTE: jax.Array | None = None,
    counted_GTK: jax.Array | None = None) -> Routing:
  """Leaves out padding, and adds losses and metrics.

  Args:
    config, kind, ctx: as given to the router.
    expert_GTK, weight_GTK: its choice.
    logits_GTE: for the z-loss.
    probs_GTE: for the balance loss, entropy and confidence.
    counted_GTK: choices that the balance loss counts, where not all.
  """
  E = config.num_experts
  expert_GTK = jnp.where(ctx.valid_GT[..., None], expert_GTK, E).astype(jnp.int32)
  load_E = _one_hot(expert_GTK, E, jnp.float32).sum(axis=(0, 1, 2))
  metrics = {'load': (load_E, jnp.maximum(load_E.sum(), 1)[None])}
  tokens = jnp.maximum(ctx.valid_GT.sum(), 1).astype(jnp.float32)

  def of_tokens(values_GT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.stop_gradient(jnp.sum(jnp.where(ctx.valid_GT, values_GT, 0))).astype(jnp.float32), tokens

  losses = {}
  if probs_GTE is not None:
    counted = expert_GTK if counted_GTK is None else jnp.where(ctx.valid_GT[..., None], counted_GTK, E)
    balance = balance_loss(probs_GTE, counted, ctx.valid_GT)
    metrics['balance'] = jax.lax.stop_gradient(balance).astype(jnp.float32), jnp.ones((), jnp.float32)
    if config.balance_loss and kind not in BALANCED_OTHERWISE:
      losses['balance_loss'] = config.balance_loss * balance
    log_probs_GTE = jnp.log(jnp.maximum(probs_GTE, jnp.finfo(probs_GTE.dtype).tiny))
    metrics['entropy'] = of_tokens(-jnp.sum(probs_GTE * log_probs_GTE, axis=-1))
    metrics['confidence'] = of_tokens(jnp.max(probs_GTE, axis=-1))
  if logits_GTE is not None and config.router_z_loss:
    z_GT = jnp.where(ctx.valid_GT, jnp.square(jax.nn.logsumexp(logits_GTE, axis=-1)), 0)
    losses['router_z_loss'] = config.router_z_loss * jnp.mean(z_GT.sum(axis=-1) / jnp.maximum(ctx.valid_GT.sum(axis=-1), 1))
  places, priority = None, None
  T = expert_GTK.shape[1]
  if ctx.train and config.dispatch == 'einsum':
    places = config.capacity(kind, T) if has_capacity(config, kind) else -(-T // E)
    if config.batch_prioritised:
      priority = jnp.max(weight_GTK, axis=-1)
  return Routing(expert_GTK, weight_GTK, E, places, priority, losses, metrics)


def scramble(x: jax.Array) -> jax.Array:
  """A number that looks random for each uint32, always the same (the finaliser of MurmurHash3, by Austin Appleby)."""
  x = x + jnp.uint32(0x9e3779b9)
  for shift, factor in ((16, 0x85ebca6b), (13, 0xc2b2ae35)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)


# The routers.


def switch(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """The most probable expert, weighted with its probability."""
  logits = _scores(u_GTD, params.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  expert = jnp.argmax(probs, axis=-1)[..., None]
  weight = jnp.take_along_axis(probs, expert, axis=-1)
  return _routing(config, 'switch', expert, weight, ctx, logits_GTE=logits, probs_GTE=probs)


def _normalised(weight_GTK: jax.Array) -> jax.Array:
  return weight_GTK / jnp.maximum(weight_GTK.sum(axis=-1, keepdims=True), jnp.finfo(weight_GTK.dtype).tiny)


def top_k(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """The k most probable experts; `renormalise` makes their weights sum to 1."""
  logits = _scores(u_GTD, params.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  weight, expert = jax.lax.top_k(probs, config.top_k)
  weight = _normalised(weight) if config.renormalise else weight
  return _routing(config, 'top_k', expert, weight, ctx, logits_GTE=logits, probs_GTE=probs)


def top_2(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """GShard: two experts, weights renormalised; the second is kept by `second_policy`; only the first choice is balanced."""
  logits = _scores(u_GTD, params.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  weight, expert = jax.lax.top_k(probs, 2)
  weight = _normalised(weight)
  second = weight[..., 1]
  keep = jnp.full(second.shape, config.second_policy != 'none')
  if config.second_policy == 'threshold' or (config.second_policy == 'random' and ctx.key is None):
    keep = second > config.second_threshold
  elif config.second_policy == 'random':
    assert ctx.key is not None
    draw = jax.random.uniform(jax.random.fold_in(ctx.key, 1), second.shape, second.dtype)
    keep = draw < second / max(config.second_threshold, 1e-9)
  first = expert[..., :1]
  expert = expert.at[..., 1].set(jnp.where(keep, expert[..., 1], config.num_experts))
  return _routing(config, 'top_2', expert, weight, ctx, logits_GTE=logits, probs_GTE=probs, counted_GTK=first)


def prototypes(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """M6-T: k groups of experts, each with a router of its own that takes its most probable expert."""
  k, E = config.top_k, config.num_experts
  logits = _scores(u_GTD, params.kernel[...], config, ctx)
  logits_PE = logits.reshape(*logits.shape[:-1], k, E // k)
  probs_PE = jax.nn.softmax(logits_PE, axis=-1)
  expert = jnp.argmax(probs_PE, axis=-1)
  weight = jnp.take_along_axis(probs_PE, expert[..., None], axis=-1)[..., 0]
  expert = expert + jnp.arange(k) * (E // k)
  # Each group's probabilities sum to 1: divided by k, those of all experts do, and the loss is k when uniform, as for top_k.
  probs = probs_PE.reshape(logits.shape) / k
  return _routing(config, 'prototypes', expert, weight, ctx, logits_GTE=logits, probs_GTE=probs)


def expert_choice(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """Each expert takes its most probable tokens, as many as its capacity; a token may have none or many. Encoders only."""
  logits = _scores(u_GTD, params.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  E = probs.shape[-1]
  # Of what is valid: a short text must not fill its experts with padding, nor get more of them than a long one.
  tokens = ctx.valid_GT.sum(axis=-1)
  takes = jnp.clip(jnp.round(config.capacity_factor * tokens / E), 1, tokens).astype(jnp.int32)[:, None, None]
  masked = jnp.where(ctx.valid_GT[..., None], probs, -1.0)
  rank = jnp.argsort(jnp.argsort(-masked, axis=1), axis=1)
  taken = (rank < takes) & ctx.valid_GT[..., None]
  expert = jnp.where(taken, jnp.arange(E), E)
  return _routing(config, 'expert_choice', expert, jnp.where(taken, probs, 0), ctx, logits_GTE=logits, probs_GTE=probs)


def hashed(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """A fixed expert for each token id, the same everywhere and always; weight 1."""
  del params
  expert = (scramble(ctx.ids_GT.astype(jnp.uint32)) % config.num_experts).astype(jnp.int32)[..., None]
  return _routing(config, 'hash', expert, _ones(u_GTD), ctx)


def domain(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """DEMix: one expert for each domain, by the label of the row; weight 1."""
  del params
  if 'domain' not in ctx.row:
    raise ConfigError(
        "MoEConfig.router = 'domain' needs the domain of every row: the feature `domain` [B] in the batch.")
  return _routing(config, 'domain', ctx.row['domain'][..., None], _ones(u_GTD), ctx)


def _ones(u_GTD: jax.Array) -> jax.Array:
  return jnp.ones((*u_GTD.shape[:-1], 1), at_least_float32(u_GTD.dtype))


def _balanced(scores_GTE: jax.Array, ctx: RouteContext) -> jax.Array:
  """Balanced in training; the best expert of each token outside."""
  if not ctx.train:
    return jnp.argmax(scores_GTE, axis=-1)[..., None]
  return jax.vmap(balanced)(jax.lax.stop_gradient(scores_GTE), ctx.valid_GT)[0][..., None]


def base(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """BASE: balanced in training; weight sigmoid(u . c), which alone gives the centroids a gradient."""
  scores = _scores(u_GTD, params.centroids[...], config, ctx)
  expert = _balanced(scores, ctx)
  chosen = jnp.take_along_axis(scores, jnp.minimum(expert, config.num_experts - 1), axis=-1)
  return _routing(config, 'base', expert, jax.nn.sigmoid(chosen), ctx)


def random_projection(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """CPM-2: frozen orthogonal centroids, balanced in training, arg-max outside; weight 1."""
  scores = _scores(u_GTD, params.centroids[...], config, ctx)
  return _routing(config, 'random_projection', _balanced(scores, ctx), _ones(u_GTD), ctx)


def loss_free(config: MoEConfig, params: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """Top k of sigmoid scores plus a bias; weights are the scores alone. `next_bias` evens the load; there is no loss."""
  logits = _scores(u_GTD, params.kernel[...], config, ctx)
  scores = jax.nn.sigmoid(logits)
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores + params.bias[...].astype(scores.dtype)), config.top_k)
  weight = jnp.take_along_axis(scores, expert, axis=-1)
  weight = _normalised(weight) if config.renormalise else weight
  return _routing(config, 'loss_free', expert, weight, ctx, logits_GTE=logits, probs_GTE=_normalised(scores))


def next_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
  """The bias of 'loss_free' after a step: raised for experts below the mean load of the global batch, lowered above it."""
  return bias_E + rate * jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E).astype(bias_E.dtype)


ROUTERS: dict[str, Callable[[MoEConfig, Any, jax.Array, RouteContext], Routing]] = {
    'switch': switch, 'top_k': top_k, 'top_2': top_2, 'prototypes': prototypes, 'expert_choice': expert_choice, 'hash': hashed,
    'base': base, 'random_projection': random_projection, 'domain': domain, 'loss_free': loss_free}
