"""The routers. Each is a function and a row of ROUTERS; a module of your own adds rows with `register`.

Names and formulas: Switch (Fedus et al. 2022), GShard (Lepikhin et al. 2021), expert choice (Zhou et al. 2022), hash layers
(Roller et al. 2021), BASE (Lewis et al. 2021), random projection (CPM-2, Zhang et al. 2021), prototypes (M6-T, Yang et al.
2021), DEMix (Gururangan et al. 2022), loss-free balancing (Wang et al. 2024).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig
from t5x_cpm.config.fields import did_you_mean
from t5x_cpm.models.assignment import balanced
from t5x_cpm.models.component import Fixed, Ruled
from t5x_cpm.models.layers import at_least_float32, normal, scramble
from t5x_cpm.models.routing import Choice, RouteContext, Router, Routing, finish

# Weights.


def orthonormal(key: jax.Array, D: int, E: int, dtype: Any) -> jax.Array:
  """Random columns [D, E] of length 1, at right angles to each other within every block of D columns.

  This is Gram-Schmidt, done twice because of rounding. It is not jnp.linalg.qr because on CPU a call over a stack of matrices
  waits in a thread of the pool for other threads to do its parts, and two such calls on two cores deadlock (jaxlib 0.10.2).
  """
  x_DE = jax.random.normal(key, (D, E), dtype)

  def column(e: jax.Array, x_DE: jax.Array) -> jax.Array:
    done = (jnp.arange(E) < e) & (jnp.arange(E) >= e // D * D)
    before_DE, v_D = jnp.where(done, x_DE, 0), x_DE[:, e]
    for _ in range(2):
      v_D = v_D - before_DE @ (before_DE.T @ v_D)
    return x_DE.at[:, e].set(v_D / jnp.linalg.norm(v_D))

  return jax.lax.fori_loop(0, E, column, x_DE)


class Scores(nnx.Module):
  """A matrix [D, E] that scores every expert."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    std = config.init_std if config.initializer == 'cpm2' else math.sqrt(0.1 / config.d_model)
    self.kernel = normal(rngs, (config.d_model, config.moe.num_experts), std, ('embed', None), config)


class BiasedScores(Scores):
  """Scores, and a bias [E] that a rule of its own changes."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    super().__init__(config, rngs)
    self.bias = Ruled(jnp.zeros(config.moe.num_experts, jnp.dtype(config.param_dtype)), axes=(None,))


class Centroids(nnx.Module):
  """Orthogonal columns [D, E] of length 0.1, one for each expert."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, trained: bool):
    variable = nnx.Param if trained else Fixed
    value = 0.1 * orthonormal(rngs.params(), config.d_model, config.moe.num_experts, jnp.dtype(config.param_dtype))
    self.centroids = variable(value, axes=('embed', None))


# Parts that several routers share.


def _scores(u_GTD: jax.Array, kernel_DE: jax.Array, config: MoEConfig, ctx: RouteContext) -> jax.Array:
  wide = at_least_float32(u_GTD.dtype)
  u_GTD = u_GTD.astype(wide)
  if config.jitter and ctx.train and ctx.key is not None:
    key = jax.random.fold_in(ctx.key, 0)
    u_GTD = u_GTD * jax.random.uniform(key, u_GTD.shape, wide, 1 - config.jitter, 1 + config.jitter)
  return u_GTD @ kernel_DE.astype(wide)


def _normalised(weight_GTK: jax.Array) -> jax.Array:
  return weight_GTK / jnp.maximum(weight_GTK.sum(axis=-1, keepdims=True), jnp.finfo(weight_GTK.dtype).tiny)


def _ones(u_GTD: jax.Array) -> jax.Array:
  return jnp.ones((*u_GTD.shape[:-1], 1), at_least_float32(u_GTD.dtype))


def _balanced(scores_GTE: jax.Array, ctx: RouteContext) -> jax.Array:
  """The balanced assignment in training; otherwise each token's best expert."""
  if not ctx.train:
    return jnp.argmax(scores_GTE, axis=-1)[..., None]
  return jax.vmap(balanced)(jax.lax.stop_gradient(scores_GTE), ctx.valid_GT)[..., None]


# The routers.


