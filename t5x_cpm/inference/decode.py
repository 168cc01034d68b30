"""Decoding rules, and the two loops that drive them. Nothing here knows a model or a vocabulary.

A rule is a frozen dataclass (so that jit can take it as a static argument) with pure methods: ``init`` makes the state,
``advance(state, logits_NV)`` chooses one token for every row, and ``result(state)`` reads the answer. There are N = B * width
rows: a beam rule keeps ``width`` hypotheses of each of the B inputs side by side, the other rules keep one.

The loops call ``step(cache, tokens_NT, positions_NT) -> (logits_NTV, cache)`` and, for beams, ``take(cache, rows_N)``.
`while_loop` runs inside jit and ends when the last row is done. `python_loop` yields after every token: for streaming, and for
models whose step cannot be one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Cache = Any
Step = Callable[[Cache, jax.Array, jax.Array], tuple[jax.Array, Cache]]
Take = Callable[[Cache, jax.Array], Cache]

# Stands for "no hypothesis": low enough to lose against every real sum of log-probabilities, and finite, so that sums and
# quotients with it stay ordered.
_NONE = -1.0e9


class Output(NamedTuple):
  """What was generated. The stop token, where there is one, is included and counted; padding follows it."""

  tokens: jax.Array  # [B, T] int32
  length: jax.Array  # [B] int32
  score: jax.Array  # [B] float32: sum of log-probabilities; with beams divided by length ** length_penalty


class State(NamedTuple):
  """State of the rules that keep one hypothesis per input. The first five fields are what the loops read."""

  step: jax.Array  # int32 scalar: tokens chosen so far
  next: jax.Array  # [N] int32: the tokens just chosen, to be fed next
  rows: jax.Array | None  # [N] int32: the row of the cache that each of them continues; None: its own
  done: jax.Array  # [B] bool
  tokens: jax.Array  # [N, T]
  stop: jax.Array  # [B, E]
  allowed: jax.Array | None
  length: jax.Array  # [B]
  score: jax.Array  # [B]
  key: jax.Array | None  # [B]


class BeamState(NamedTuple):
  """State of `Beam`: the K open hypotheses of each input and a pool of its K best finished ones."""

  step: jax.Array
  next: jax.Array  # [N]
  rows: jax.Array | None  # [N]
  done: jax.Array  # [B]
  tokens: jax.Array  # [N, T]
  stop: jax.Array  # [B, E]
  allowed: jax.Array | None
  open: jax.Array  # [B, K] sums of log-probabilities, best first
  pool_tokens: jax.Array  # [B, K, T]
  pool_length: jax.Array  # [B, K]
  pool_score: jax.Array  # [B, K] penalised, best first; _NONE where there is no finished hypothesis


class Rule(Protocol):
  """What the loops need from a rule."""

  @property
  def width(self) -> int: ...

  @property
  def max_new_tokens(self) -> int: ...

  def init(self, stop_BE: jax.Array, *, seed: Any = 0, rows_B: jax.Array | None = None,
           allowed: jax.Array | None = None) -> Any: ...

  def advance(self, state: Any, logits_NV: jax.Array) -> Any: ...

  def result(self, state: Any) -> Output: ...


def _mask(logits_NV: jax.Array, allowed: jax.Array | None) -> jax.Array:
  """Puts minus infinity where a token must not be chosen; `allowed` is bool [V] or [N, V]."""
  return logits_NV if allowed is None else jnp.where(allowed, logits_NV, -jnp.inf)


def _largest(logits_NV: jax.Array) -> jax.Array:
  """argmax over the last axis, the first index among equals.

  XLA vectorises these two plain reductions on CPU, but not `jnp.argmax`, a reduction over pairs (value, index).
  """
  ids_V = jnp.arange(logits_NV.shape[-1], dtype=jnp.int32)
  return jnp.min(jnp.where(logits_NV == logits_NV.max(-1, keepdims=True), ids_V, ids_V.size - 1), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
  """The most probable token at every step.

  Attributes:
    max_new_tokens: T, the size of the output.
    pad_id: what fills the output after the stop token.
  """

  max_new_tokens: int
  pad_id: int = 0
  width = 1

  def init(self, stop_BE: jax.Array, *, seed: Any = 0, rows_B: jax.Array | None = None,
           allowed: jax.Array | None = None) -> State:
    """The state before the first token.

    Args:
      stop_BE: int32, tokens that end a row; -1 fills the rows that have fewer of them.
      seed: for rules that draw random numbers.
      rows_B: int32, a number for each row on which its draws depend; default 0, 1, ...
      allowed: bool [V] or [B, V], the tokens that may be chosen; None allows all. Scores remain those of the model over its
        whole vocabulary.
    """
    B = stop_BE.shape[0]
    return State(
        step=jnp.int32(0), next=jnp.full(B, self.pad_id, jnp.int32), rows=None, done=jnp.zeros(B, bool),
        tokens=jnp.full((B, self.max_new_tokens), self.pad_id, jnp.int32), stop=stop_BE, allowed=allowed,
        length=jnp.zeros(B, jnp.int32), score=jnp.zeros(B, jnp.float32), key=self._keys(B, seed, rows_B))

  def _keys(self, B: int, seed: Any, rows_B: jax.Array | None) -> jax.Array | None:
    return None

  def _choose(self, state: State, logits_NV: jax.Array) -> jax.Array:
    return _largest(logits_NV)

  def advance(self, state: State, logits_NV: jax.Array) -> State:
    """Chooses the next token of every row; rows that are done get padding."""
    logits_NV = logits_NV.astype(jnp.float32)
    token_B = self._choose(state, _mask(logits_NV, state.allowed))
    log_prob_B = jnp.take_along_axis(logits_NV, token_B[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_NV, axis=-1)
    token_B = jnp.where(state.done, self.pad_id, token_B)
    stopped_B = (token_B[:, None] == state.stop).any(-1)
    step = state.step + 1
    return state._replace(
        step=step, next=token_B,
        tokens=lax.dynamic_update_slice(state.tokens, token_B[:, None], (jnp.int32(0), state.step)),
        length=jnp.where(state.done, state.length, step),
        score=state.score + jnp.where(state.done, 0.0, log_prob_B),
        done=state.done | stopped_B | (step >= self.max_new_tokens))

  def result(self, state: State) -> Output:
    return Output(state.tokens, state.length, state.score)


def _keep(log_prob_NV: jax.Array, weight_NV: jax.Array, target: float) -> jax.Array:
  """Keeps the most probable tokens whose weights sum to at least `target`; the others become minus infinity.

  The threshold is the largest probability such that the tokens from it upward weigh enough. It is found by bisection over the
  bits of the probabilities, because floats >= 0 have the order of their bits: as exact as a sort, in 31 passes over the row.
  Tokens as probable as the last one needed are kept too.
  """
  bits_NV = lax.bitcast_convert_type(jnp.exp(log_prob_NV).astype(jnp.float32), jnp.int32)

  def halve(_, bounds):
    low_N1, high_N1 = bounds
    middle_N1 = low_N1 + (high_N1 - low_N1 + 1) // 2
    enough_N1 = jnp.where(bits_NV >= middle_N1, weight_NV, 0.0).sum(-1, keepdims=True) >= target
    return jnp.where(enough_N1, middle_N1, low_N1), jnp.where(enough_N1, high_N1, middle_N1 - 1)

  low_N1 = jnp.zeros_like(bits_NV[:, :1])
  threshold_N1, _ = lax.fori_loop(0, 31, halve, (low_N1, low_N1 + lax.bitcast_convert_type(jnp.float32(1), jnp.int32)))
  return jnp.where(bits_NV >= threshold_N1, log_prob_NV, -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Greedy):
  """A draw from softmax(logits / temperature), cut to the top_k most probable tokens, then to the fewest that reach top_p.

  Every row draws with a key of its own, made of seed, row and step, so its result does not depend on the rest of the batch.

  Attributes:
    temperature: above 0.
    top_k: 0 cuts nothing.
    top_p: 1 cuts nothing (nucleus sampling, Holtzman et al. 2020).
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def _keys(self, B: int, seed: Any, rows_B: jax.Array | None) -> jax.Array | None:
    rows_B = jnp.arange(B) if rows_B is None else rows_B
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows_B)

  def _choose(self, state: State, logits_NV: jax.Array) -> jax.Array:
    log_prob_NV = jax.nn.log_softmax(logits_NV / self.temperature)
    if self.top_k:
      log_prob_NV = jax.nn.log_softmax(_keep(log_prob_NV, jnp.ones_like(log_prob_NV), self.top_k))
    if self.top_p < 1.0:
      log_prob_NV = _keep(log_prob_NV, jnp.exp(log_prob_NV), self.top_p)
    assert state.key is not None
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key, state.step)
    noise_NV = jax.vmap(lambda key: jax.random.gumbel(key, logits_NV.shape[-1:], jnp.float32))(key_B)
    return _largest(log_prob_NV + noise_NV)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
  """Beam search with a pool of finished hypotheses, the search of transformers' ``generate(num_beams=K, do_sample=False)``.

  At every step the (1 + stop tokens) * K best continuations of the K open hypotheses are ranked by their sum of
  log-probabilities. Those among the first K that end in a stop token (at the last step: all of the first K) enter the pool
  with the score sum / length ** length_penalty, where length counts every generated token, the stop token included and the
  decoder's start token not; the pool keeps the K best. The K best that do not end stay open. Once its pool is full, a row is
  done: with early_stopping at once, without it as soon as the best open hypothesis, scored at its present length, would not
  beat the worst one of the pool. Tokens and scores equal those of transformers 5.23 with the same ``early_stopping`` and
  ``max_new_tokens``, except for ties, and for what fills the output after the stop token.

  Attributes:
    width: K.
    max_new_tokens, pad_id: as in `Greedy`.
    length_penalty: a value above 0 prefers long answers, because the sums are negative; 0 ranks by the sum.
    early_stopping: whether a row is done as soon as its pool is full.
  """

  max_new_tokens: int
  pad_id: int = 0
  width: int = 4
  length_penalty: float = 1.0
  early_stopping: bool = False

  def init(self, stop_BE: jax.Array, *, seed: Any = 0, rows_B: jax.Array | None = None,
           allowed: jax.Array | None = None) -> BeamState:
    """The state before the first token; arguments as in `Greedy.init`. Of the K hypotheses only the first is real."""
    B, K, T = stop_BE.shape[0], self.width, self.max_new_tokens
    none_BK = jnp.full((B, K), _NONE, jnp.float32)
    return BeamState(
        step=jnp.int32(0), next=jnp.full(B * K, self.pad_id, jnp.int32), rows=jnp.arange(B * K, dtype=jnp.int32),
        done=jnp.zeros(B, bool), tokens=jnp.full((B * K, T), self.pad_id, jnp.int32), stop=stop_BE, allowed=allowed,
        open=none_BK.at[:, 0].set(0.0), pool_tokens=jnp.full((B, K, T), self.pad_id, jnp.int32),
        pool_length=jnp.zeros((B, K), jnp.int32), pool_score=none_BK)

  def advance(self, state: BeamState, logits_NV: jax.Array) -> BeamState:
    """Extends every open hypothesis by one token; rows that are done keep their pool."""
    logits_NV = logits_NV.astype(jnp.float32)
    K, T, (N, V) = self.width, self.max_new_tokens, logits_NV.shape
    B, E = state.stop.shape
    step = state.step + 1
    allowed = state.allowed if state.allowed is None or state.allowed.ndim == 1 else jnp.repeat(state.allowed, K, axis=0)
    base_N = state.open.reshape(N) - jax.nn.logsumexp(logits_NV, axis=-1)
    sum_BX = (_mask(logits_NV, allowed) + base_N[:, None]).reshape(B, K * V)
    C = min(max(2, 1 + E) * K, K * V)
    sum_BC, index_BC = lax.top_k(sum_BX, C)
    parent_BC, token_BC = index_BC // V, index_BC % V
    tokens_BCT = jnp.take_along_axis(state.tokens.reshape(B, K, T), parent_BC[:, :, None], axis=1)
    tokens_BCT = lax.dynamic_update_slice(tokens_BCT, token_BC[:, :, None], (jnp.int32(0), jnp.int32(0), state.step))
    ends_BC = (token_BC[:, :, None] == state.stop[:, None, :]).any(-1) | (step >= T)

    # Into the pool: what ended, is real, and ranked among the first K.
    enters_BC = ends_BC & (jnp.arange(C) < K) & (sum_BC > _NONE / 2) & ~state.done[:, None]
    score_BC = jnp.where(enters_BC, sum_BC / step.astype(jnp.float32) ** self.length_penalty, _NONE)
    pool_score_BK, kept_BK = lax.top_k(jnp.concatenate([state.pool_score, score_BC], axis=1), K)
    all_tokens = jnp.concatenate([state.pool_tokens, tokens_BCT], axis=1)
    all_lengths = jnp.concatenate([state.pool_length, jnp.broadcast_to(step, (B, C))], axis=1)

    # The best K of the others stay open.
    open_BK, chosen_BK = lax.top_k(jnp.where(ends_BC, sum_BC + _NONE, sum_BC), K)
    pick = functools.partial(jnp.take_along_axis, indices=chosen_BK, axis=1)
    full_B = (pool_score_BK > _NONE / 2).all(-1)
    better_B = open_BK[:, 0] / step.astype(jnp.float32) ** self.length_penalty > pool_score_BK[:, -1]
    settled_B = full_B if self.early_stopping else full_B & ~better_B
    return state._replace(
        step=step, next=pick(token_BC).reshape(N),
        rows=(pick(parent_BC) + K * jnp.arange(B, dtype=jnp.int32)[:, None]).reshape(N),
        done=state.done | settled_B | (step >= T),
        tokens=jnp.take_along_axis(tokens_BCT, chosen_BK[:, :, None], axis=1).reshape(N, T), open=open_BK,
        pool_tokens=jnp.take_along_axis(all_tokens, kept_BK[:, :, None], axis=1),
        pool_length=jnp.take_along_axis(all_lengths, kept_BK, axis=1), pool_score=pool_score_BK)

  def result(self, state: BeamState) -> Output:
    tokens_BT, length_B = state.pool_tokens[:, 0], state.pool_length[:, 0]
    return Output(tokens_BT, length_B, state.pool_score[:, 0])


