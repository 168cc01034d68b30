"""Merging: a base with a delta in its matrices is a plain model, which costs no more than the base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import tasks, trees, vocabularies
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.hooks import EXPERTS, PRODUCTS
from t5x_cpm.models.replaced import PATHS, put
from t5x_cpm.tuning import opened
from t5x_cpm.tuning.methods import METHODS
from t5x_cpm.tuning.opened import Opened

KERNELS = {site: kernel for sites in PRODUCTS.values() for site, kernel in sites.items()}
KERNELS |= {f'{EXPERTS}{kernel}': kernel for kernel in PRODUCTS['experts'].values()}
HIDDEN = 'mlp.hidden'  # the activations, which are what `wo` reads: its rows are changed as the columns of others are


def check(name: str, delta: Opened) -> None:
  """Raises ConfigError unless each method of a delta has a place among the matrices of a model."""
  config = delta.saved.config
  for method in config.methods:
    if METHODS[method](config).merge is None:
      able = [other for other in METHODS if METHODS[other](config).merge is not None]
      raise ConfigError(f'{name}: {method!r} cannot be merged. Only what changes a matrix can ({", ".join(able)}): prompts and '
                        'adapters are no matrices of a model, and these models have no bias vectors. Keep it as a delta, which '
                        '`eval` and `infer` take.')
  for site in {key.rsplit('/', 3)[1] for key in delta.saved.tensors if key.partition('/')[0] not in PATHS}:
    if site not in KERNELS and site != HIDDEN:
      raise ConfigError(f'{name}: it changes {site!r}, where the model has no matrix to merge it into.')


def merge_tensors(params: dict[str, Any], delta: Opened) -> None:
  """Puts a delta into the parameters of its base, one matrix at a time.

  Args:
    params: by name, [L, ...]; changed in place.
    delta: its methods have a `merge`.

  Raises:
    CheckpointError: a merged matrix has a number that is not finite.
  """
  config, tensors = delta.saved.config, delta.saved.tensors
  leaves = trees.named(encoder_decoder.build(delta.run.config.model).leaves())
  weights: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
  for key, value in tensors.items():
    part, _, name = key.partition('/')
    if part in PATHS:  # what the delta has in the place of a parameter; LoRA acts beside it
      params[name] = np.asarray(put(leaves[name], part, params[name], value[None], config.token_ids), params[name].dtype)
      continue
    path, site, method, name = key.rsplit('/', 3)
    weights.setdefault((path, site, method), {})[name] = value
  # The activations last: they scale what LoRA has added to `wo` as well.
  for path, site in sorted({key[:2] for key in weights}, key=lambda key: (key[1] == HIDDEN, key)):
    kernel = f'{path}/{KERNELS.get(site, "wo")}'
    changed = np.array(params.pop(kernel))
    for layer, old in enumerate(changed):
      new = np.asarray(old, np.float32).T if site == HIDDEN else np.asarray(old, np.float32)
      for method in config.methods:
        own = weights.get((path, site, method))
        merge = METHODS[method](config).merge
        if own is not None and merge is not None:
          with np.errstate(all='ignore'):  # told below
            new = merge({name: value[layer] for name, value in own.items()}, new)
      changed[layer] = new.T if site == HIDDEN else new
      if not np.isfinite(changed[layer].astype(np.float32)).all():
        raise CheckpointError(f'{kernel} of layer {layer} would have numbers that are not finite (NaN or inf).')
    params[kernel] = changed


def _configuration(path: Any, delta: Opened) -> Config:
  """The configuration of the merged model: the task is that of the delta's run where `path` is its model_dir, or the base's."""
  source = delta.run
  folder = run_directory.resolve(path)
  if (folder / 'config.json').exists() and run_directory.scan(folder)[0]:
    source = run_directory.read_run(folder)
  found = tasks.located(source.config, source.started.get('folder', ''))
  kept: Mapping[str, Any] = {part: getattr(found, part) for part in ('task', 'local_task', 'decode', 'infer', 'eval')}
  return dataclasses.replace(Config(), model=delta.run.config.model, **kept)


def merge(path: str, output: str, base_dir: str = '') -> None:
  """Writes a model_dir with a checkpoint of step 0: the base with the delta in its matrices.

  Not streamed: while the checkpoint is written, the memory of the host holds the parameters of the base about twice.

  Args:
    path: the delta's folder, or the model_dir of its run, whose task the new model then has.
    output: a new directory.
    base_dir: where the base has moved.

  Raises:
    ConfigError: the delta does not belong to the base, cannot be merged or is not finite; or `output` exists.
  """
  folder = opened.new_folder(output)
  delta = opened.open_delta(path, base_dir)
  name = f'--delta={path}'
  check(name, delta)
  config = _configuration(path, delta)
  config.validate()
  words = vocabularies.load_saved(delta.base.model_dir / 'vocabulary')
  run_directory.check_vocabulary(delta.base.model_dir, delta.run.info, words.fingerprint)
  params = trees.named(arrays.load_params(delta.base.model_dir, step=delta.base.step))
  merge_tensors(params, delta)
  with Manager(folder, config, info={'vocabulary': words.fingerprint}) as manager:
    words.save(folder / 'vocabulary')
    axes = jax.tree.map(lambda leaf: leaf.axes, encoder_decoder.build(config.model).leaves())
    manager.save(0, {'step': jnp.int32(0), 'params': trees.nested(params)}, axes={'step': (), 'params': axes})
  print(f'{output}: a checkpoint of step 0, {delta.saved.config.method} of {path} merged into {delta.base.model_dir} at step '
        f'{delta.base.step}; the task is {config.task.name!r}, objective {config.task.objective!r}', flush=True)