def switch(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """The most probable expert, weighted with its probability."""
  logits = _scores(u_GTD, weights.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  expert = jnp.argmax(probs, axis=-1)[..., None]
  return Choice(expert, jnp.take_along_axis(probs, expert, axis=-1), logits, probs)


def top_k(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """The k most probable experts; `renormalise` makes their weights sum to 1."""
  logits = _scores(u_GTD, weights.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  weight, expert = jax.lax.top_k(probs, config.top_k)
  return Choice(expert, _normalised(weight) if config.renormalise else weight, logits, probs)


def top_2(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """GShard: two experts, weights renormalised; `second_policy` decides whether the second stays; only the first is balanced."""
  logits = _scores(u_GTD, weights.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  weight, expert = jax.lax.top_k(probs, 2)
  weight = _normalised(weight)
  second = weight[..., 1]
  keep = jnp.full(second.shape, config.second_policy != 'none')
  key = ctx.key if ctx.train else None
  if config.second_policy == 'threshold' or (config.second_policy == 'random' and key is None):
    keep = second > config.second_threshold
  elif config.second_policy == 'random':
    assert key is not None
    draw = jax.random.uniform(jax.random.fold_in(key, 1), second.shape, second.dtype)
    keep = draw < second / max(config.second_threshold, 1e-9)
  first = expert[..., :1]
  expert = expert.at[..., 1].set(jnp.where(keep, expert[..., 1], config.num_experts))
  return Choice(expert, weight, logits, probs, counted_GTK=first)


def prototypes(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """M6-T: k groups of experts, each with a router of its own that takes its most probable expert."""
  k, E = config.top_k, config.num_experts
  logits = _scores(u_GTD, weights.kernel[...], config, ctx)
  logits_PE = logits.reshape(*logits.shape[:-1], k, E // k)
  probs_PE = jax.nn.softmax(logits_PE, axis=-1)
  expert = jnp.argmax(probs_PE, axis=-1)
  weight = jnp.take_along_axis(probs_PE, expert[..., None], axis=-1)[..., 0]
  expert = expert + jnp.arange(k) * (E // k)
  # Each group's probabilities sum to 1: divided by k, those of all experts do, and the loss is k when uniform, as for top_k.
  return Choice(expert, weight, logits, probs_PE.reshape(logits.shape) / k)


def expert_choice(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """Each expert takes its most probable tokens, as many as its capacity; a token may have none or many. Encoders only."""
  logits = _scores(u_GTD, weights.kernel[...], config, ctx)
  probs = jax.nn.softmax(logits, axis=-1)
  E = probs.shape[-1]
  # Counted in valid tokens: a short text must neither fill its experts with padding nor get more of them than a long one.
  tokens = ctx.valid_GT.sum(axis=-1)
  takes = jnp.clip(jnp.round(config.capacity_factor * tokens / E), 1, tokens).astype(jnp.int32)[:, None, None]
  masked = jnp.where(ctx.valid_GT[..., None], probs, -1.0)
  rank = jnp.argsort(jnp.argsort(-masked, axis=1), axis=1)
  taken = (rank < takes) & ctx.valid_GT[..., None]
  return Choice(jnp.where(taken, jnp.arange(E), E), jnp.where(taken, probs, 0), logits, probs)


def hashed(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """A fixed expert for each token id, the same everywhere and always; weight 1."""
  del weights
  expert = (scramble(ctx.ids_GT.astype(jnp.uint32)) % config.num_experts).astype(jnp.int32)[..., None]
  return Choice(expert, _ones(u_GTD))


def domain(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """DEMix: one expert for each domain, chosen by the label of the row; weight 1."""
  del config, weights
  if 'domain' not in ctx.row:
    raise ConfigError("MoEConfig.router = 'domain' needs the domain of every row: the feature `domain` [B] in the batch.")
  return Choice(ctx.row['domain'][..., None], _ones(u_GTD))


def base(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """BASE: balanced in training; weight sigmoid(u . c), which alone gives the centroids a gradient."""
  scores = _scores(u_GTD, weights.centroids[...], config, ctx)
  expert = _balanced(scores, ctx)
  chosen = jnp.take_along_axis(scores, jnp.minimum(expert, config.num_experts - 1), axis=-1)
  return Choice(expert, jax.nn.sigmoid(chosen))


def random_projection(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """CPM-2: fixed orthogonal centroids, balanced in training, otherwise arg-max; weight 1."""
  scores = _scores(u_GTD, weights.centroids[...], config, ctx)
  return Choice(_balanced(scores, ctx), _ones(u_GTD))


def loss_free(config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Choice:
  """Top k of sigmoid scores plus a bias; weights are the scores alone. `next_bias` evens the load; there is no loss."""
  logits = _scores(u_GTD, weights.kernel[...], config, ctx)
  scores = jax.nn.sigmoid(logits)
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores + weights.bias[...].astype(scores.dtype)), config.top_k)
  weight = jnp.take_along_axis(scores, expert, axis=-1)
  return Choice(expert, _normalised(weight) if config.renormalise else weight, logits, _normalised(scores))


def next_bias(params: dict[str, jax.Array], load_LE: jax.Array, config: MoEConfig) -> dict[str, jax.Array]:
  """The biases of 'loss_free' after a step: raised where the load is below its mean over the global batch, lowered above."""
  bias_LE = params['bias']
  change_LE = config.bias_rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
  return params | {'bias': bias_LE + change_LE.astype(bias_LE.dtype)}


def _k(config: MoEConfig) -> int:
  return config.top_k


def _two(config: MoEConfig) -> int:
  del config
  return 2


def _whole_groups(config: MoEConfig) -> None:
  if config.num_experts % config.top_k:
    raise ConfigError(
        f"MoEConfig.num_experts = {config.num_experts}: router 'prototypes' divides the experts into MoEConfig.top_k = "
        f'{config.top_k} groups of one size; expected a multiple.')


ASSIGNED = 'the tokens of a group are assigned together'

ROUTERS: dict[str, Router] = {
    'switch': Router(switch, Scores),
    'top_k': Router(top_k, Scores, choices=_k, ranked=True),
    'top_2': Router(top_2, Scores, choices=_two, ranked=True),
    'prototypes': Router(prototypes, Scores, choices=_k, check=_whole_groups),
    'expert_choice': Router(
        expert_choice, Scores, causal=False, sees_later='experts choose among all tokens of a group', balanced=False,
        passes=lambda config: min(config.capacity_factor, config.num_experts)),
    'hash': Router(hashed),
    'base': Router(base, functools.partial(Centroids, trained=True), sees_later=ASSIGNED, overflows=False),
    'random_projection': Router(
        random_projection, functools.partial(Centroids, trained=False), sees_later=ASSIGNED, overflows=False),
    'domain': Router(domain),
    'loss_free': Router(loss_free, BiasedScores, choices=_k, ranked=True, balanced=False, advance=next_bias),
}


def register(name: str, router: Router) -> None:
  """Adds a router under a name that MoEConfig.router may then use; for modules that `--import` names.

  Raises:
    ConfigError: another router has that name.
  """
  if ROUTERS.get(name, router) != router:
    raise ConfigError(f'a router named {name!r} exists already: register yours under another name.')
  ROUTERS[name] = router


def get(name: str) -> Router:
  """The router of a name. Raises ConfigError for one that nobody registered."""
  if name not in ROUTERS:
    raise ConfigError(f'MoEConfig.router = {name!r}: expected one of {", ".join(map(repr, ROUTERS))}.'
                      f'{did_you_mean(name, ROUTERS)} A router of your own module needs --import=MODULE.')
  return ROUTERS[name]


def check(config: MoEConfig) -> None:
  """Raises ConfigError where a stack's router is not known, or cannot work as it is configured."""
  for stack in ('encoder', 'decoder'):
    if not config.every(stack):
      continue
    router = get(config.of(stack))
    if router.check is not None:
      router.check(config)
    if stack == 'decoder' and not router.causal:
      raise ConfigError(
          f'MoEConfig.router = {config.of(stack)!r} cannot be causal: in a decoder an expert would choose by tokens that are '
          "not written yet. Set MoEConfig.decoder_router, for instance to 'top_k', or MoEConfig.decoder_every = 0.")


def leak(config: MoEConfig) -> str:
  """Why later tokens of the decoder change where earlier ones go in training; '' if they do not, or there are no experts."""
  return get(config.of('decoder')).leak(config) if config.num_experts and config.every('decoder') else ''


def experts_of_token(config: MoEConfig, stack: str) -> float:
  """How many experts a token passes in a layer of a stack that has them, on average over tokens."""
  router = get(config.of(stack))
  return router.choices(config) if router.passes is None else router.passes(config)


def route(name: str, config: MoEConfig, weights: Any, u_GTD: jax.Array, ctx: RouteContext) -> Routing:
  """Where tokens go by the router of a name.

  Args:
    name: one of ROUTERS.
    config: the experts' configuration.
    weights: the router's module, or None for one without weights.
    u_GTD: the tokens, in groups.
    ctx: what else the router sees.
  """
  router = get(name)
  return finish(router, config, router.choose(config, weights, u_GTD, ctx), ctx)
