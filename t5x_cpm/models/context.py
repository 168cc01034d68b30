"""What the layers of a stack see besides their own input."""

import dataclasses
from typing import Any

import jax

from t5x_cpm.models import hooks
from t5x_cpm.models.layers import dropout

# Where random numbers are drawn, and the number that each place folds into the key of its layer. Two places may share a number
# because they never share a key: the last two draw from the key of the stack.
SITES = {
    'self.weights': 0, 'self.output': 1, 'cross.weights': 2, 'cross.output': 3, 'mlp.output': 4, 'mlp.hidden': 5, 'router': 6,
    'stack.input': 0, 'stack.output': 1}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of a stack sees besides its own input: a pytree, so that jit takes it.

  Attributes:
    self_bias: relative positions, [H, T, S] or [B, H, T, S]; at least float32.
    self_mask: additive, broadcastable to [B, H, T, S].
    cross_mask: likewise, over the encoder's output; None in an encoder.
    encoded: the encoder's output [B, S, D]; None when decoding, where the cache holds what is needed of it.
    positions: [B, T] of the tokens of a decoding step; None for whole sequences.
    ids: token ids [B, T], for routers.
    valid: [B, T], False at padding, which is never routed.
    row: config.row_features: what rows carry besides tokens, by name, int32 [B].
    delta: what a delta does in the layer; None: there is none.
    key: of dropout and of random draws by routers; None: nothing is dropped or drawn.
    train: whether tokens are routed as in training: in groups, balanced, within a capacity. Otherwise no token depends on
      another row, and none is left behind.
    dropout_rate: of everything but the experts' hidden activations.
    expert_dropout_rate: of the experts' hidden activations.
  """

  self_bias: jax.Array
  self_mask: jax.Array
  cross_mask: Any = None
  encoded: Any = None
  positions: Any = None
  ids: Any = None
  valid: Any = None
  row: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  delta: hooks.Hooks | None = None
  key: jax.Array | None = None
  train: bool = dataclasses.field(default=False, metadata={'static': True})
  dropout_rate: float = dataclasses.field(default=0.0, metadata={'static': True})
  expert_dropout_rate: float = dataclasses.field(default=0.0, metadata={'static': True})

  def at_layer(self, index: Any, delta: hooks.Hooks | None = None) -> 'Context':
    """The context of one layer of the stack, by its index, with random numbers of its own, and its part of a delta."""
    key = None if self.key is None else jax.random.fold_in(self.key, index)
    return self if key is None and delta is None else dataclasses.replace(self, key=key, delta=delta)

  def changed(self, site: str, x: Any, y: jax.Array) -> jax.Array:
    """What a delta gives in the place of y, which the site made of x."""
    return y if self.delta is None else self.delta.change(site, x, y, self.key)

  def hook(self, sublayer: str) -> hooks.Hook:
    """`changed` for the sites within a sublayer, by their names there."""
    return hooks.within(self.delta, sublayer, self.key)

  def prefix(self, sublayer: str) -> hooks.Prefix | None:
    """The keys and values that a delta puts before those of an attention; None where there are none."""
    return None if self.delta is None else self.delta.prefix(sublayer)

  def key_of(self, site: str) -> jax.Array | None:
    """The key of one of SITES; None where nothing is drawn."""
    return None if self.key is None else jax.random.fold_in(self.key, SITES[site])

  def dropout(self, x: jax.Array, site: str) -> jax.Array:
    return dropout(x, self.dropout_rate, self.key_of(site))
