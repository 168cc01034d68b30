"""A delta that was saved, with the base that it was trained on: the two belong together, or one line says why they do not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from t5x_cpm import trees
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, RunInfo
from t5x_cpm.config import Config, ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.tuning import base as bases
from t5x_cpm.tuning import files
from t5x_cpm.tuning.base import Base
from t5x_cpm.tuning.files import Saved
from t5x_cpm.tuning.methods import build_model


class Opened(NamedTuple):
  """A delta with its base.

  Attributes:
    saved: what its files say.
    base: where its base lies now.
    run: the run of the base.
  """

  saved: Saved
  base: Base
  run: RunInfo


def shapes(config: DeltaConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor of a delta on a model, as its files hold it: without the axis of slots."""
  leaves = trees.named(build_model(Config(model=model, delta=config)).leaves()['delta'])
  return {name: tuple(size for size, axis in zip(leaf.shape, leaf.axes) if axis != 'slot') for name, leaf in leaves.items()}


def check_fits(name: str, tensors: Mapping[str, np.ndarray], config: DeltaConfig, model: ModelConfig) -> None:
  """Raises CheckpointError, about `name`, unless the tensors of a delta are those that its methods have on a model."""
  wanted = shapes(config, model)
  wrong = [f'{key} is missing' for key in wanted if key not in tensors]
  wrong += [f'{key} is not of this method' for key in tensors if key not in wanted]
  wrong += [f'{key} is {list(tensors[key].shape)}, expected {list(shape)}' for key, shape in wanted.items()
            if key in tensors and tensors[key].shape != shape]
  if wrong:
    more = f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise CheckpointError(f'{name} does not fit its base as {config.method!r}: {"; ".join(wrong[:3])}{more}.')


def check_finite(name: str, tensors: Mapping[str, np.ndarray]) -> None:
  """Raises CheckpointError for the first tensor with a number that is not finite."""
  for key, value in tensors.items():
    if not np.isfinite(value).all():
      raise CheckpointError(f'{name}: {key} has numbers that are not finite (NaN or inf): take the delta of an earlier '
                            'checkpoint, or train it again at a lower rate.')


def open_delta(path: Any, base_dir: str = '') -> Opened:
  """Reads a delta and finds its base.

  Args:
    path: its folder, or the model_dir of the run that trained it.
    base_dir: where the base has moved; '' is where the delta was trained on it.

  Raises:
    ConfigError: there is no delta, or its base is gone, is another one, or does not fit it.
  """
  saved = files.read(path)
  about = saved.about['base']
  if not base_dir and not run_directory.resolve(about['model_dir']).exists():
    raise ConfigError(f'--delta={path}: its base {about["model_dir"]} is not there: give --base=DIR, where it is now.')
  base = bases.find(base_dir or about['model_dir'], about['fingerprint'])
  run = run_directory.read_run(base.model_dir, base.step)
  check_fits(f'--delta={path}', saved.tensors, saved.config, run.config.model)
  return Opened(saved, base, run)


def new_folder(path: str) -> epath.Path:
  """The path of --output. Raises ConfigError where something is there already."""
  folder = epath.Path(run_directory.resolve(path))
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise ConfigError(f'--output={path} exists already: give a new directory.')
  return folder
