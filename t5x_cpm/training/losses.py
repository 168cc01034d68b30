"""Cross entropy of large vocabularies, and accuracy, as sums and counts that add up over microbatches and processes."""

from typing import Any

import jax
import jax.numpy as jnp

Pairs = dict[str, tuple[jax.Array, jax.Array]]
Triple = tuple[jax.Array, jax.Array, jax.Array]


def _forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[Triple, Triple]:
  x_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
  max_BT = jnp.max(x_BTV, axis=-1)
  log_z_BT = max_BT + jnp.log(jnp.sum(jnp.exp(x_BTV - max_BT[..., None]), axis=-1))
  target_BT = jnp.take_along_axis(x_BTV, targets_BT[..., None], axis=-1)[..., 0]
  # An argmax over the vocabulary would cost five times the rest of this function on CPU.
  return (log_z_BT, target_BT, target_BT == max_BT), (logits_BTV, targets_BT, log_z_BT)


def _backward(residuals: Triple, cotangents: tuple[Any, ...]) -> tuple[jax.Array, None]:
  """One pass that reads the logits and writes their gradient; nothing of size [B, T, V] is kept besides the logits."""
  logits_BTV, targets_BT, log_z_BT = residuals
  d_log_z_BT, d_target_BT, _ = cotangents
  d_BTV = jnp.exp(logits_BTV.astype(log_z_BT.dtype) - log_z_BT[..., None]) * d_log_z_BT[..., None]
  is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
  d_BTV = jnp.where(is_target_BTV, d_BTV + d_target_BT[..., None], d_BTV)
  # Not a product with 0: logits at padding may be infinite, and 0 * inf would spread from there.
  unused_BT = (d_log_z_BT == 0) & (d_target_BT == 0)
  return jnp.where(unused_BT[..., None], 0, d_BTV).astype(logits_BTV.dtype), None


@jax.custom_vjp
def _log_z_and_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> Triple:
  """log(sum(exp(logits))), the target's logit, and whether no other logit is above it: each [B, T]."""
  return _forward(logits_BTV, targets_BT)[0]


_log_z_and_target.defvjp(_forward, _backward)


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0) -> tuple[jax.Array, Pairs]:
  """Weighted sums of the cross entropy and of the accuracy over the positions of a batch.

  The loss of a position is log(Z) - logit(target) + z_loss * log(Z)^2, Z being the sum of exp(logits). The second term
  keeps log(Z) near 0 (Mesh TensorFlow; Chowdhery et al. 2022, section 5). Computed in at least float32. A position of
  weight 0 contributes exactly nothing to any sum or gradient, whatever its logits are.

  Args:
    logits_BTV: floating point.
    targets_BT: integer token ids in [0, V).
    weights_BT: float; 0 at padding.
    z_loss: weight of log(Z)^2; 0 is off.

  Returns:
    The sum of the weighted losses, which is what to differentiate (divide by the sum of weights of the whole batch, over
    all microbatches and devices), and pairs (sum, sum of weights): 'loss' is the cross entropy in nats without the
    z-loss, 'accuracy' the share of positions whose target has the greatest logit (a tie counts as right), 'z_loss' the
    added term, where it is on.
  """
  log_z_BT, target_BT, correct_BT = _log_z_and_target(logits_BTV, targets_BT)
  weights_BT = weights_BT.astype(log_z_BT.dtype)
  counted_BT = weights_BT != 0

  def total(values_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(counted_BT, values_BT, 0) * weights_BT)

  # Before the arithmetic: the gradient of inf - inf at padding would be NaN even where the result is not used.
  log_z_BT, target_BT = jnp.where(counted_BT, log_z_BT, 0), jnp.where(counted_BT, target_BT, 0)
  weight = jnp.sum(weights_BT)
  loss = total(log_z_BT - target_BT)
  pairs = {'loss': (loss, weight), 'accuracy': (total(correct_BT.astype(log_z_BT.dtype)), weight)}
  if z_loss:
    extra = total(z_loss * jnp.square(log_z_BT))
    pairs['z_loss'] = (extra, weight)
    loss = loss + extra
  return loss, pairs
