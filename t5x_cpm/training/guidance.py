"""What a teacher adds to a step: its distributions over the targets of a batch, its share, and its part of the loss.

L = (1 - a) L_self + a tau^2 KL(teacher || student), on the positions whose loss counts (Qin et al. 2022, Knowledge Inheritance
for Pre-trained Language Models, section 3). What the teacher says of a batch stands in fields of it: `teacher_ids` and
`teacher_probs` [B, T, K], the K most probable tokens with their probabilities at the temperature tau; or `teacher_logits`
[B, T, V], where all tokens count. Either the step adds them, by a pass of the teacher, or they come with the batch.

Where tasks of a mixture have teachers of their own, a batch also has `teacher` [B]: the number of the teacher of a row, in the
order in which they are given, or -1 for none. The loss of a row without one is L_self.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from t5x_cpm.config import Config, ModelConfig, TeacherConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import divergence, losses

Batch = dict[str, Any]
# Who guides a step: the teacher of all rows, or several by name; or batches bring what one says, or what those of tasks say.
Teacher = ModelConfig | dict[str, ModelConfig] | Literal['cached', 'cached by task'] | None
X = TypeVar('X')
Y = TypeVar('Y')


def of_each(function: Callable[[X], Y], teacher: X | dict[str, X]) -> Y | dict[str, Y]:
  """What a function makes of a teacher, or of each of several."""
  return {name: function(one) for name, one in teacher.items()} if isinstance(teacher, dict) else function(teacher)


def models(teacher: Teacher) -> list[ModelConfig]:
  """The models that a step runs beside its own."""
  if isinstance(teacher, dict):
    return list(teacher.values())
  return [teacher] if isinstance(teacher, ModelConfig) else []


def shapes(config: Config, teacher: Teacher) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of what a batch brings for its teachers: who teaches which row, and what a cached one says."""
  B, T, K = config.train.batch_size, config.task.decoder_length, config.teacher.top_k
  found = {}
  if isinstance(teacher, dict) or teacher == 'cached by task':
    found['teacher'] = jax.ShapeDtypeStruct((B,), jnp.int32)
  if teacher in ('cached', 'cached by task'):
    if not K:
      return found | {'teacher_logits': jax.ShapeDtypeStruct((B, T, config.model.vocab_size), jnp.float32)}
    found['teacher_ids'] = jax.ShapeDtypeStruct((B, T, K), jnp.int32)
    found['teacher_probs'] = jax.ShapeDtypeStruct((B, T, K), jnp.float32)
  return found


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


def choose(batch: Batch, number: int, its: Batch, others: Batch | None) -> Batch:
  """What the teacher of that number says, on its rows of a batch, and on the others what `others` has (None: anything)."""
  if others is None:
    return its
  mine_B11 = (batch['teacher'] == number)[:, None, None]
  return {name: jnp.where(mine_B11, its[name], others[name]) for name in its}


def of_teachers(config: TeacherConfig, teacher: encoder_decoder.Model | dict[str, encoder_decoder.Model], params: Any,
                batch: Batch) -> Batch:
  """What the teacher of each row says of it. Each of several passes over all rows, because shapes are static."""
  if not isinstance(teacher, dict):
    return of_teacher(config, teacher, params, batch)
  said: Batch | None = None
  for number, (name, model) in enumerate(teacher.items()):
    said = choose(batch, number, of_teacher(config, model, params[name], batch), said)
  assert said is not None
  return said


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


def loss(config: TeacherConfig, own: jax.Array, logits_BTV: jax.Array, batch: Batch, share: jax.Array,
         z_loss: float = 0.0) -> tuple[jax.Array, losses.Pairs]:
  """The sum of the losses of a batch with its teacher's part.

  Args:
    config: the teacher's.
    own: the sum of the losses without it.
    logits_BTV: of the student.
    batch: with what the teacher says of it.
    share: a.
    z_loss: OptimizerConfig.z_loss, of which `own` has its part.

  Returns:
    What to differentiate, and the pair (sum, sum of weights) 'teacher_kl' of the divergence at tau, in nats, on the rows that
    have a teacher.
  """
  weights_BT = batch['decoder_loss_weights']
  if 'teacher' in batch:
    taught_B1 = (batch['teacher'] >= 0)[:, None]
    own = losses.cross_entropy(
        logits_BTV, batch['decoder_target_tokens'], weights_BT * (1 - share * taught_B1), z_loss)[0]
    weights_BT = weights_BT * taught_B1
  else:
    own = (1 - share) * own
  kl_BT = _divergence(config, logits_BTV, batch)
  kl = jnp.sum(jnp.where(weights_BT != 0, kl_BT, 0) * weights_BT)
  weight = jnp.maximum(jnp.sum(weights_BT), 1e-9)  # the mean of a batch without such rows is 0
  return own + share * config.temperature**2 * kl, {'teacher_kl': (kl, weight)}
