"""One layer: attention, routing and what comes after the feed-forward part, whose weights are elsewhere."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from t5x_cpm.config import ModelConfig
from t5x_cpm.models import moe
from t5x_cpm.models import routing as routing_lib
from t5x_cpm.models.attention import Attention, Cache, write
from t5x_cpm.models.layers import RMSNorm, dropout
from t5x_cpm.models.routing import RouteContext, Router, Routing


@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of a stack sees beside its own input."""

  self_bias: jax.Array  # relative positions, [H, T, S] or [B, H, T, S]
  self_mask: jax.Array  # additive
  cross_mask: Any = None  # additive; None in an encoder
  encoded: Any = None  # [B, S, D]; None when decoding, where the cache holds what is needed of it
  positions: Any = None  # [B, T] of the tokens of a decoding step
  dropout_rate: float = 0.0
  expert_dropout: float = -1.0  # of experts' hidden activations; -1: dropout_rate
  key: jax.Array | None = None  # of this layer; None outside training
  ids: Any = None  # [B, T] token ids, for routers
  valid: Any = None  # [B, T] False at padding
  row: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.row_features of each token's row, [B, T]

  @property
  def expert_dropout_rate(self) -> float:
    return self.dropout_rate if self.expert_dropout < 0 else self.expert_dropout

  def key_of(self, site: int) -> jax.Array | None:
    return None if self.key is None else jax.random.fold_in(self.key, site)

  def dropout(self, x: jax.Array, site: int) -> jax.Array:
    return dropout(x, self.dropout_rate, self.key_of(site))


class Block(nnx.Module):
  """One layer without its feed-forward weights. Pre-norm: x + f(norm(x)) for each part."""

  def __init__(self, config: ModelConfig, num_layers: int, is_decoder: bool, rngs: nnx.Rngs, routed: bool = False):
    self.moe, self.kind, self.routed = config.moe, config.moe.of('decoder' if is_decoder else 'encoder'), routed
    if routed and routing_lib.has_parameters(self.kind):
      self.router = Router(config, self.kind, rngs)
    self.attention_norm = RMSNorm(config)
    self.attention = Attention(config, num_layers, rngs)
    if is_decoder:
      self.cross_attention_norm = RMSNorm(config)
      self.cross_attention = Attention(config, num_layers, rngs)
    self.mlp_norm = RMSNorm(config)
    self.is_decoder = is_decoder

  def attend(self, x_BTD: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """Self-attention, and in a decoder cross-attention.

    With a cache, this step's keys and values are written to it, and what has changed of it is returned: were the encoder's
    keys and values returned too, a loop over layers would copy them for every token.
    """
    u = self.attention_norm(x_BTD)
    keys, values = self.attention.keys_and_values(u)
    written = None
    if cache is not None:
      keys, values = write(cache['self_key'], keys, ctx.positions), write(cache['self_value'], values, ctx.positions)
      written = {'self_key': keys, 'self_value': values}
    y = self.attention(u, (keys, values), ctx.self_bias, ctx.self_mask, ctx.key_of(0))
    x_BTD = x_BTD + ctx.dropout(y, 1)
    if self.is_decoder:
      u = self.cross_attention_norm(x_BTD)
      if cache is None:
        keys, values = self.cross_attention.keys_and_values(ctx.encoded)
      else:
        keys, values = cache['cross_key'], cache['cross_value']
      y = self.cross_attention(u, (keys, values), None, ctx.cross_mask, ctx.key_of(2))
      x_BTD = x_BTD + ctx.dropout(y, 3)
    return x_BTD, written

  def route(self, h_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Routing | None]:
    """The input of the feed-forward part, and which expert each token goes to; None: there is one."""
    u_BTD = self.mlp_norm(h_BTD)
    if not self.routed:
      return u_BTD, None
    size = u_BTD.shape[1] if ctx.key is None else self.moe.group_size  # outside training a row depends on no other

    def grouped(x: Any) -> Any:
      return None if x is None else moe.to_groups(x, size)

    row = {name: grouped(value) for name, value in ctx.row.items()}
    context = RouteContext(grouped(ctx.valid), grouped(ctx.ids), row, ctx.key_of(6))
    router = self.router if routing_lib.has_parameters(self.kind) else None
    return u_BTD, routing_lib.ROUTERS[self.kind](self.moe, router, grouped(u_BTD), context)

  def combine(self, h_BTD: jax.Array, y_BTD: jax.Array, routing: Routing | None, ctx: Context) -> jax.Array:
    """The layer's output from what went into the feed-forward part and what came out of it."""
    return h_BTD + ctx.dropout(y_BTD, 4)
