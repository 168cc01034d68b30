"""Balanced assignment of tokens to experts: every expert gets the same number, and the sum of scores is as large as can be.

BASE layers (Lewis et al. 2021) and CPM-2 solve this linear assignment by an auction, in which equal tokens all change their
minds at once; and tokens of text do repeat. Here experts have prices, a token wants the expert where score minus price is
greatest, and the prices come from a softened market: by the softmax of these values over a falling temperature, a token wants a
little of every expert, so that equal tokens are shared (Kosowsky and Yuille 1994; each step is one of Sinkhorn's). Then tokens
are placed where they want to go, as far as there is room, and two or three experts exchange tokens as long as that helps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# In units of the standard deviation of a token's scores.
TEMPERATURES = np.geomspace(0.3, 0.003, 80)
NOISE = 0.001  # parts tokens that want the same
LEAST_GAIN = 1e-4  # for which experts exchange tokens
MAX_EXCHANGES = 100
MOST_EXPERTS = 64  # of which every three are tried: E^3 numbers


def _prices(scores_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """Prices [E] at which every expert is wanted about as often as any other."""
  fair = jnp.log(jnp.maximum(valid_T.sum(), 1) / scores_TE.shape[-1])

  def step(prices_E: jax.Array, temperature: jax.Array) -> tuple[jax.Array, None]:
    wish_TE = jax.nn.log_softmax((scores_TE - prices_E) / temperature, axis=-1)
    wanted_E = jax.nn.logsumexp(jnp.where(valid_T[:, None], wish_TE, -jnp.inf), axis=0)
    return prices_E + temperature * (wanted_E - fair), None

  temperatures = jnp.asarray(TEMPERATURES, scores_TE.dtype)
  return jax.lax.scan(step, jnp.zeros(scores_TE.shape[-1], scores_TE.dtype), temperatures)[0]


def _placed(value_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """An expert [T] for each valid token, E for the others: the one of greatest value that has a place.

  In every round the tokens without a place ask the best expert that has room, and the expert takes those that would lose most
  by going elsewhere. A round fills an expert or is the last, so that there are at most E.
  """
  T, E = value_TE.shape
  fair, more = valid_T.sum() // E, valid_T.sum() % E  # `more` experts take one token more: those that most tokens want
  wanted_E = jnp.zeros(E, jnp.int32).at[jnp.argmax(value_TE, axis=-1)].add(valid_T.astype(jnp.int32))
  room_E = fair + (jnp.argsort(jnp.argsort(-wanted_E)) < more)

  def a_round(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    expert_T, room_E = carry
    open_TE = jnp.where(room_E > 0, value_TE, -jnp.inf)
    best_T = jnp.argmax(open_TE, axis=-1).astype(jnp.int32)
    asks_TE = (jnp.arange(E) == best_T[:, None]) & (valid_T & (expert_T == E))[:, None]
    loss_T = jnp.max(open_TE, axis=-1) - jnp.max(jnp.where(asks_TE, -jnp.inf, open_TE), axis=-1)
    rank_TE = jnp.argsort(jnp.argsort(jnp.where(asks_TE, -loss_T[:, None], jnp.inf), axis=0), axis=0)
    takes_TE = asks_TE & (rank_TE < room_E)
    return jnp.where(takes_TE.any(axis=-1), best_T, expert_T), room_E - takes_TE.sum(axis=0, dtype=jnp.int32)

  start = jnp.full(T, E, jnp.int32), room_E.astype(jnp.int32)
  return jax.lax.while_loop(lambda carry: (valid_T & (carry[0] == E)).any(), a_round, start)[0]


def _pairs(least_EE: jax.Array) -> jax.Array:
  """Where one token of each expert goes, so that the sum of scores grows: an expert [E] for each, itself where none goes.

  Experts that are each other's best partner exchange tokens, all such pairs at once.

  Args:
    least_EE: what it costs to move a token from one expert to another, at least; inf from an expert to itself.
  """
  stay_E, pair_EE = jnp.arange(least_EE.shape[0], dtype=jnp.int32), least_EE + least_EE.T
  partner_E = jnp.argmin(pair_EE, axis=-1).astype(jnp.int32)
  return jnp.where((partner_E[partner_E] == stay_E) & (jnp.min(pair_EE, axis=-1) < -LEAST_GAIN), partner_E, stay_E)


def _pairs_or_three(least_EE: jax.Array) -> jax.Array:
  """As `_pairs`; where no pair gains, the three experts that gain most pass tokens round."""
  E = least_EE.shape[0]
  stay_E, pairs_E = jnp.arange(E, dtype=jnp.int32), _pairs(least_EE)

  cost_EEE = least_EE[:, :, None] + least_EE[None, :, :] + least_EE.T[:, None, :]  # from one to another, to a third, and back
  a, b, c = jnp.unravel_index(jnp.argmin(cost_EEE), cost_EEE.shape)
  three_E = jnp.where(cost_EEE[a, b, c] < -LEAST_GAIN, stay_E.at[a].set(b).at[b].set(c).at[c].set(a), stay_E)
  return jnp.where((pairs_E != stay_E).any(), pairs_E, three_E)


Rule = Callable[[jax.Array], jax.Array]


def _exchanged(scores_TE: jax.Array, expert_T: jax.Array, valid_T: jax.Array, rule: Rule) -> jax.Array:
  """The experts of all tokens after experts have exchanged tokens by a rule as long as that helps."""
  T, E = scores_TE.shape

  def exchange(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    here_T, _, count = carry
    loss_TE = jnp.take_along_axis(scores_TE, here_T[:, None], axis=-1) - scores_TE
    loss_TE = jnp.where(valid_T[:, None] & (here_T[:, None] != jnp.arange(E)), loss_TE, jnp.inf)
    least_EE = jnp.full((E, E), jnp.inf, loss_TE.dtype).at[here_T].min(loss_TE)
    there_E = rule(least_EE)
    there_T = there_E[here_T]
    loss_T = jnp.take_along_axis(loss_TE, there_T[:, None], axis=-1)[:, 0]
    could_T = (there_T != here_T) & (loss_T <= least_EE[here_T, there_T])
    first_E = jnp.full(E, T).at[here_T].min(jnp.where(could_T, jnp.arange(T), T))
    return jnp.where(jnp.arange(T) == first_E[here_T], there_T, here_T), (there_E != jnp.arange(E)).any(), count + 1

  start = jnp.minimum(expert_T, E - 1), jnp.bool_(True), jnp.int32(0)  # an index even for padding, which never moves
  here_T, _, _ = jax.lax.while_loop(lambda carry: carry[1] & (carry[2] < MAX_EXCHANGES), exchange, start)
  return jnp.where(valid_T, here_T, E)


def balanced(scores_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """Assigns every valid token to one expert, floor or ceiling of valid / E tokens to each.

  Args:
    scores_TE: of token t at expert e; what is not finite counts as the least score (as in the released CPM-2 code).
    valid_T: bool; the others are assigned to no expert.

  Returns:
    The expert of each token [T] int32, E where it is not valid. The sum of scores is within 0.5 % of the optimum
    (scipy.optimize.linear_sum_assignment), counted from an assignment at random: tested on tokens of every kind from all
    different to all the same.
  """
  scores_TE = scores_TE.astype(jnp.promote_types(scores_TE.dtype, jnp.float32))
  usable_TE = valid_T[:, None] & jnp.isfinite(scores_TE)
  least = jnp.min(jnp.where(usable_TE, scores_TE, jnp.inf), initial=jnp.inf)
  scores_TE = jnp.where(usable_TE, scores_TE - least, 0.0)
  scores_TE -= scores_TE.mean(axis=-1, keepdims=True)
  deviation = jnp.sqrt(jnp.square(scores_TE).sum() / jnp.maximum(valid_T.sum() * scores_TE.shape[-1], 1))
  scores_TE /= jnp.where(deviation > 0, deviation, 1.0)
  noise_TE = NOISE * jax.random.gumbel(jax.random.key(0), scores_TE.shape, scores_TE.dtype)
  expert_T = _placed(scores_TE - _prices(scores_TE, valid_T) + noise_TE, valid_T)
  for rule in (_pairs, _pairs_or_three) if scores_TE.shape[-1] <= MOST_EXPERTS else (_pairs,):
    expert_T = _exchanged(scores_TE, expert_T, valid_T, rule)
  return expert_T.astype(jnp.int32)
