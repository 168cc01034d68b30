"""Merging: a base with a delta in its matrices is a plain model, which costs no more than the base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_cpm import tasks, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.tensors import CheckpointReader, Index, TensorWriter
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.hooks import EXPERTS, PRODUCTS
from t5x_cpm.models.leaf import Leaf
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


class Merged:
  """The parameters of a base with a delta in its matrices, slice by slice."""

  def __init__(self, delta: Opened):
    """delta: its methods have a `merge`."""
    self._config, self._tensors = delta.saved.config, delta.saved.tensors
    self._reader = CheckpointReader(delta.base.model_dir, delta.base.step)
    self._methods = {name: METHODS[name](self._config) for name in self._config.methods}
    sites: dict[tuple[str, str], dict[str, dict[str, np.ndarray]]] = {}  # (kernel, site) -> method -> name -> weights
    for key, value in self._tensors.items():
      if key.partition('/')[0] not in PATHS:
        path, site, method, name = key.rsplit('/', 3)
        kernel = f'{path}/{KERNELS.get(site, "wo")}'
        sites.setdefault((kernel, site), {}).setdefault(method, {})[name] = value
    # The activations last: they scale what LoRA has added to `wo` as well.
    self._sites = dict(sorted(sites.items(), key=lambda item: (item[0][1] == HIDDEN, item[0])))

  def slice_of(self, leaf: Leaf, index: Index) -> np.ndarray:
    """A slice of a parameter, in its own type or in float32."""
    whole, rows = (self._tensors.get(f'{part}/{leaf.name}') for part in PATHS)
    value = self._reader.read(leaf.name, index) if whole is None else whole[index]
    if rows is not None:
      value = np.asarray(put(leaf, 'rows', value, rows[None], self._config.token_ids))
    for (kernel, site), weights in self._sites.items():
      if kernel == leaf.name:
        value = value.astype(np.float32)
        value = self._changed(value.T, index, weights).T if site == HIDDEN else self._changed(value, index, weights)
    return value

  def _changed(self, value: np.ndarray, index: Index, weights: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    for name, method in self._methods.items():
      if name in weights and method.merge is not None:
        with np.errstate(all='ignore'):  # who writes it finds what is not finite
          value = method.merge({key: weight[index] for key, weight in weights[name].items()}, value)
    return value


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

  Parameters pass through memory one slice of a layer after another. A merge that was killed is gone on with.

  Args:
    path: the delta's folder, or the model_dir of its run, whose task the new model then has.
    output: a new directory.
    base_dir: where the base has moved.

  Raises:
    ConfigError: the delta does not belong to the base, cannot be merged or is not finite; or `output` exists.
  """
  folder = run_directory.new(output, '--output')
  delta = opened.open_delta(path, base_dir)
  name = f'--delta={path}'
  check(name, delta)
  config = _configuration(path, delta)
  config.validate()
  words = vocabularies.load_saved(delta.base.model_dir / 'vocabulary')
  run_directory.check_vocabulary(delta.base.model_dir, delta.run.info, words.fingerprint)
  leaves, merged = jax.tree.leaves(encoder_decoder.build(config.model).leaves()), Merged(delta)
  made_from = {'base': delta.base.fingerprint, 'delta': delta.saved.about['weights_digest']}
  with TensorWriter(folder, config, {'vocabulary': words.fingerprint}, leaves, made_from) as writer:
    words.save(writer.partial / 'vocabulary')
    writer.fill(merged.slice_of, 'merge')
  print(f'{output}: a checkpoint of step 0, {delta.saved.config.method} of {path} merged into {delta.base.model_dir} at step '
        f'{delta.base.step}; the task is {config.task.name!r}, objective {config.task.objective!r}', flush=True)
