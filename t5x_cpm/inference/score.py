"""The log-likelihood of given targets, and choices ranked by it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def token_log_probs(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """The log-probability of each target given what precedes it: [B, T], in at least float32."""
  logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def row_log_probs(logits_BTV: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """The log-likelihood of each row's targets.

  Args:
    logits_BTV: the model's output for the batch.
    batch: from `teacher_forced`: decoder_target_tokens [B, T], and decoder_loss_weights [B, T], where 0 does not count.

  Returns:
    Sums of log-probabilities [B], and how many targets were counted [B].
  """
  log_prob_BT = token_log_probs(logits_BTV, batch['decoder_target_tokens'])
  counted_BT = batch['decoder_loss_weights'] != 0
  return jnp.where(counted_BT, log_prob_BT, 0).sum(-1), counted_BT.sum(-1)


def pad(rows: Sequence[Sequence[int]], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
  """Lists of tokens as an array, int32 [B, length], filled on the right; and int32 [B, length], 1 where there is a token."""
  tokens = np.full((len(rows), length), fill, np.int32)
  segments = np.zeros((len(rows), length), np.int32)
  for row, ids in enumerate(rows):
    tokens[row, :len(ids)] = ids
    segments[row, :len(ids)] = 1
  return tokens, segments


def teacher_forced(batch: dict[str, np.ndarray], prefixes: Sequence[Sequence[int]], targets: Sequence[Sequence[int]],
                   length: int, fill: int) -> dict[str, np.ndarray]:
  """Adds the decoder's features for given targets to an encoder batch.

  Args:
    batch: the encoder's features.
    prefixes: tokens that the decoder of each row reads before its targets, at least one. They are not counted.
    targets: the tokens of each row.
    length: slots, at least len(prefix) - 1 + len(target) of the longest row.
    fill: padding.
  """
  read = [[*prefix, *ids][:-1] for prefix, ids in zip(prefixes, targets, strict=True)]
  inputs, segments = pad(read, length, fill)
  tokens, _ = pad([[*prefix[1:], *ids] for prefix, ids in zip(prefixes, targets, strict=True)], length, fill)
  weights = segments.astype(np.float32)
  for row, prefix in enumerate(prefixes):
    weights[row, :len(prefix) - 1] = 0.0
  return batch | {'decoder_input_tokens': inputs, 'decoder_target_tokens': tokens, 'decoder_segment_ids': segments,
                  'decoder_loss_weights': weights}


def best_choice(scores: Sequence[float], lengths: Sequence[int] | None = None) -> int:
  """The index of the most likely choice; where `lengths` are given, of the one with the highest mean log-probability."""
  values = np.asarray(scores, np.float64)
  return int(np.argmax(values if lengths is None else values / np.maximum(np.asarray(lengths), 1)))
