"""A delta that was saved, with the base that it was trained on: the two belong together, or one line says why they do not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, RunInfo
from t5x_cpm.config import ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.tuning import base as bases
from t5x_cpm.tuning import files
from t5x_cpm.tuning.base import Base
from t5x_cpm.tuning.files import Saved, misfits
from t5x_cpm.tuning.methods import leaves


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


def check_fits(name: str, tensors: Mapping[str, np.ndarray], config: DeltaConfig, model: ModelConfig) -> None:
  """Raises CheckpointError, about `name`, unless the tensors of a delta are those that its methods have on a model."""
  if wrong := misfits(tensors, leaves(model, config)):
    more = f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise CheckpointError(f'{name} does not fit its base as {config.method!r}: {"; ".join(wrong[:3])}{more}.')


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
