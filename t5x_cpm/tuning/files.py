"""A delta as files that can be copied and handed on: `delta.json`, which says what it is, and the safetensors that it names.

The weights of a newer save get another name, and the JSON is replaced last, so that a reader never finds one of the two without
the other.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

import t5x_cpm
from t5x_cpm import files, stored, trees
from t5x_cpm.config import Config, ConfigError, DeltaConfig, from_dict, to_dict
from t5x_cpm.tuning.base import Base

FORMAT_VERSION = 1
NAME = 'delta.json'
FORM = {
    'format_version': range(1, 1 << 31), 'code_version': str, 'method': str, 'DeltaConfig': dict, 'vocabulary': str,
    'base': {'model_dir': str, 'step': stored.COUNT, 'fingerprint': str}, 'step': stored.COUNT, 'metrics': {str: float},
    'weights': stored.is_plain_name, 'weights_digest': str, 'objective?': str, 'target_form?': str,
    'inputs_template?': str}
REMEDY = 'Put back a copy of it, or continue the run that it is of, which writes it anew.'


class Saved(NamedTuple):
  """A delta that was read from files.

  Attributes:
    about: what its JSON says; see FORM.
    config: how it was made.
    tensors: its weights by name, [L, ...].
  """

  about: dict[str, Any]
  config: DeltaConfig
  tensors: dict[str, np.ndarray]


def _digest(raw: bytes) -> str:
  return hashlib.blake2b(raw, digest_size=12).hexdigest()


def write(folder: epath.Path, tensors: Mapping[str, np.ndarray], config: Config, base: Base, *, step: int, vocabulary: str,
          metrics: Mapping[str, float]) -> None:
  """Writes a delta, atomically, in the place of an older one.

  Args:
    folder: of the two files; made if it does not exist.
    tensors: its weights by name.
    config: the configuration of its run.
    base: what it was trained on.
    step: updates done.
    vocabulary: the fingerprint of the vocabulary.
    metrics: of this step, by name.
  """
  raw = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, {'format': 'np'})
  weights = f'weights-{step}.safetensors'
  folder.mkdir(parents=True, exist_ok=True)
  files.write_atomically(folder / weights, raw)
  stored.write(folder / NAME, {
      'format_version': FORMAT_VERSION, 'code_version': t5x_cpm.__version__, 'method': config.delta.method,
      'DeltaConfig': to_dict(config.delta), 'vocabulary': vocabulary,
      'base': {'model_dir': str(base.model_dir), 'step': base.step, 'fingerprint': base.fingerprint}, 'step': step,
      'metrics': {name: float(value) for name, value in metrics.items() if np.isfinite(value)}, 'weights': weights,
      'weights_digest': _digest(raw), 'objective': config.task.objective,
      'target_form': config.task.target_form,
      'inputs_template': config.local_task.inputs_template if config.task.name.partition(':')[0] == 'local' else ''})
  for other in folder.glob('weights-*.safetensors'):
    if other.name != weights:
      with contextlib.suppress(OSError):
        other.unlink()


def misfits(tensors: Mapping[str, np.ndarray], leaves: Any) -> list[str]:
  """What keeps tensors from being those that `leaves` describe: each one that is missing, left over, of another shape ..."""
  wanted = trees.named(leaves)
  problems = [f'{name} is missing' for name in sorted(wanted.keys() - tensors.keys())]
  problems += [f'{name} is left over' for name in sorted(tensors.keys() - wanted.keys())]
  for name in sorted(wanted.keys() & tensors.keys()):
    value = tensors[name]
    shape = tuple(size for size, axis in zip(wanted[name].shape, wanted[name].axes, strict=True) if axis != 'slot')
    if value.shape != shape:
      problems.append(f'{name} is {list(value.shape)}, expected {list(shape)}')
    elif not jnp.issubdtype(value.dtype, jnp.floating):
      problems.append(f'{name} is of type {value.dtype}, expected float32')
    elif not np.isfinite(value).all():
      problems.append(f'{name} is not finite (NaN or inf)')
  return problems


def fitted(tensors: Mapping[str, np.ndarray], leaves: Any, where: Any) -> Any:
  """The tensors of a delta as the subtree 'delta' of a model's parameters [L, n, ...], with one slot.

  Args:
    tensors: by name, without the axis of slots, as `read` gives them.
    leaves: the description of the subtree, Model.leaves()['delta'].
    where: what errors call the delta.

  Raises:
    ConfigError: names every tensor that is missing, left over, of another shape or not of floating point, or not finite.
  """
  if problems := misfits(tensors, leaves):
    raise ConfigError(f'{where}: the weights do not fit the delta that {NAME} describes: {"; ".join(problems)}. {REMEDY}')
  arrays = {}
  for name, leaf in trees.named(leaves).items():
    arrays[name] = np.expand_dims(tensors[name], leaf.axes.index('slot')).astype(leaf.dtype)
  return trees.nested(arrays)


def read(path: Any) -> Saved:
  """The delta in a folder, or in the folder `delta` of a run.

  Raises:
    ConfigError: there is none there, it is damaged, or a later version wrote it.
  """
  folder = epath.Path(path)
  if not (folder / NAME).exists() and (folder / 'delta').exists():
    folder = folder / 'delta'
  if not (folder / NAME).exists():
    raise ConfigError(f'{path} holds no delta: expected a folder with {NAME}, or the model_dir of a run that trained one.')
  about = stored.read(folder / NAME, FORM, REMEDY, signed='weights')
  if about['format_version'] > FORMAT_VERSION:
    raise ConfigError(f'{folder / NAME} has format version {about["format_version"]}, written by t5x_cpm '
                      f'{about["code_version"]}; this one reads up to {FORMAT_VERSION}. Update t5x_cpm.')
  weights = folder / about['weights']
  raw = stored.content(weights, REMEDY)
  if _digest(raw) != about['weights_digest']:
    raise stored.DamagedError(weights, f'it is not what {NAME} was written with', REMEDY)
  try:
    tensors = safetensors.numpy.load(raw)
  except safetensors.SafetensorError as error:
    raise stored.DamagedError(weights, str(error), REMEDY) from None
  return Saved(about, from_dict(about['DeltaConfig'], DeltaConfig), tensors)