def make_rule(config: Any, pad_id: int) -> Greedy | Sample | Beam:
  """The rule that a DecodeConfig names.

  Args:
    config: a `t5x_cpm.config.DecodeConfig`.
    pad_id: what fills outputs after their stop token.
  """
  common = {'max_new_tokens': config.max_new_tokens, 'pad_id': pad_id}
  if config.rule == 'sample':
    return Sample(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, **common)
  if config.rule == 'beam':
    return Beam(width=config.beam_size, length_penalty=config.length_penalty, early_stopping=config.early_stopping, **common)
  return Greedy(**common)


def _begin(step: Step, take: Take | None, cache: Cache, state: Any, prefix_BP: jax.Array,
           width: int) -> tuple[Cache, Any, jax.Array]:
  """Feeds all of the prefix but its last token in one call of `step`, and makes the last token the next one.

  Rows are padded on the right, and each goes on at its own length: what its padding has written to the cache lies at later
  positions, where causal attention does not look, and is overwritten before it does.

  Returns:
    The cache for all N rows, the state, and int32 [N], the position of each row's next token.
  """
  B, P = prefix_BP.shape
  last_B = (prefix_BP >= 0).sum(1, dtype=jnp.int32) - 1
  if P > 1:
    positions_BP = jnp.broadcast_to(jnp.arange(P - 1, dtype=jnp.int32), (B, P - 1))
    _, cache = step(cache, jnp.maximum(prefix_BP[:, :-1], 0), positions_BP)
  next_B = jnp.take_along_axis(prefix_BP, last_B[:, None], axis=1)[:, 0]
  rows_N = jnp.repeat(jnp.arange(B, dtype=jnp.int32), width)
  if width > 1:
    assert take is not None
    cache = take(cache, rows_N)
  return cache, state._replace(next=next_B[rows_N]), last_B[rows_N]


