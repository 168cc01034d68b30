"""The checkpoints that a model grows from."""

from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from t5x_cpm import vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.tensors import CheckpointReader
from t5x_cpm.config import Config, ConfigError, ModelConfig, identity_differences
from t5x_cpm.config.fields import as_count
from t5x_cpm.inherit.stage import Stage
from t5x_cpm.tuning import base as bases


class Source(NamedTuple):
  """A checkpoint that is grown.

  Attributes:
    name: as it was given.
    model_dir: of its run.
    updates: that its parameters have seen.
    stage: its model.
    fingerprint: of its stored weights.
  """

  name: str
  model_dir: epath.Path
  updates: int
  stage: Stage
  fingerprint: str


def split(source: str) -> tuple[str, int | None]:
  """The model_dir and the step of DIR or DIR@STEP; None is the last. What exists as a whole is a directory."""
  folder, _, step = source.rpartition('@')
  number = as_count(step)
  return (source, None) if not folder or number is None or run_directory.resolve(source).exists() else (folder, number)


def find(source: str) -> Source:
  """The checkpoint of DIR or DIR@STEP.

  Raises:
    CheckpointError: there is none, or it holds a delta.
  """
  folder, step = split(source)
  model_dir = run_directory.resolve(folder)
  run = run_directory.read_run(model_dir, step)
  run_directory.check_is_model(model_dir, run.config)
  words = vocabularies.load_saved(model_dir / 'vocabulary', run.info.get('vocabulary'))
  reader = CheckpointReader(model_dir, run.step)
  stage = Stage(run.config.model, words, lambda leaf, index: reader.read(leaf.name, index))
  return Source(source, model_dir, run.updates, stage, bases.fingerprint(model_dir, run.step))


def differences(a: ModelConfig, b: ModelConfig, of_a: str, of_b: str) -> str:
  """What makes another model of b than of a, but for its dropout; '' for nothing."""
  configs = [Config(model=model) for model in (a, b)]
  lines = [line for line in identity_differences(*configs) if not line.startswith('ModelConfig.dropout_rate')]
  return '; '.join(lines).replace(' in the checkpoint', f' {of_a}').replace(' now', f' {of_b}')


def check_alike(sources: Sequence[Source]) -> None:
  """Raises ConfigError unless all are of one ModelConfig and one vocabulary."""
  first = sources[0]
  for other in sources[1:]:
    if different := differences(first.stage.model, other.stage.model, 'in the first', 'in this one'):
      raise ConfigError(f'--source={other.name} is not of the same model as --source={first.name}: {different}.')
    if first.stage.words.fingerprint != other.stage.words.fingerprint:
      raise ConfigError(f'--source={other.name} has another vocabulary than --source={first.name}.')
