"""What a teacher adds to a step: its distributions over the targets of a batch, its share, and its part of the loss.

L = (1 - a) L_self + a tau^2 KL(teacher || student), on the positions whose loss counts (Qin et al. 2022, Knowledge Inheritance
for Pre-trained Language Models, section 3). What the teacher says of a batch stands in fields of it: `teacher_ids` and
`teacher_probs` [B, T, K], the K most probable tokens with their probabilities at the temperature tau; or `teacher_logits`
[B, T, V], where all tokens count. Either the step adds them, by a pass of the teacher, or they come with the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm.config import Config, TeacherConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import divergence, losses

Batch = dict[str, Any]


def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of the fields in which a batch brings what the teacher says of it."""
  B, T, K = config.train.batch_size, config.task.decoder_length, config.teacher.top_k
  if not K:
    return {'teacher_logits': jax.ShapeDtypeStruct((B, T, config.model.vocab_size), jnp.float32)}
  return {'teacher_ids': jax.ShapeDtypeStruct((B, T, K), jnp.int32),
          'teacher_probs': jax.ShapeDtypeStruct((B, T, K), jnp.float32)}


def share(config: Config, step: Any) -> jax.Array:
  """The share a of the teacher in the loss after `step` updates: float32, 0 from TeacherConfig.guided on."""
  given = config.teacher
  length = given.steps or max(config.train.steps, 1)  # of the course; the run itself may end before, and be made longer later
  done = jnp.asarray(step, jnp.float32) / length
  course = {'linear': 1 - done, 'cosine': (1 + jnp.cos(jnp.pi * done)) / 2}.get(given.schedule, jnp.ones_like(done))
  return given.alpha * jnp.where(step < length, course, 0.0)


def _says(config: TeacherConfig, logits_BTV: jax.Array) -> Batch:
  """The distributions that belong to the logits of a teacher, as fields of a batch."""
  if not config.top_k:
    return {'teacher_logits': logits_BTV}
  top_BTK, ids_BTK = jax.lax.top_k(logits_BTV, config.top_k)
  log_z_BT = jax.nn.logsumexp(logits_BTV / config.temperature, axis=-1)
  return {'teacher_ids': ids_BTK, 'teacher_probs': jnp.exp(top_BTK / config.temperature - log_z_BT[..., None])}


def of_teacher(config: TeacherConfig, model: encoder_decoder.Model, params: Any, batch: Batch) -> Batch:
  """What a teacher says of a batch: one pass, without dropout, its tokens routed as at inference."""
  return _says(config, model.apply(params, batch, train=False)[0])


def _divergence(config: TeacherConfig, logits_BTV: jax.Array, batch: Batch) -> jax.Array:
  if 'teacher_logits' in batch:
    return divergence.of_logits(logits_BTV, batch['teacher_logits'], config.temperature)
  probs_BTK = batch['teacher_probs']
  sum_BT = jnp.sum(probs_BTK, axis=-1)
  if config.rest == 'bucket':
    rest_BT = jnp.maximum(1 - sum_BT, 0)
  else:
    probs_BTK, rest_BT = probs_BTK / jnp.maximum(sum_BT, 1e-30)[..., None], jnp.zeros_like(sum_BT)
  return divergence.of_top(logits_BTV, batch['teacher_ids'], probs_BTK, rest_BT, config.temperature)


def loss(config: TeacherConfig, own: jax.Array, logits_BTV: jax.Array, batch: Batch, share: jax.Array) -> tuple[
    jax.Array, losses.Pairs]:
  """The sum of the losses of a batch with its teacher's part.

  Args:
    config: the teacher's.
    own: the sum of the losses without it.
    logits_BTV: of the student.
    batch: with what the teacher says of it.
    share: a.

  Returns:
    What to differentiate, and the pair (sum, sum of weights) 'teacher_kl' of the divergence at tau, in nats.
  """
  weights_BT = batch['decoder_loss_weights']
  kl_BT = _divergence(config, logits_BTV, batch)
  kl = jnp.sum(jnp.where(weights_BT != 0, kl_BT, 0) * weights_BT)
  return (1 - share) * own + share * config.temperature**2 * kl, {'teacher_kl': (kl, jnp.sum(weights_BT))}
