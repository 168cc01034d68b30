"""What a router is: what it sees, what it chooses, and how its choice becomes a routing with losses and metrics.

`routers` has the routers themselves. Tokens come in groups of T [G, T]; each has K choices, of which some may be no expert.
Scores, softmax and weights are in at least float32 (Fedus et al. 2022, selective precision).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig


@dataclasses.dataclass(frozen=True)
class RouteContext:
  """What a router sees besides its input.

  Attributes:
    valid_GT: False at padding, which is never routed.
    ids_GT: token ids.
    row: config.row_features of each token's row: int32 [G, T].
    key: for random draws; None where nothing is drawn.
    train: whether balanced routers balance, and tokens may overflow.
  """

  valid_GT: jax.Array
  ids_GT: jax.Array
  row: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  key: jax.Array | None = None
  train: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a router chooses.

  Attributes:
    expert_GTK: the experts of each token; the number of experts where a choice is none.
    weight_GTK: of each choice in the sum of outputs; at least float32.
    logits_GTE: for the z-loss; None: the router has none.
    probs_GTE: for balance loss, entropy and confidence; None: the router has none.
    counted_GTK: the choices that the balance loss counts; None: all.
  """

  expert_GTK: jax.Array
  weight_GTK: jax.Array
  logits_GTE: jax.Array | None = None
  probs_GTE: jax.Array | None = None
  counted_GTK: jax.Array | None = None


def one(moe: MoEConfig) -> int:
  """One expert for each token."""
  del moe
  return 1


