"""Multi-head attention: over a whole sequence, over an encoder's output, and one step at a time over a cache.

Kernels are two-dimensional, [embed, heads * head_dim]. Scores are not divided by sqrt(head_dim) (T5 and CPM-2 fold that
into the initialisation). Softmax runs in at least float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_cpm.config import ModelConfig
from t5x_cpm.mesh import shard
from t5x_cpm.models.hooks import Hook, Prefix, nothing
from t5x_cpm.models.layers import at_least_float32, dropout, normal
from t5x_cpm.models.products import dense, for_rows

# Added to the score of a key that must not be seen. It is finite so that a row that sees nothing (padding) gives finite values,
# which are never read.
MASKED = -1e9

Cache = dict[str, Any]


def segment_mask(query_segments_BT: jax.Array, key_segments_BS: jax.Array, *, causal: bool = False) -> jax.Array:
  """[B, 1, T, S] bool: a token sees the tokens of its own segment; segment 0 is padding and sees nothing."""
  mask = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
  mask &= key_segments_BS[:, None, :] != 0
  if causal:
    T, S = mask.shape[1:]
    mask &= jnp.tril(jnp.ones((T, S), bool))
  return mask[:, None]


def additive_mask(mask: jax.Array, dtype: Any) -> jax.Array:
  """0 where a key may be seen and MASKED elsewhere."""
  return jnp.where(mask, 0.0, MASKED).astype(dtype)


class Attention(nnx.Module):
  """Query, key, value and output projections without bias vectors."""

  def __init__(self, config: ModelConfig, num_layers: int, rngs: nnx.Rngs):
    self.num_heads, self.dropout_rate = config.num_heads, config.dropout_rate
    d, hk = config.d_model, config.num_heads * config.head_dim
    if config.initializer == 'cpm2':
      query_std = std = config.init_std
      output_std = config.init_std / math.sqrt(2 * num_layers)
    else:  # T5 leaves scores unscaled and folds 1/sqrt(head_dim) into the initial query kernel
      std = d**-0.5
      query_std, output_std = std * config.head_dim**-0.5, hk**-0.5
    self.query = normal(rngs, (d, hk), query_std, ('embed', 'heads'), config)
    self.key = normal(rngs, (d, hk), std, ('embed', 'heads'), config)
    self.value = normal(rngs, (d, hk), std, ('embed', 'heads'), config)
    self.output = normal(rngs, (hk, d), output_std, ('heads', 'embed'), config)

  def _heads(self, x_BTD: jax.Array, name: str, hook: Hook) -> jax.Array:
    y = hook(name, x_BTD, dense(x_BTD, getattr(self, name)[...]))
    return y.reshape(*y.shape[:-1], self.num_heads, -1)

  def _prefix(self, x_nPN: jax.Array, dtype: Any) -> jax.Array:
    n, P, _ = x_nPN.shape
    return jnp.swapaxes(x_nPN.astype(dtype).reshape(n, P, self.num_heads, -1), 1, 2)

  def keys_and_values(self, x_BSD: jax.Array, hook: Hook = nothing) -> tuple[jax.Array, jax.Array]:
    """[B, S, D] -> keys and values [B, H, S, K]: heads first, the order in which a decoding step reads its cache."""
    k_BSHK, v_BSHK = self._heads(x_BSD, 'key', hook), self._heads(x_BSD, 'value', hook)
    return jnp.swapaxes(k_BSHK, 1, 2), jnp.swapaxes(v_BSHK, 1, 2)

  def __call__(self, x_BTD: jax.Array, keys_and_values: tuple[jax.Array, jax.Array], bias: jax.Array | None,
               mask: jax.Array, key: jax.Array | None = None, hook: Hook = nothing,
               prefix: Prefix | None = None) -> jax.Array:
    """Attends from x to the given keys and values.

    Args:
      x_BTD: the input of the queries.
      keys_and_values: [B, H, S, K] each.
      bias: of relative positions, [H, T, S] or [B, H, T, S]; None in cross-attention.
      mask: additive, broadcastable to [B, H, T, S].
      key: for the dropout of the probabilities.
      hook: what a delta does with each product, by its name here.
      prefix: keys and values of a delta that every query of a row sees, without a bias; None: there are none.

    Returns:
      [B, T, D].
    """
    k_BHSK, v_BHSK = keys_and_values
    q_BTHK = self._heads(x_BTD, 'query', hook)
    q_BTHK = shard(q_BTHK, 'batch', 'length', 'heads', None)
    B, T = x_BTD.shape[:2]
    wide = at_least_float32(x_BTD.dtype)
    scores_BHTS = jnp.einsum('BTHK,BHSK->BHTS', q_BTHK, k_BHSK, preferred_element_type=wide) + mask
    if bias is not None:
      scores_BHTS += bias if bias.ndim == 4 else for_rows(bias, B)
    if prefix is not None:
      # Scores are joined, and not keys and values: those of a cache would be copied for every token.
      prefix_k_nHPK, prefix_v_nHPK = (self._prefix(x, q_BTHK.dtype) for x in (prefix.keys, prefix.values))
      prefix_BHTP = jnp.einsum('BTHK,BHPK->BHTP', q_BTHK, prefix_k_nHPK, preferred_element_type=wide)
      if prefix.mask is not None:
        prefix_BHTP += additive_mask(prefix.mask[:, None, None], wide)
      scores_BHTS = jnp.concatenate([prefix_BHTP, scores_BHTS], axis=-1)
    weights_BHTS = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(axis=-1, keepdims=True)))
    dropped_BHTS = dropout(weights_BHTS.astype(x_BTD.dtype), self.dropout_rate, key)
    if prefix is None:
      y_BHTK = jnp.einsum('BHTS,BHSK->BHTK', dropped_BHTS, v_BHSK, preferred_element_type=wide)
    else:
      P = prefix_v_nHPK.shape[2]
      y_BHTK = jnp.einsum('BHTP,BHPK->BHTK', dropped_BHTS[..., :P], prefix_v_nHPK, preferred_element_type=wide)
      y_BHTK += jnp.einsum('BHTS,BHSK->BHTK', dropped_BHTS[..., P:], v_BHSK, preferred_element_type=wide)
    y_BHTK /= weights_BHTS.sum(axis=-1, keepdims=True)  # of the weights before dropout; this divides [T, K] numbers, not [T, S]
    y_BTHK = jnp.swapaxes(y_BHTK, 1, 2).astype(x_BTD.dtype)
    y_BTN = y_BTHK.reshape(B, T, -1)
    return hook('output', y_BTN, dense(y_BTN, self.output[...]))


def write(cache_BHSK: jax.Array, new_BHTK: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Writes each row's new entries to the cache at that row's positions."""
  rows = jnp.arange(cache_BHSK.shape[0])[:, None, None]
  heads = jnp.arange(cache_BHSK.shape[1])[:, None]
  return cache_BHSK.at[rows, heads, positions_BT[:, None, :]].set(
      new_BHTK.astype(cache_BHSK.dtype), mode='drop', unique_indices=True)


def take(cache: Cache, rows: jax.Array) -> Cache:
  """The cache of the given rows of the batch, in that order, for beam search. Axis 1 of every leaf is the batch."""
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=1), cache)


def reorder(cache: Cache, rows: jax.Array) -> Cache:
  """`take` for rows that are exchanged for rows with the same input: what was computed from the input stays in place."""
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.take(leaf, rows, axis=1) if path[-1].key in ('self_key', 'self_value') else leaf, cache)
