"""What a run that trains a delta does beside a plain one: finds and loads its base, and writes the delta as files."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from t5x_cpm import trees, tuning
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.models import encoder_decoder, replaced
from t5x_cpm.training import before
from t5x_cpm.training.step import Frozen, State, Step
from t5x_cpm.vocabularies import Vocabulary


def find(config: Config, model_dir: Any) -> tuning.Base | None:
  """The checkpoint on which a run trains a delta: the newest of DeltaConfig.base, or the one that the run began with.

  Raises:
    ConfigError: there is none, or it is not the one that the run began with and DeltaConfig.allow_other_base is False; or
      DeltaConfig.prompt_file cannot be what a new run begins with.
  """
  if not config.delta.frozen:
    return None
  if not before.has_begun(model_dir):
    tuning.prompt.from_file(config.delta, config.model.d_model)
  wanted = run_directory.read_run(model_dir).info.get('base') if before.has_begun(model_dir) else None
  return tuning.find(config.delta.base, wanted, allow_other=config.delta.allow_other_base)


def as_saved(config: Config) -> Config:
  """The configuration as a checkpoint of the run holds it: what one command allowed is not allowed for ever."""
  return dataclasses.replace(config, delta=dataclasses.replace(config.delta, allow_other_base=False))


def load(base: tuning.Base | None, step: Step) -> Frozen:
  """What a run reads but does not train."""
  return {'base': tuning.load(base, step.abstract_frozen['base'])} if base else {}


def _size(tree: Any) -> str:
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return f'{size / GiB:.3g} GiB' if size >= 0.1 * GiB else f'{size / 2**20:.3g} MiB'


def tell(base: tuning.Base, config: Config, step: Step, say: Callable[[str], None]) -> None:
  """Says what is trained on which base, and how large the parts are."""
  state = step.abstract_state
  trained = sum(leaf.size for leaf in jax.tree.leaves(state['params']))
  everything = step.model.num_parameters()
  say(f'{config.delta.method} on {base.model_dir} at step {base.step} (weights {base.fingerprint}): {trained:,} parameters are '
      f'trained, {100 * trained / (everything - trained):.2g} % of the {everything - trained:,} of the base. The base takes '
      f'{_size(step.abstract_frozen)}, the delta {_size(state["params"])}, the optimizer {_size(state["opt_state"])}.')


def initial(config: Config, model: encoder_decoder.Model, state: State, frozen: Frozen,
            vocabulary: Vocabulary) -> State:
  """A fresh state, in which a prompt is what DeltaConfig.prompt_init says, and parameters of the base are as they are there."""
  if config.train.init_from or not config.delta.frozen:
    return state
  delta = state['params']['delta']
  assert model.delta is not None
  own = replaced.first_values(model.delta, trees.named(model.leaves()), frozen['base'])
  delta |= jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), own, {part: delta[part] for part in own})
  if not config.delta.prompts:
    return state
  table = state['params']['delta']['prompt']['table']
  vectors: Any = tuning.prompt.from_file(config.delta, table.shape[-1])
  tokens = tuning.prompt.first_tokens(config.delta, vocabulary, config.train.seed)
  if tokens:
    embedding = frozen['base']['token_embedder']['embedding']
    rows = embedding[np.concatenate(tokens)].astype(table.dtype)
    vector = np.repeat(np.arange(len(tokens)), [len(some) for some in tokens])
    vectors = jax.ops.segment_sum(rows, vector, len(tokens)) / np.array([[len(some)] for some in tokens], np.float32)
  if vectors is not None:
    state['params']['delta']['prompt']['table'] = jax.device_put(vectors[None], table.sharding)
  return state


def write(base: tuning.Base, config: Config, step: Step, manager: Manager, state: State, metrics: Mapping[str, float]) -> None:
  """Writes the delta of a state to `delta` of the model_dir, from process 0. Every process calls it.

  Raises:
    CheckpointError: it cannot be written.
  """
  whole = jax.device_get(step.gather(state['params']['delta']))
  if jax.process_index() == 0:
    axes = {name: leaf.axes.index('slot') for name, leaf in trees.named(step.model.leaves()['delta']).items()}
    tensors = {name: np.squeeze(leaf, axis=axes[name]) for name, leaf in trees.named(whole).items()}
    with run_directory.writing(manager.model_dir / 'delta'):
      tuning.write(manager.model_dir / 'delta', tensors, config, base, step=int(state['step']),
                   vocabulary=manager.info['vocabulary'], metrics=metrics)


def mend(base: tuning.Base, config: Config, step: Step, manager: Manager, latest: int) -> None:
  """Writes the delta of the last checkpoint, unless it is there as it should be: a run may be killed between the two."""
  if run_directory.read_run(manager.model_dir, latest).info['base'] != base.fingerprint:
    return  # what was allowed to go on has not gone on
  try:
    saved = tuning.read(manager.model_dir)
    tuning.fitted(saved.tensors, step.model.leaves()['delta'], manager.model_dir / 'delta')
    if saved.about['step'] == latest:
      return
  except ConfigError:
    pass
  metrics = run_directory.read_run(manager.model_dir, latest).metrics
  write(base, config, step, manager, manager.restore(step.abstract_state, latest), metrics)
