"""The loops of a model with experts elsewhere: over layers, and in each over the experts that its tokens go to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.infmoe.bundle import Place
from t5x_cpm.infmoe.stages import Stages
from t5x_cpm.infmoe.stores import Store
from t5x_cpm.models.context import Context
from t5x_cpm.models.layer import Layer
from t5x_cpm.models.model import row_of

FEWEST = 4  # rows of a product: XLA:CPU (jax 0.10) takes ten times as long for a single one with weights of low precision


def bucket(count: int) -> int:
  """The number of rows that `count` tokens of an expert are computed as: few different ones, so that few are compiled."""
  size = FEWEST
  while size < count:
    size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
  return size


def tokens_of(expert_NK: np.ndarray, num_experts: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """By expert, the tokens that go to it and the places of these choices among all N * K, filled up to a bucket.

  A place that is filled in is beyond the end.
  """
  N, K = expert_NK.shape
  expert_A = expert_NK.reshape(-1)
  order_A = np.argsort(expert_A, kind='stable')
  counts_E = np.bincount(expert_A, minlength=num_experts + 1)[:num_experts]
  found, begin = {}, 0
  for expert in np.flatnonzero(counts_E):
    count = int(counts_E[expert])
    begin = int(counts_E[:expert].sum())
    places = np.arange(N * K, N * K + bucket(count), dtype=np.int32)
    places[:count] = order_A[begin:begin + count]
    tokens = np.where(places < N * K, places // K, 0).astype(np.int32)
    found[int(expert)] = tokens, places
  return found


class Run:
  """A model whose experts a store brings."""

  def __init__(self, stages: Stages, store: Store):
    self.stages, self._store = stages, store

  def _layer(self, layer: Layer, place: Place, x_BTD: jax.Array, ctx: Context, cache: Any) -> tuple[jax.Array, Any]:
    stages = self.stages
    found = stages.before(layer, place, x_BTD, ctx, cache)
    if not layer.routed:
      return found
    h_BTD, written, u_ND, expert_NK, weight_NK = found
    y_AD = jnp.zeros((expert_NK.size, u_ND.shape[-1]), u_ND.dtype)
    tokens = tokens_of(np.asarray(expert_NK), layer.config.moe.num_experts)
    for loan in self._store.take(place, list(tokens)):
      y_AD, loan.fence = stages.expert(layer, y_AD, u_ND, loan.weights, *tokens[loan.expert])
    return stages.after(layer, place, h_BTD, u_ND, y_AD, expert_NK, weight_NK, ctx), written

  def encode(self, batch: Any) -> jax.Array:
    """The encoder's output [B, S, D]."""
    x_BSD, ctx = self.stages.encoder_input(batch)
    for layer, place in self.stages.layers['encoder']:
      x_BSD, _ = self._layer(layer, place, x_BSD, ctx, None)
    return self.stages.encoder_output(x_BSD, ctx)

  def logits(self, batch: Any) -> jax.Array:
    """The logits [B, T, V] where all targets are known."""
    x_BTD, ctx = self.stages.decoder_input(batch, self.encode(batch))
    for layer, place in self.stages.layers['decoder']:
      x_BTD, _ = self._layer(layer, place, x_BTD, ctx, None)
    return self.stages.decoder_output(x_BTD, ctx)

  def start(self, batch: Any, max_len: int) -> Any:
    """The cache of a decoder that will read up to max_len tokens; leaves are [1, B, ...]."""
    encoded = self.encode(batch)
    layers = tuple(self.stages.cross_cache(layer, place, encoded, max_len) for layer, place in self.stages.layers['decoder'])
    return {'layers': layers, 'encoder_valid': self.stages.valid(batch),
            'row': {name: jnp.asarray(values_B)[None] for name, values_B in row_of(batch).items()}}

  def step(self, cache: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Any]:
    """Reads tokens at the given positions of each row: logits [B, T, V] after each of them, and the cache."""
    x_BTD, ctx = self.stages.step_input(cache, tokens_BT, positions_BT)
    layers = []
    for (layer, place), own in zip(self.stages.layers['decoder'], cache['layers'], strict=True):
      x_BTD, written = self._layer(layer, place, x_BTD, ctx, own)
      layers.append(own | written)
    return self.stages.decoder_output(x_BTD, ctx), cache | {'layers': tuple(layers)}