def _feed(step: Step, reorder: Take | None, cache: Cache, state: Any, first_N: jax.Array) -> tuple[jax.Array, Cache]:
  """One call of `step` with the tokens chosen last."""
  if state.rows is not None:
    assert reorder is not None
    cache = reorder(cache, state.rows)
  logits_NTV, cache = step(cache, state.next[:, None], (first_N + state.step)[:, None])
  return logits_NTV[:, 0], cache


def while_loop(step: Step, cache: Cache, rule: Rule, prefix_BP: jax.Array, stop_BE: jax.Array, *, take: Take | None = None,
               reorder: Take | None = None, seed: Any = 0, rows_B: jax.Array | None = None,
               allowed: jax.Array | None = None) -> Output:
  """Decodes to the end inside jit.

  Args:
    step: ``(cache, tokens_NT, positions_NT) -> (logits_NTV, cache)``; writes to the cache at the positions.
    cache: for B rows and P + T - 1 positions.
    rule: a `Greedy`, `Sample` or `Beam`.
    prefix_BP: int32, the tokens that the decoder reads before it writes, at least one; -1 fills shorter rows on the right.
    stop_BE, seed, rows_B, allowed: see `Greedy.init`.
    take: ``(cache, rows_N) -> cache`` of these rows; needed for beams.
    reorder: the same where every row is exchanged for one with the same input, so that what does not depend on the
      generated text may stay; default `take`.
  """
  state = rule.init(stop_BE, seed=seed, rows_B=rows_B, allowed=allowed)
  cache, state, first_N = _begin(step, take, cache, state, prefix_BP, rule.width)

  def turn(carry):
    cache, state = carry
    logits_NV, cache = _feed(step, reorder or take, cache, state, first_N)
    return cache, rule.advance(state, logits_NV)

  _, state = lax.while_loop(lambda carry: ~carry[1].done.all(), turn, (cache, state))
  return rule.result(state)


@functools.partial(jax.jit, static_argnums=0)
def _advance(rule: Any, state: Any, logits_NV: jax.Array) -> Any:
  return rule.advance(state, logits_NV)


def python_loop(step: Step, cache: Cache, rule: Rule, prefix_BP: jax.Array, stop_BE: jax.Array, *, take: Take | None = None,
                reorder: Take | None = None, seed: Any = 0, rows_B: jax.Array | None = None,
                allowed: jax.Array | None = None) -> Iterator[Any]:
  """Decodes one token at a time; yields the state after each, the last of which gives ``rule.result``.

  Arguments as in `while_loop`. `step` is called as it is: compile it, with its cache donated, where that is possible.
  """
  state = rule.init(stop_BE, seed=seed, rows_B=rows_B, allowed=allowed)
  cache, state, first_N = _begin(step, take, cache, state, prefix_BP, rule.width)
  while not bool(state.done.all()):
    logits_NV, cache = _feed(step, reorder or take, cache, state, first_N)
    state = _advance(rule, state, logits_NV)
    yield state
