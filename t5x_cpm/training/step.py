"""The training step: one pure function of (state, frozen, batch), built from configuration and mesh alone.

Building touches no device and no data: training, ahead-of-time compilation, benchmarks and tests call the same function.

The state is a plain dict: `step` (int32), `params`, `opt_state`, and `halted` (bool), which a loss or gradient that is not
finite sets: from then on the state stays as it was before that step, so that the cause can be found. It is also set when an
update makes parameters not finite, and these stay. Where weights lie in the memory of the hosts, the state has their `copies`
too: see host_memory.

What is frozen is a plain dict as well: {} where all parameters are trained, else {'base': the other ones}; and 'teacher' is
among it where one guides the step (see guidance). A step reads it, and neither changes, donates nor saves it. The model sees
frozen['base'] | state['params'], and over such a base it chooses experts as at inference: no token is dropped, no balance is
asked for, and no bias moves.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_cpm import backend, trees
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import guidance, host_memory, losses, optimizer, stability
from t5x_cpm.training import layout as layout_lib
from t5x_cpm.training.gradients import Sums, gradients, loss_sums, means
from t5x_cpm.training.layout import Batch, Frozen, Layout, State, shardings_of
from t5x_cpm.training.optimizer import keep


def update(layout: Layout, state: State, grads: Any, norm: jax.Array, halted: jax.Array) -> tuple[State, jax.Array]:
  """The optimizer's step.

  Returns:
    The new `params` and `opt_state` (and `copies`), which are the old ones where the run has halted, and the sum of the squares
    of the parameters.
  """
  trained, rest = layout.split(state['params'])
  config = layout.config
  if config.mesh.host_gib:
    shardings = shardings_of({name: layout.abstract_state[name] for name in ('params', 'opt_state')})
    shardings['params'] = layout.split(shardings['params'])[0]
    decay = optimizer.weight_decays(config.optimizer, layout.trained)
    new, squares = host_memory.update(
        layout.tx, grads, state['opt_state'], trained, shardings, decay, layout.dtype, norm=norm, halted=halted)
    return (new | {'params': trees.merged(new['params'], rest)}), squares + optax.tree.norm(rest, squared=True)
  updates, opt_state = layout.tx.update(grads, state['opt_state'], trained, norm=norm, halted=halted)
  params = trees.merged(keep(halted, trained, optax.apply_updates(trained, updates)), rest)
  return {'params': params, 'opt_state': opt_state}, optax.tree.norm(params, squared=True)


def metrics(
    layout: Layout, step: jax.Array, batch: Batch, sums: Sums, norm: jax.Array, squares: jax.Array) -> dict[str, jax.Array]:
  """What a step reports: means over the batch, norms of gradients and parameters, the learning rate, and tokens.

  Args:
    layout: the step's layout.
    step: updates done before.
    batch: the whole batch.
    sums: from `gradients`.
    norm: the norm of the gradients.
    squares: the sum of the squares of the parameters.
  """
  of_teacher = {'teacher_share': guidance.share(layout.config, step)} if layout.guided else {}
  return means(sums.pairs) | of_teacher | {f'router/{name}': value for name, value in means(sums.layers).items()} | {
      'gradient_norm': norm,
      'parameter_norm': jnp.sqrt(squares),
      'learning_rate': jnp.asarray(layout.schedule(step), jnp.float32),
      'encoder_tokens': (batch['encoder_segment_ids'] != 0).sum(),
      'decoder_tokens': (batch['decoder_segment_ids'] != 0).sum(),
  }


def train_step(layout: Layout, state: State, frozen: Frozen, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
  """One update of the state, and its metrics."""
  grads, sums = gradients(layout, state, frozen, batch)
  if layout.gradient_shardings is not None:  # a device updates only its part, so it needs only that part of the sum
    grads = jax.lax.with_sharding_constraint(grads, layout.gradient_shardings)
  norm, halted, check = optax.tree.norm(grads), state['halted'], layout.config.train.check_finite
  if check:
    halted |= ~jnp.isfinite(means(sums.pairs)['loss']) | ~jnp.isfinite(norm)
  new, squares = update(layout, state, grads, norm, halted)
  if not layout.base:
    new['params'] = keep(halted, new['params'], layout.model.advance(new['params'], sums.updates))
  reported = metrics(layout, state['step'], batch, sums, norm, squares)
  new['step'] = keep(halted, state['step'], state['step'] + 1)
  if check:
    halted |= ~jnp.isfinite(squares)  # the update made them so: reported by this step, before anything is saved
  return new | {'halted': halted}, reported | {'halted': halted}


def evaluate(layout: Layout, params: Any, frozen: Frozen, batch: Batch) -> losses.Pairs:
  """Sums over the batch, outside training."""
  with mesh_lib.inside(layout.mesh):
    return loss_sums(layout, params, frozen, batch, None)[2].pairs


def explain(layout: Layout, state: State, frozen: Frozen, batch: Batch) -> str | None:
  """The name of the first tensor that is not finite among parameters, loss and gradients of a step, which is not taken.

  Parameters that are finite, but so large that the sum of their squares is not, stand before loss and gradients.
  """
  if layout.teacher is not None:
    leaves = guidance.of_each(lambda model: model.leaves(), layout.teacher)
    of_teacher = jax.tree.map(lambda leaf: leaf.axes, leaves)
    if bad := stability.first_bad_tensor({'teacher': frozen['teacher']}, {'teacher': of_teacher}):
      return bad
  grads, sums = jax.jit(functools.partial(gradients, layout))(state, frozen, batch)
  axes = jax.tree.map(lambda leaf: leaf.axes, {'base': layout.base, 'state': layout.leaves, 'trained': layout.trained})
  params = {'parameter': frozen.get('base', {}) | state['params']}
  bad = stability.first_bad_tensor(params, {'parameter': axes['base'] | axes['state']})
  if bad or (bad := stability.overflowing_tensor({'parameter': state['params']})):
    return bad
  suspects = (
      ({'loss': means(sums.pairs)['loss']}, {'loss': ()}),
      ({'gradient': grads}, {'gradient': axes['trained']}))
  return next(filter(None, (stability.first_bad_tensor(*suspect) for suspect in suspects)), None)


def fresh_state(layout: Layout, key: jax.Array) -> State:
  """The state before the first step, as a checkpoint holds it: of fresh parameters, only the subtrees that are trained."""
  params = {name: value for name, value in layout.model.init(key).items() if name in layout.leaves}
  opt_state = layout.tx.init(layout.split(params)[0])
  return {'step': jnp.int32(0), 'params': params, 'opt_state': opt_state, 'halted': jnp.bool(False)}


def check_frozen(layout: Layout, frozen: Frozen) -> None:
  """Raises ConfigError where what is frozen has other arrays than the step was built for; dtypes may differ."""
  wanted, given = trees.named(layout.abstract_frozen), trees.named(frozen)
  for name in sorted(wanted.keys() | given.keys()):
    a, b = ('no such array' if name not in leaves else list(leaves[name].shape) for leaves in (wanted, given))
    if a != b:
      raise ConfigError(f'frozen/{name}: expected {a}, given {b}. Give what `build(..., trained=...)` leaves out, and no more.')


@dataclasses.dataclass(frozen=True)
class Step:
  """What `build` returns.

  Attributes:
    model: the model.
    fn: (state, frozen, batch) -> (state, metrics); jit-compiled; only the state is donated.
    evaluate: (host_memory.working(state), frozen, batch) -> pairs (sum, weight) over the batch, by name: loss, accuracy, ...
    explain: (state, frozen, batch) -> the name of the first tensor that is not finite among parameters, loss and gradients
      of a step, which is not taken; None where there is none.
    init: (key, frozen=None) -> a fresh state, laid out on the mesh. Raises ConfigError where `frozen` does not belong to it.
    gather: a tree of arrays -> the same, whole on every device.
    complete: what host_memory.saved leaves of a state -> the state.
    axes: logical axes of host_memory.saved(state): a tree of tuples of names.
    abstract_state: shapes, dtypes and shardings of the state.
    abstract_frozen: the same of what is frozen; its arrays may also be given in another dtype.
    abstract_batch: the same of a batch.
    schedule: step -> learning rate.
  """

  model: encoder_decoder.Model
  fn: Callable[..., tuple[State, dict[str, jax.Array]]]
  evaluate: Callable[..., dict[str, jax.Array]]
  explain: Callable[[State, Frozen, Batch], str | None]
  init: Callable[..., State]
  gather: Callable[[Any], Any]
  complete: Callable[[State], State]
  axes: State
  abstract_state: State
  abstract_frozen: Frozen
  abstract_batch: Batch
  schedule: Callable[[Any], Any]


def build(config: Config, mesh: jax.sharding.Mesh, *, trained: Collection[str] | None = None,
          teacher: guidance.Teacher = None) -> Step:
  """Builds the step of a configuration for a mesh.

  Args:
    config: the run's configuration.
    mesh: the mesh to run on.
    trained: names of the top-level subtrees of the parameters that the state holds and the step trains; the others are the
      frozen base, which the caller gives to each call. None: the delta where DeltaConfig names one; else all are trained, and
      nothing is frozen.
    teacher: the model of the teacher that guides the step, with its weights in frozen['teacher']; or the models of several by
      name, with a dict of their weights there, where a batch says who teaches which row; 'cached' or 'cached by task': batches
      bring what they say; None: no teacher does.

  Raises:
    ConfigError: a dimension that the mesh does not divide; a head_dim, batch or schedule that cannot work; a name in `trained`
      that is no subtree.
  """
  layout = layout_lib.make(config, mesh, trained, teacher)
  state, frozen, batch = (shardings_of(tree) for tree in (
      layout.abstract_state, layout.abstract_frozen, layout.abstract_batch))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  options = backend.compiler_options(config.train.deterministic)
  complete = functools.partial(host_memory.complete, shardings=state, dtype=layout.dtype)
  make_state = jax.jit(functools.partial(fresh_state, layout), out_shardings=host_memory.saved(state))

  def init(key: jax.Array, given: Frozen | None = None) -> State:
    check_frozen(layout, given or {})
    return complete(make_state(key))

  return Step(
      model=layout.model,
      fn=jax.jit(
          functools.partial(train_step, layout), donate_argnums=0, in_shardings=(state, frozen, batch),
          out_shardings=(state, everywhere), compiler_options=options),
      evaluate=jax.jit(
          functools.partial(evaluate, layout), in_shardings=(host_memory.working(state), frozen, batch),
          out_shardings=everywhere, compiler_options=options),
      explain=functools.partial(explain, layout),
      init=init,
      gather=jax.jit(lambda tree: tree, out_shardings=everywhere),
      complete=complete,
      axes=layout.axes,
      abstract_state=layout.abstract_state,
      abstract_frozen=layout.abstract_frozen,
      abstract_batch=layout.abstract_batch,
      schedule=layout.schedule)
