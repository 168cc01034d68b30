"""From the checkpoint of a source to the run directory of a larger model."""

import dataclasses
import shutil
from typing import Any

import numpy as np

from t5x_cpm import files, tasks, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.tensors import CheckpointReader, TensorWriter
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError, identity_differences
from t5x_cpm.config.fields import did_you_mean
from t5x_cpm.inherit.growth import GROWTH, Stage
from t5x_cpm.tuning import base as bases


def plan(config: Config, source: str) -> tuple[Stage, Any]:
  """The model that grows from the last checkpoint of a run, and which checkpoint that is.

  Raises:
    ConfigError: what grows is unknown or cannot, or the result is not the model that the configuration describes.
  """
  for name in config.inherit.growth:
    if name not in GROWTH:
      raise ConfigError(f'InheritConfig.growth has {name!r}: expected some of {", ".join(GROWTH)}.{did_you_mean(name, GROWTH)}')
  if not config.inherit.growth:
    raise ConfigError(f'InheritConfig.growth = (): say what grows, some of {", ".join(GROWTH)}; gin/runs/inherit_*.gin do.')
  base = bases.find(source)
  run = run_directory.read_run(base.model_dir, base.step)
  words = vocabularies.load_saved(base.model_dir / 'vocabulary', run.info.get('vocabulary'))
  reader = CheckpointReader(base.model_dir, base.step)
  wanted = vocabularies.load(config.task.vocabulary) if config.task.vocabulary else tasks.vocabulary(config)
  stage = Stage(run.config.model, words, lambda leaf, index: reader.read(leaf.name, index))
  for name in config.inherit.growth:
    stage = GROWTH[name](stage, config, wanted)
  given, made = (dataclasses.replace(Config(), model=model) for model in (config.model, stage.model))
  if different := [line for line in identity_differences(made, given) if not line.startswith('ModelConfig.dropout_rate')]:
    raise ConfigError(f'InheritConfig.growth = {config.inherit.growth} does not make the model that is described: '
                      f'{"; ".join(different).replace("in the checkpoint", "is made").replace(" now", " is described")}.')
  if wanted.fingerprint != stage.words.fingerprint:
    raise ConfigError(f'TaskConfig.vocabulary = {wanted.spec!r} is not that of the source, {stage.words.spec!r}: '
                      "InheritConfig.growth needs 'vocabulary'.")
  vocabularies.check_size(stage.model, stage.words)
  return stage, base


def tell(stage: Stage) -> None:
  """Prints what becomes of every parameter, and what is kept."""
  leaves = stage.leaves
  width = max(map(len, leaves))
  for name, leaf in leaves.items():
    print(f'{name:<{width}}  {list(leaf.shape)!s:<26} {stage.told.get(name, "as in the source")}')
  size = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
  print(f'{sum(leaf.size for leaf in leaves.values()):,} parameters, {size / GiB:.2f} GiB')
  for sentence in stage.kept:
    print(sentence)


def check_room(folder: Any, stage: Stage) -> None:
  """Raises ConfigError where the disk has no room for the new model; compressed, it takes up to a tenth less."""
  where = next(path for path in (folder, *folder.parents) if path.exists())
  needed = 0.9 * sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in stage.leaves.values())
  if '://' not in str(folder) and (free := shutil.disk_usage(where).free) < needed:
    raise ConfigError(f'--model_dir={folder}: the new model takes about {needed / GiB:.1f} GiB, and {free / GiB:.1f} are free '
                      'there.')


def grow(config: Config, source: str, model_dir: str, *, dry_run: bool = False) -> None:
  """Writes a run directory with a checkpoint of step 0 whose parameters come from the last checkpoint of another run.

  Parameters pass through memory slice by slice, and the optimizer's state begins anew. The same command goes on where it was
  killed.

  Args:
    config: of the new run.
    source: the model_dir of the run that is grown.
    model_dir: a new directory.
    dry_run: say what would be done, and stop.

  Raises:
    ConfigError: see `plan`; or model_dir exists, or its disk is too small.
  """
  folder = run_directory.new(model_dir) if model_dir else None
  stage, base = plan(config, source)
  tell(stage)
  if folder is not None:
    check_room(folder, stage)
  if dry_run or folder is None:
    return
  made_from = {'source': base.fingerprint, 'growth': [*config.inherit.growth, config.inherit.seed, config.inherit.expert_noise]}
  config = dataclasses.replace(config, model=stage.model)
  info = {'vocabulary': stage.words.fingerprint, 'first_step': run_directory.read_run(base.model_dir, base.step).updates}
  curve = base.model_dir / 'metrics.jsonl'
  with TensorWriter(folder, config, info, stage.leaves.values(), made_from) as writer:
    stage.words.save(writer.partial / 'vocabulary')
    if curve.exists():  # for a run that goes on with it
      files.write_atomically(writer.partial / 'metrics.jsonl', files.read_bytes(curve))
    writer.fill(stage.read, 'inherit')
  print(f'{model_dir}: a checkpoint of step 0. Train it on by\n'
        f'  python -m t5x_cpm train --init_from={model_dir} --gin_file=gin/runs/pretrain.gin --model_dir=RUN')
