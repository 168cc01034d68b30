"""The log-likelihood of given targets, and choices ranked by it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def token_log_probs(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """log p of each target given what precedes it: [B, T], in at least float32."""
  logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def targets_log_prob(model: Any, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """The log-likelihood of each row's targets, all known (teacher forcing).

  Args:
    model: has ``apply(params, batch) -> (logits_BTV, ...)``.
    params: of the model.
    batch: features of an evaluation batch without packing: decoder_target_tokens [B, T]; 0 in decoder_segment_ids is
      padding, which does not count.

  Returns:
    Sums of log-probabilities [B] and the number of targets [B].
  """
  log_prob_BT = token_log_probs(model.apply(params, batch)[0], batch['decoder_target_tokens'])
  counted_BT = batch['decoder_segment_ids'] != 0
  return jnp.where(counted_BT, log_prob_BT, 0).sum(-1), counted_BT.sum(-1)


def pad(rows: Sequence[Sequence[int]], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
  """Lists of tokens -> int32 [B, length] filled on the right, and int32 [B, length], 1 where there is a token."""
  tokens = np.full((len(rows), length), fill, np.int32)
  segments = np.zeros((len(rows), length), np.int32)
  for row, ids in enumerate(rows):
    tokens[row, :len(ids)] = ids
    segments[row, :len(ids)] = 1
  return tokens, segments


def teacher_forced(batch: dict[str, np.ndarray], targets: Sequence[Sequence[int]], length: int, start: int,
                   fill: int) -> dict[str, np.ndarray]:
  """Adds the decoder features for given targets to an encoder batch.

  Args:
    batch: encoder features.
    targets: tokens of each row.
    length: slots, at least as many as the longest row.
    start: what the decoder starts from.
    fill: padding.
  """
  tokens, segments = pad(targets, length, fill)
  inputs, _ = pad([[start, *ids[:-1]] if ids else [] for ids in targets], length, fill)
  return batch | {'decoder_input_tokens': inputs, 'decoder_target_tokens': tokens, 'decoder_segment_ids': segments}


def best_choice(scores: Sequence[float], lengths: Sequence[int] | None = None) -> int:
  """The index of the most likely choice; with lengths (tokens of each) the one of the highest mean log-probability."""
  values = np.asarray(scores, np.float64)
  return int(np.argmax(values if lengths is None else values / np.maximum(np.asarray(lengths), 1)))