@dataclasses.dataclass(frozen=True)
class Router:
  """One way to send tokens to experts: a row of `routers.ROUTERS`.

  Attributes:
    choose: (MoEConfig, module of its weights or None, u_GTD, RouteContext) -> Choice.
    weights: (ModelConfig, random numbers) -> the module of its weights; None: it has none.
    choices: how many experts a token has, for capacities.
    passes: how many experts a token passes, on average over tokens; None: as many as its choices.
    causal: whether it can be used one token at a time; otherwise it is refused in a decoder.
    sees_later: why a token's experts depend on later tokens of its group in training; '' if they do not.
    ranked: whether all first choices of a group are placed before any second one, where experts may overflow.
    overflows: whether MoEConfig.capacity_factor limits what an expert takes in training; otherwise a fair share does.
    balanced: whether the balance loss applies to it, where it has probabilities.
    advance: (its parameters, load [layers, E], MoEConfig) -> its parameters after a step, by a rule outside the gradient.
    check: raises ConfigError for a configuration that cannot work with it.
  """

  choose: Callable[[MoEConfig, Any, jax.Array, RouteContext], Choice]
  weights: Callable[[ModelConfig, nnx.Rngs], nnx.Module] | None = None
  choices: Callable[[MoEConfig], int] = one
  passes: Callable[[MoEConfig], float] | None = None
  causal: bool = True
  sees_later: str = ''
  ranked: bool = False
  overflows: bool = True
  balanced: bool = True
  advance: Callable[[Any, jax.Array, MoEConfig], Any] | None = None
  check: Callable[[MoEConfig], None] | None = None

  def leak(self, moe: MoEConfig) -> str:
    """Why, in training, later tokens of a group change where earlier ones go; '' if they do not."""
    if self.sees_later or moe.dispatch != 'einsum' or not self.overflows:
      return self.sees_later
    if moe.batch_prioritised:
      return 'the most confident tokens of a group are placed first'
    return 'all first choices of a group are placed before any second one' if self.ranked and self.choices(moe) > 1 else ''

  def capacity(self, moe: MoEConfig, tokens: int) -> int | None:
    """How many tokens of a group of `tokens` an expert takes in training; None: all that come.

    Raises:
      ConfigError: it would be less than one.
    """
    if moe.dispatch != 'einsum':
      return None
    if not self.overflows:
      return -(-tokens // moe.num_experts)
    fair = tokens / moe.num_experts * (self.choices(moe) if moe.capacity_counts == 'assignments' else 1)
    capacity = round(moe.capacity_factor * fair)
    if capacity < 1:
      raise ConfigError(
          f'MoEConfig.capacity_factor = {moe.capacity_factor}: an expert takes {moe.capacity_factor * fair:.2f} tokens of a '
          f'group of {tokens} with {moe.num_experts} experts, less than one. Set a larger MoEConfig.group_size.')
    return min(capacity, tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Where tokens go.

  Attributes:
    expert_GTK: int32; the number of experts where a choice is none.
    weight_GTK: of each choice in the sum of outputs; at least float32.
    num_experts: as in the configuration.
    capacity: how many tokens of a group an expert takes; None: all that come.
    priority_GT: tokens are placed in the order of falling priority; None: in the order of the text.
    losses: already weighted, by name.
    metrics: by name, pairs (sum, weight); `load` [E] counts the choices of each expert, before anything overflows.
  """

  expert_GTK: jax.Array
  weight_GTK: jax.Array
  num_experts: int = dataclasses.field(metadata={'static': True})
  capacity: int | None = dataclasses.field(metadata={'static': True})
  priority_GT: jax.Array | None
  losses: dict[str, jax.Array]
  metrics: dict[str, tuple[jax.Array, jax.Array]]


def _one_hot(expert_GTK: jax.Array, E: int, dtype: Any) -> jax.Array:
  return jax.nn.one_hot(expert_GTK, E, dtype=dtype)  # no expert is a row of zeros


def balance_loss(probs_GTE: jax.Array, expert_GTK: jax.Array, valid_GT: jax.Array) -> jax.Array:
  """E * sum_i f_i P_i, mean over groups: 1 for one choice per token and a uniform router, K for K choices.

  f_i is the share of a group's valid tokens that chose expert i (no gradient), P_i its mean probability (Fedus et al. 2022,
  equation 4). A group without a valid token contributes 0.
  """
  E = probs_GTE.shape[-1]
  tokens_G1 = jnp.maximum(valid_GT.sum(axis=-1, keepdims=True), 1)
  f_GE = jnp.sum(_one_hot(expert_GTK, E, probs_GTE.dtype), axis=(1, 2)) / tokens_G1
  p_GE = jnp.sum(jnp.where(valid_GT[..., None], probs_GTE, 0), axis=1) / tokens_G1
  return E * jnp.mean(jnp.sum(f_GE * p_GE, axis=-1))


def finish(router: Router, moe: MoEConfig, choice: Choice, ctx: RouteContext) -> Routing:
  """Makes a router's choice a routing: leaves padding out, adds losses and metrics, and sets the experts' capacity."""
  E = moe.num_experts
  expert_GTK = jnp.where(ctx.valid_GT[..., None], choice.expert_GTK, E).astype(jnp.int32)
  load_E = _one_hot(expert_GTK, E, jnp.float32).sum(axis=(0, 1, 2))
  metrics = {'load': (load_E, jnp.maximum(load_E.sum(), 1)[None])}
  tokens = jnp.maximum(ctx.valid_GT.sum(), 1).astype(jnp.float32)

  def of_tokens(values_GT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.stop_gradient(jnp.sum(jnp.where(ctx.valid_GT, values_GT, 0))).astype(jnp.float32), tokens

  losses = {}
  probs_GTE, logits_GTE = choice.probs_GTE, choice.logits_GTE
  if probs_GTE is not None:
    counted_GTK = choice.counted_GTK
    counted = expert_GTK if counted_GTK is None else jnp.where(ctx.valid_GT[..., None], counted_GTK, E)
    balance = balance_loss(probs_GTE, counted, ctx.valid_GT)
    metrics['balance'] = jax.lax.stop_gradient(balance).astype(jnp.float32), jnp.ones((), jnp.float32)
    if moe.balance_loss and router.balanced:
      losses['balance_loss'] = moe.balance_loss * balance
    log_probs_GTE = jnp.log(jnp.maximum(probs_GTE, jnp.finfo(probs_GTE.dtype).tiny))
    metrics['entropy'] = of_tokens(-jnp.sum(probs_GTE * log_probs_GTE, axis=-1))
    metrics['confidence'] = of_tokens(jnp.max(probs_GTE, axis=-1))
  if logits_GTE is not None and moe.router_z_loss:
    z_GT = jnp.where(ctx.valid_GT, jnp.square(jax.nn.logsumexp(logits_GTE, axis=-1)), 0)
    losses['router_z_loss'] = moe.router_z_loss * jnp.mean(z_GT.sum(axis=-1) / jnp.maximum(ctx.valid_GT.sum(axis=-1), 1))
  capacity, priority = None, None
  if ctx.train and moe.dispatch == 'einsum':
    capacity = router.capacity(moe, expert_GTK.shape[1])
    if moe.batch_prioritised:
      priority = jnp.max(choice.weight_GTK, axis=-1)
  return Routing(expert_GTK, choice.weight_GTK, E, capacity, priority, losses, metrics)
