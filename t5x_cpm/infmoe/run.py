"""The loops of a model with experts elsewhere: over layers, and in each over the experts that its tokens go to."""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.config import OffloadConfig
from t5x_cpm.infmoe.bundle import Place, place_of
from t5x_cpm.infmoe.foresight import Foresight
from t5x_cpm.infmoe.stages import Stages, Weights
from t5x_cpm.infmoe.stores import Slots, Store
from t5x_cpm.models.component import Params
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


def in_order(tokens: dict[int, tuple[np.ndarray, np.ndarray]], order: str) -> list[int]:
  """Experts in the order in which they are to be read.

  Reading and computing are two machines that each expert passes one after the other. Johnson (1954) orders such jobs so that
  the last ends first: those that are read faster than they are computed come first, by how fast they are read, and then the
  others by falling time of computing. Reading takes all experts the same time, so that this is the order of falling tokens.
  """
  return sorted(tokens, key=lambda expert: -len(tokens[expert][0])) if order == 'longest_first' else list(tokens)


@dataclasses.dataclass
class Pace:
  """How fast a stack has been so far, without the first pass of each shape, for which programs are compiled.

  Attributes:
    passes: how many.
    tokens: of all passes.
    seconds: that they took.
  """

  passes: int = 0
  tokens: int = 0
  seconds: float = 0.0
  shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

  @contextlib.contextmanager
  def counting(self, tokens_BT: Any) -> Iterator[None]:
    """Counts a pass over tokens, which the block computes."""
    begin = time.monotonic()
    yield
    if tokens_BT.shape in self.shapes:
      self.passes, self.tokens = self.passes + 1, self.tokens + tokens_BT.size
      self.seconds += time.monotonic() - begin
    self.shapes.add(tokens_BT.shape)


