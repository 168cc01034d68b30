"""The loss of a batch, and its gradients with respect to what is trained, accumulated over microbatches."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5x_cpm import mesh as mesh_lib
from t5x_cpm import trees
from t5x_cpm.training import guidance, host_memory, losses
from t5x_cpm.training.layout import Batch, Frozen, Layout, State


class Sums(NamedTuple):
  """What adds up over microbatches: pairs (sum, weight) for metrics, the same for each layer, and what Model.advance needs."""

  pairs: losses.Pairs
  layers: losses.Pairs
  updates: dict[str, jax.Array]


def means(pairs: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
  """Sums divided by their weights."""
  return {name: total / weight for name, (total, weight) in pairs.items()}


def loss_sums(
    layout: Layout, params: Any, frozen: Frozen, batch: Batch, key: jax.Array | None,
    share: jax.Array | None = None) -> tuple[jax.Array, jax.Array, Sums]:
  """The sum of the losses of the targets, the sum of the auxiliary losses, and what else adds up; key: None outside training.

  Over a frozen base tokens are routed as at inference, also in training. `share` is that of a teacher in the loss, of which
  the batch has what it says; None: there is none.
  """
  logits, auxiliary, layers, updates = layout.model.apply(
      frozen.get('base', {}) | params, batch, key=key, train=key is not None and not layout.base)
  total, pairs = losses.cross_entropy(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights'], layout.config.optimizer.z_loss)
  if share is not None:
    total, of_teacher = guidance.loss(
        layout.config.teacher, total, logits, batch, share, layout.config.optimizer.z_loss)
    pairs |= of_teacher
  pairs |= {name: (value, jnp.ones_like(value)) for name, value in auxiliary.items()}
  return total, sum(auxiliary.values(), jnp.zeros_like(total)), Sums(pairs, layers, updates)


def _microbatch_gradients(layout: Layout, trained: Any, rest: Any, frozen: Frozen, weight: jax.Array,
                          share: jax.Array | None, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
  """Gradients of the losses of some rows, divided by the weight of all rows, and what else adds up."""

  if layout.teacher is not None:
    batch = batch | guidance.of_teachers(layout.config.teacher, layout.teacher, frozen['teacher'], batch)

  def objective(trained: Any) -> tuple[jax.Array, Sums]:
    total, auxiliary, sums = loss_sums(layout, trees.merged(trained, rest), frozen, batch, key, share)
    loss = total / weight
    return (loss if layout.base else loss + auxiliary / layout.config.train.microbatches), sums

  found, sums = jax.grad(objective, has_aux=True)(trained)
  return jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), found, layout.trained), sums


def _microbatches(batch: Batch, count: int, together: int) -> Batch:
  """[B, ...] -> [count, B / count, ...]. Rows, `together` at a time, are dealt out in turn: a device keeps its own rows."""

  def deal(x: jax.Array) -> jax.Array:
    rows, rest = x.shape[0], x.shape[1:]
    hands = x.reshape(rows // (count * together), count, together, *rest)
    return jnp.moveaxis(hands, 1, 0).reshape(count, rows // count, *rest)

  return jax.tree.map(deal, batch)


def _batch_gradients(layout: Layout, params: Any, frozen: Frozen, share: jax.Array | None, batch: Batch,
                     key: jax.Array) -> tuple[Any, Sums]:
  """Gradients of the mean loss over the weighted targets of all microbatches together, and what else adds up."""
  trained, rest = layout.split(params)
  weight = jnp.maximum(batch['decoder_loss_weights'].sum(), 1e-9)
  one = functools.partial(_microbatch_gradients, layout, trained, rest, frozen, weight, share)
  count = layout.config.train.microbatches
  if count == 1:
    return one(batch, key)

  def body(carry: Any, inputs: Any) -> tuple[Any, None]:
    index, micro = inputs
    return jax.tree.map(jnp.add, carry, one(micro, jax.random.fold_in(key, index))), None

  micro = _microbatches(batch, count, layout.group_rows)
  shapes: Any = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(body, zeros, (jnp.arange(count), micro))[0]


def gradients(layout: Layout, state: State, frozen: Frozen, batch: Batch) -> tuple[Any, Sums]:
  """Gradients of the mean loss over the weighted targets of a batch; random draws depend on the state's step alone.

  Args:
    layout: the step's layout.
    state: the whole state.
    frozen: what is read only.
    batch: the whole batch.

  Returns:
    Gradients of what is trained, in the types of the parameters, and what else adds up over the batch.
  """
  with mesh_lib.inside(layout.mesh):
    key = jax.random.fold_in(jax.random.key(layout.config.train.seed), state['step'])
    share = guidance.share(layout.config, state['step']) if layout.guided else None
    return _batch_gradients(layout, host_memory.working(state), frozen, share, batch, key)
