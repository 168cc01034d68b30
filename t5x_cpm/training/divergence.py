"""How far a model is from its teacher: KL(teacher || model) at a temperature, over all tokens or the teacher's top K.

Both logits are divided by the temperature tau first. Everything is computed in at least float32. The gradient with respect to
the logits is one array, which a single pass over them writes; with respect to what the teacher says there is none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

LEAST = 1e-6  # of the probability that a model leaves to all tokens but K: it is a difference of numbers near 1


def _scaled(logits_BTV: jax.Array, tau: float) -> jax.Array:
  return logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32)) / tau


def _log_z(x_BTV: jax.Array) -> jax.Array:
  max_BT = jnp.max(x_BTV, axis=-1)
  return max_BT + jnp.log(jnp.sum(jnp.exp(x_BTV - max_BT[..., None]), axis=-1))


def _of_logits(logits_BTV: jax.Array, teacher_BTV: jax.Array, tau: float) -> tuple[jax.Array, Any]:
  x_BTV, y_BTV = _scaled(logits_BTV, tau), _scaled(teacher_BTV, tau)
  log_z_BT, log_w_BT = _log_z(x_BTV), _log_z(y_BTV)
  ours_BTV, theirs_BTV = x_BTV - log_z_BT[..., None], y_BTV - log_w_BT[..., None]
  return jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1), (logits_BTV, teacher_BTV, log_z_BT, log_w_BT)


def _of_logits_backward(tau: float, residuals: Any, d_BT: jax.Array) -> tuple[jax.Array, None]:
  logits_BTV, teacher_BTV, log_z_BT, log_w_BT = residuals
  ours_BTV = jnp.exp(_scaled(logits_BTV, tau) - log_z_BT[..., None])
  theirs_BTV = jnp.exp(_scaled(teacher_BTV, tau) - log_w_BT[..., None])
  # Not a product with 0: logits at padding may be infinite.
  d_BTV = jnp.where(d_BT[..., None] == 0, 0, (ours_BTV - theirs_BTV) * (d_BT[..., None] / tau))
  return d_BTV.astype(logits_BTV.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def of_logits(logits_BTV: jax.Array, teacher_BTV: jax.Array, tau: float) -> jax.Array:
  """KL(teacher || model) of each position, in nats.

  Args:
    logits_BTV: of the model.
    teacher_BTV: those of the teacher.
    tau: the temperature.

  Returns:
    [B, T].
  """
  return _of_logits(logits_BTV, teacher_BTV, tau)[0]


of_logits.defvjp(_of_logits, _of_logits_backward)


def _of_top(logits_BTV: jax.Array, ids_BTK: jax.Array, probs_BTK: jax.Array, rest_BT: jax.Array, tau: float) -> tuple[
    jax.Array, Any]:
  log_z_BT = _log_z(_scaled(logits_BTV, tau))
  ours_BTK = _scaled(jnp.take_along_axis(logits_BTV, ids_BTK, axis=-1), tau) - log_z_BT[..., None]
  left_BT = jnp.maximum(1 - jnp.sum(jnp.exp(ours_BTK), axis=-1), LEAST)

  def times_log(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """p log(p / q), 0 for p = 0."""
    return jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0)

  kl_BT = jnp.sum(times_log(probs_BTK, ours_BTK), axis=-1) + times_log(rest_BT, jnp.log(left_BT))
  return kl_BT, (logits_BTV, ids_BTK, probs_BTK, rest_BT, log_z_BT, left_BT)


def _of_top_backward(tau: float, residuals: Any, d_BT: jax.Array) -> tuple[jax.Array, None, None, None]:
  """With q the model's probabilities: q - p at the K tokens, q (1 - rest / what q leaves to the others) at the others."""
  logits_BTV, ids_BTK, probs_BTK, rest_BT, log_z_BT, left_BT = residuals
  ours_BTV = jnp.exp(_scaled(logits_BTV, tau) - log_z_BT[..., None])
  ours_BTK = jnp.take_along_axis(ours_BTV, ids_BTK, axis=-1)
  ratio_BT1 = (rest_BT / left_BT)[..., None]
  B, T, _ = ids_BTK.shape
  rows, places = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
  d_BTV = (ours_BTV * (1 - ratio_BT1)).at[rows, places, ids_BTK].add(ours_BTK * ratio_BT1 - probs_BTK)
  d_BTV = jnp.where(d_BT[..., None] == 0, 0, d_BTV * (d_BT[..., None] / tau))
  return d_BTV.astype(logits_BTV.dtype), None, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def of_top(logits_BTV: jax.Array, ids_BTK: jax.Array, probs_BTK: jax.Array, rest_BT: jax.Array, tau: float) -> jax.Array:
  """KL(teacher || model) of each position, in nats, where of the teacher only K tokens are known and all others are one.

  Args:
    logits_BTV: of the model.
    ids_BTK: different tokens.
    probs_BTK: their probabilities by the teacher, at the temperature.
    rest_BT: the probability of all other tokens together; 0 where they do not count. With probs_BTK it sums to 1.
    tau: the temperature.

  Returns:
    [B, T].
  """
  return _of_top(logits_BTV, ids_BTK, probs_BTK, rest_BT, tau)[0]


of_top.defvjp(_of_top, _of_top_backward)