class Run:
  """A model whose experts a store brings.

  Attributes:
    stages: its programs.
    weights: all parameters but those of experts.
    store: what brings these.
    foresight: whether guesses pay.
    pace: by stack, how fast it has been: the decoder's one token at a time.
  """

  def __init__(self, stages: Stages, weights: Weights, store: Store, given: OffloadConfig, other: 'Run | None' = None):
    """given: when experts are brought. other: a run of the same experts, which learns and counts together with this one."""
    self.stages, self.weights, self.store, self._given = stages, weights, store, given
    self.foresight: Foresight = other.foresight if other else Foresight(given.guess)
    self.pace: dict[str, Pace] = other.pace if other else {stack: Pace() for stack in stages.layers}
    self._guessed: tuple[Place, list[int]] | None = None
    self._next = {layer: next((other for other, _ in layers[number + 1:] if other.routed), None)
                  for layers in stages.layers.values() for number, (layer, _) in enumerate(layers)}

  def with_delta(self, stages: Stages, delta: Params) -> 'Run':
    """The same with a delta, which the model of `stages` has."""
    return Run(stages, self.weights.with_delta(stages.model, delta), self.store, self._given, self)

  def _layers(self, stack: str) -> Iterator[tuple[Layer, Place, Params, list[Params]]]:
    parts = self.weights.parts.get(stack)
    for layer, place in self.stages.layers[stack]:
      yield layer, place, self.weights.layers[place], parts[layer.index] if parts else []

  def _expect(self, store: Slots, layer: Layer, needed: Collection[int], h_BTD: jax.Array, ctx: Context,
              decodes: bool) -> None:
    """Tells the store what comes after a layer that needs these experts."""
    after = self._next[layer]
    if decodes:
      if self._guessed is not None and self._guessed[0] == place_of(layer):
        self.foresight.told(self._guessed[1], needed)
      self._guessed = None
      if after is not None and self.foresight.looks(self.pace['decoder'].passes):
        place = place_of(after)
        expert_GTK = np.asarray(self.stages.guess(after, self.weights.layers[place], h_BTD, ctx))
        experts = np.unique(expert_GTK[expert_GTK < after.config.moe.num_experts]).tolist()
        self._guessed = place, experts
        if self.foresight.pays:
          store.expect([(place, experts)])
    elif after is not None and self._given.read_ahead:  # of many tokens some need almost any expert
      store.expect([(place_of(after), store.popular(place_of(after))[:len(needed)])])
    elif after is None and layer.stack == 'encoder' and self._given.warm_up:
      store.expect(store.room())

  def _layer(self, layer: Layer, place: Place, weights: Params, parts: list[Params], x_BTD: jax.Array, ctx: Context,
             cache: Any = None) -> tuple[jax.Array, Any]:
    """A layer: its output, and what was written to its cache."""
    stages = self.stages
    found = stages.before(layer, weights, parts, x_BTD, ctx, cache)
    if not layer.routed:
      return found[0], found[1]
    h_BTD, written, u_ND, expert_NK, weight_NK = found
    y_AD = jnp.zeros((expert_NK.size, u_ND.shape[-1]), u_ND.dtype)
    tokens = tokens_of(np.asarray(expert_NK), layer.config.moe.num_experts)
    if isinstance(self.store, Slots):
      self._expect(self.store, layer, tokens, h_BTD, ctx, cache is not None)
    with contextlib.closing(self.store.take(place, in_order(tokens, self._given.order))) as loans:
      for loan in loans:
        y_AD, loan.fence = stages.expert(layer, y_AD, u_ND, loan.weights, *tokens[loan.expert])
    return stages.after(layer, weights, parts, h_BTD, u_ND, y_AD, expert_NK, weight_NK, ctx), written

  def encode(self, batch: Any) -> jax.Array:
    """The encoder's output [B, S, D]."""
    with self.pace['encoder'].counting(batch['encoder_input_tokens']):
      x_BSD, ctx = self.stages.encoder_input(self.weights.rest, batch)
      for given in self._layers('encoder'):
        x_BSD, _ = self._layer(*given, x_BSD, ctx)
      return jax.block_until_ready(self.stages.encoder_output(self.weights.rest, x_BSD, ctx))

  def logits(self, batch: Any) -> jax.Array:
    """The logits [B, T, V] where all targets are known."""
    x_BTD, ctx = self.stages.decoder_input(self.weights.rest, batch, self.encode(batch))
    for given in self._layers('decoder'):
      x_BTD, _ = self._layer(*given, x_BTD, ctx)
    return self.stages.decoder_output(self.weights.rest, x_BTD, ctx)

  def start(self, batch: Any, max_len: int) -> Any:
    """The cache of a decoder that will read up to max_len tokens; leaves are [1, B, ...]."""
    encoded, row = self.encode(batch), row_of(batch)
    layers = tuple(self.stages.cross_cache(layer, weights, parts, encoded, row, max_len)
                   for layer, _, weights, parts in self._layers('decoder'))
    tokens, segments = batch['encoder_input_tokens'], batch.get('encoder_segment_ids')
    valid = np.ones(tokens.shape, bool) if segments is None else np.asarray(segments) != 0
    return {'layers': layers, 'encoder_valid': jnp.asarray(valid)[None],
            'row': {name: jnp.asarray(values_B)[None] for name, values_B in row.items()}}

  def step(self, cache: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Any]:
    """Reads tokens at the given positions of each row: logits [B, T, V] after each of them, and the cache."""
    with self.pace['decoder'].counting(tokens_BT):
      x_BTD, ctx = self.stages.step_input(self.weights.rest, cache, tokens_BT, positions_BT)
      layers = []
      for given, own in zip(self._layers('decoder'), cache['layers'], strict=True):
        x_BTD, written = self._layer(*given, x_BTD, ctx, own)
        layers.append(own | written)
      logits_BTV = jax.block_until_ready(self.stages.decoder_output(self.weights.rest, x_BTD, ctx))
    return logits_BTV, cache | {'layers': tuple(layers)}
