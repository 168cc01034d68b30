"""The weighted average of deltas of one method on one base.

Of LoRA the products of two matrices are averaged, exactly: the ranks add up, as a sum of products is one product of matrices
put side by side. Of other methods each tensor is averaged.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError, DeltaConfig, TaskConfig
from t5x_cpm.config.fields import one_line
from t5x_cpm.tuning import files, lora, opened
from t5x_cpm.tuning.opened import Opened

# Fields in which deltas may differ: how they began, what held their base, and what the ranks and scales of LoRA were.
FREE = ('base', 'allow_other_base', 'train_base', 'base_dtype', 'slots', 'prompt_init', 'prompt_words', 'prompt_text',
        'prompt_file', 'sites', 'rank', 'alpha', 'rank_stabilised', 'lora_dropout')


def read_weights(text: str, count: int) -> list[float]:
  """The numbers of --weights, '0.5,0.5'; equal ones for ''. Raises ConfigError unless there are `count` with the sum 1."""
  if not text:
    return [1 / count] * count
  try:
    weights = [float(part) for part in text.split(',')]
  except ValueError:
    weights = []
  if len(weights) != count or not abs(sum(weights) - 1) < 1e-6:
    raise ConfigError(f'--weights={one_line(text)}: expected {count} numbers with commas between, one for each --delta, whose '
                      'sum is 1.')
  return weights


def _check_alike(first: Opened, other: Opened, names: tuple[str, str]) -> None:
  """Raises ConfigError with what two deltas differ in."""
  if first.base.fingerprint != other.base.fingerprint:
    raise ConfigError(f'{names[0]} and {names[1]} have different bases: {first.base.model_dir} with the fingerprint '
                      f'{first.base.fingerprint}, and {other.base.model_dir} with {other.base.fingerprint}.')
  for field in dataclasses.fields(DeltaConfig):
    a, b = getattr(first.saved.config, field.name), getattr(other.saved.config, field.name)
    if a != b and field.name not in FREE:
      raise ConfigError(f'{names[0]} and {names[1]} differ in DeltaConfig.{field.name}: {a!r} and {b!r}.')
  # The sites may be written in several ways; their tensors tell.
  if different := sorted(set(first.saved.tensors) ^ set(other.saved.tensors)):
    raise ConfigError(f'{names[0]} and {names[1]} act at different sites: only one of them has {different[0]}.')


def average(paths: Sequence[str], output: str, weights: str = '', base_dir: str = '') -> None:
  """Writes the average of deltas to a folder.

  Args:
    paths: of two or more deltas: folders, or model_dirs of the runs that trained them.
    output: a new folder.
    weights: as in `read_weights`.
    base_dir: where their base has moved.

  Raises:
    ConfigError: they differ in method, base or sites, one of them is not finite, or the ranks together exceed a matrix.
  """
  shares = read_weights(weights, len(paths))
  folder = run_directory.new(output, '--output')
  deltas = [opened.open_delta(path, base_dir) for path in paths]
  for path, delta in zip(paths, deltas):
    _check_alike(deltas[0], delta, (f'--delta={paths[0]}', f'--delta={path}'))
  config, tensors = deltas[0].saved.config, {}
  saved = [delta.saved for delta in deltas]
  if 'lora' in config.methods:
    config = dataclasses.replace(config, **lora.joined_fields([one.config for one in saved]))
  for name in saved[0].tensors:
    values: list[Any] = [one.tensors[name] for one in saved]
    kind = name.rsplit('/', 2)[-2:]
    if kind[0] == 'lora':
      tensors[name] = lora.joined(kind[1], values, shares, [one.config for one in saved])
    else:
      tensors[name] = sum((share * value for share, value in zip(shares, values)), np.zeros_like(values[0])).astype(np.float32)
  run, base = deltas[0].run, deltas[0].base
  try:
    opened.check_fits('the average', tensors, config, run.config.model)
  except ConfigError as error:
    raise ConfigError(f'the average has the ranks of all together: {error}') from None
  task = TaskConfig(**{field: saved[0].about[field] for field in ('objective', 'target_form') if field in saved[0].about})
  files.write(folder, tensors, Config(delta=config, task=task), base, step=max(one.about['step'] for one in saved),
              vocabulary=saved[0].about['vocabulary'], metrics={})
  parts = ', '.join(f'{share:g} x {path}' for share, path in zip(shares, paths))
  rank = f' of rank {config.rank}' if 'lora' in config.methods else ''
  print(f'{output}: {config.method}{rank} on {base.model_dir}, the average {parts}', flush=True)
