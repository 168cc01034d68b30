"""What a delta is, in words and a table. Reads no base."""

from collections.abc import Iterator

import numpy as np

from t5x_cpm.config import DeltaConfig, describe
from t5x_cpm.tuning import files
from t5x_cpm.tuning.files import Saved


def _hyperparameters(config: DeltaConfig) -> str:
  """The fields that say of themselves that they are those of one of the methods, and whatever is not as it is by default."""
  of_methods = [f"of '{method}'" for method in config.methods]
  chosen = [field.name for field in describe.fields(DeltaConfig) if field.name not in ('method', 'base') and (
      any(word in field.comment for word in of_methods) or getattr(config, field.name) != field.default)]
  return ', '.join(f'{name} = {getattr(config, name)!r}' for name in chosen) or '(none)'


def lines(saved: Saved) -> Iterator[str]:
  """What `delta show` prints: facts, and a row for each tensor with the norm of all its numbers together."""
  about, tensors = saved.about, saved.tensors
  count, size = sum(value.size for value in tensors.values()), sum(value.nbytes for value in tensors.values())
  facts = {
      'method': about['method'], 'hyperparameters': _hyperparameters(saved.config), 'step': about['step'],
      'metrics': ', '.join(f'{name} = {value:.6g}' for name, value in about['metrics'].items()) or '(none)',
      'base': f'{about["base"]["model_dir"]} at step {about["base"]["step"]}', 'fingerprint': about['base']['fingerprint'],
      'vocabulary': about['vocabulary'], 'parameters': f'{count:,}', 'bytes': f'{size:,}'}
  for name, value in facts.items():
    yield f'{name:<16} {value}'
  width = max(map(len, tensors), default=0)
  yield f'\n{"tensor":<{width}}  {"shape":<18} {"norm":>9}'
  for name, value in sorted(tensors.items()):
    yield f'{name:<{width}}  {list(value.shape)!s:<18} {np.linalg.norm(value.astype(np.float64)):>9.4g}'


def show(path: str) -> None:
  """Prints what a delta is. Raises ConfigError where there is none, or it is damaged."""
  for line in lines(files.read(path)):
    print(line)
