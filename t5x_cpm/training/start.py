"""What a run starts from: fresh parameters or those of another run; and what a run that continues is told."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import files, tasks, tuning
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config
from t5x_cpm.models import routers
from t5x_cpm.training import before, deltas, host_memory, optimizer, records
from t5x_cpm.training.step import Frozen, State, Step
from t5x_cpm.vocabularies import Vocabulary


def fresh(config: Config, step: Step, frozen: Frozen) -> State:
  """A state before the first step, with the parameters of another run where TrainConfig.init_from names one.

  Raises:
    ConfigError: that run has parameters that do not fit.
  """
  state = step.init(jax.random.key(config.train.seed), frozen)
  if config.train.init_from:
    source = run_directory.read_run(config.train.init_from)
    theirs = tasks.located(source.config, source.started.get('folder', ''))
    state['params'] = tuning.load_whole(config.train.init_from, source.step, theirs.delta, step.abstract_state['params'])
    state = step.complete(host_memory.saved(state))
  return state


def _count(x: jax.Array, done: int) -> jax.Array:
  return jax.device_put(jnp.asarray(done, x.dtype), x.sharding)


def gone_on(state: State, config: Config, model_dir: Any, done: int) -> State:
  """A fresh state that counts `done` updates, in a model_dir whose curve begins with that of the run it starts from.

  The moments of the optimizer begin anew, and so does their own count.
  """
  if jax.process_index() == 0:
    theirs = run_directory.resolve(config.train.init_from) / 'metrics.jsonl'
    lines = files.read_bytes(theirs) if theirs.exists() else b''
    joint = json.dumps({'step': done, 'split': records.JOINT})
    with run_directory.writing(model_dir):
      files.write_atomically(run_directory.resolve(model_dir) / 'metrics.jsonl', lines + f'{joint}\n'.encode())
  optimizer_state = state['opt_state'] | {'count': _count(state['opt_state']['count'], done)}
  return state | {'step': _count(state['step'], done), 'opt_state': optimizer_state}


def tell_of_a_leak(config: Config, say: Callable[[str], None]) -> None:
  """Says so if in training a token of the decoder can feel tokens after it, by the way in which tokens go to experts."""
  moe = config.model.moe
  reason = routers.leak(moe)
  if reason:
    remedy = 'another router' if routers.get(moe.of('decoder')).sees_later else "MoEConfig.dispatch = 'dropless'"
    say(f'router {moe.of("decoder")!r} in the decoder is not causal in training, as published: {reason}, so that later tokens '
        f'change where earlier ones go. At inference they do not. {remedy[0].upper() + remedy[1:]} avoids it.')


def tell_of_another_rate(config: Config, step: Step, before: Config, number: int, say: Callable[[str], None]) -> None:
  """Says so if a run configured as `before` continues after `number` updates with another length, and so another rate."""
  old, new = (float(schedule(number)) for schedule in (
      optimizer.make_schedule(config.optimizer, before.train.steps), step.schedule))
  if old != new:
    say(f'OptimizerConfig.schedule = {config.optimizer.schedule!r} ends with the run: for TrainConfig.steps = '
        f'{config.train.steps} instead of {before.train.steps} the learning rate goes from {old:.3g} to {new:.3g} here. '
        'OptimizerConfig.decay_steps, set from the start, keeps it.')


def begin(config: Config, model_dir: str, step: Step, frozen: Frozen, manager: Manager, vocabulary: Vocabulary,
          say: Callable[[str], None]) -> State:
  """The state that a run goes on from: that of its last checkpoint, or a fresh one where it has none."""
  latest = manager.latest_step()
  if latest is None:
    tell_of_a_leak(config, say)
    state = deltas.initial(config, step.model, fresh(config, step, frozen), frozen, vocabulary)
    done = before.first_step(config, model_dir)
    return gone_on(state, config, model_dir, done) if done else state
  state = step.complete(manager.restore(host_memory.saved(step.abstract_state), latest))
  say(f'continuing {model_dir} from step {latest}')
  tell_of_another_rate(config, step, run_directory.read_run(model_dir, latest).config, latest, say)
  return state


def why_nothing_is_done(config: Config, model_dir: Any, latest: int, reason: str) -> str:
  """What a run says that is at its end after `latest` updates; reason: of Patience."""
  if latest < config.train.steps:
    return f'{model_dir} stopped at step {latest}: {reason}. Set CheckpointConfig.patience higher, or to 0, to go on.'
  return (f'{model_dir} is at step {latest} and TrainConfig.steps = {config.train.steps}: nothing to do. '
          'Set TrainConfig.steps higher to go on.')


def tell_of_little_room(model_dir: Any, state: State, say: Callable[[str], None]) -> None:
  """Says so if the disk of model_dir may have no room for one more checkpoint. Compressed, it may still fit."""
  if '://' in str(model_dir):
    return
  size, free = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), shutil.disk_usage(model_dir).free
  if free < size:
    say(f'The disk of {model_dir} has {free / GiB:.3g} GiB free, and a checkpoint takes up to {size / GiB:.3g} GiB: make room, '
        'or saving may fail.')
