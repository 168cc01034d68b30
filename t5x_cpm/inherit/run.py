"""From the checkpoints of one source, or of several, to the run directory of a new model."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from t5x_cpm import files, tasks, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.tensors import TensorWriter, check_room
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.config.fields import did_you_mean
from t5x_cpm.inherit import sources as source_lib
from t5x_cpm.inherit.growth import GROWTH, OF_SEVERAL
from t5x_cpm.inherit.sources import Source
from t5x_cpm.inherit.stage import Stage


def check_growth(growth: Sequence[str], sources: int) -> None:
  """Raises ConfigError unless all that grows is known, and suits the number of sources."""
  for name in growth:
    if name not in GROWTH:
      raise ConfigError(f'InheritConfig.growth has {name!r}: expected some of {", ".join(GROWTH)}.{did_you_mean(name, GROWTH)}')
    if name in OF_SEVERAL and name != growth[0]:
      raise ConfigError(f'InheritConfig.growth has {name!r} after {growth[0]!r}: it makes one model of several, and comes '
                        'first.')
  if not growth:
    raise ConfigError(f'InheritConfig.growth = (): say what grows, some of {", ".join(GROWTH)}; gin/runs/inherit_*.gin do.')
  if sources == 1 and growth[0] in OF_SEVERAL:
    raise ConfigError(f'InheritConfig.growth has {growth[0]!r}, which needs --source=DIR two times or more; --source=DIR@STEP '
                      'is another checkpoint of a run.')
  if sources > 1 and growth[0] not in OF_SEVERAL:
    raise ConfigError(f'--source is given {sources} times, and InheritConfig.growth begins with {growth[0]!r}: only '
                      f'{" and ".join(map(repr, OF_SEVERAL))} take several.')


def plan(config: Config, given: Sequence[str]) -> tuple[Stage, list[Source]]:
  """The model that grows, and what it grows from.

  Args:
    config: of the new run.
    given: model_dirs, as DIR or DIR@STEP.

  Raises:
    ConfigError: what grows is unknown or cannot, or the result is not the model that the configuration describes.
  """
  growth = config.inherit.growth
  check_growth(growth, len(given))
  sources = [source_lib.find(one) for one in given]
  source_lib.check_alike(sources)
  wanted = vocabularies.load(config.task.vocabulary) if config.task.vocabulary else tasks.vocabulary(config)
  first, *others = (source.stage for source in sources)
  stage = dataclasses.replace(first, others=tuple(others))
  for name in growth:
    stage = GROWTH[name](stage, config, wanted)
  if different := source_lib.differences(stage.model, config.model, 'is made', 'is described'):
    raise ConfigError(f'InheritConfig.growth = {growth} does not make the model that is described: {different}.')
  if wanted.fingerprint != stage.words.fingerprint:
    raise ConfigError(f'TaskConfig.vocabulary = {wanted.spec!r} is not that of the source, {stage.words.spec!r}: '
                      "InheritConfig.growth needs 'vocabulary'.")
  vocabularies.check_size(stage.model, stage.words)
  return stage, sources


def _bytes(stage: Stage) -> int:
  return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in stage.leaves.values())


def tell(stage: Stage) -> None:
  """Prints what becomes of every parameter, what it takes, and what is kept."""
  leaves = stage.leaves
  width = max(map(len, leaves))
  for name, leaf in leaves.items():
    print(f'{name:<{width}}  {list(leaf.shape)!s:<26} {stage.told.get(name, "as in the source")}')
  print(f'{sum(leaf.size for leaf in leaves.values()):,} parameters, {_bytes(stage) / GiB:.2f} GiB of disk; the state of '
        'the optimizer begins anew')
  for sentence in stage.kept:
    print(sentence)


def grow(config: Config, source: str | Sequence[str], model_dir: str, *, dry_run: bool = False) -> None:
  """Writes a run directory with a checkpoint of step 0 whose parameters come from checkpoints of other runs.

  Parameters pass through memory slice by slice, and the optimizer's state begins anew. The same command goes on where it was
  killed.

  Args:
    config: of the new run.
    source: the model_dir of the run that is grown, as DIR (its last checkpoint) or DIR@STEP; or several.
    model_dir: a new directory.
    dry_run: say what would be done, and stop.

  Raises:
    ConfigError: see `plan`; or model_dir exists, or its disk is too small.
  """
  folder = run_directory.new(model_dir) if model_dir else None
  stage, sources = plan(config, [source] if isinstance(source, str) else source)
  tell(stage)
  if folder is not None:
    check_room(folder, 0.9 * _bytes(stage), 'the new model')
  if dry_run or folder is None:
    return
  made_from = {'sources': [one.fingerprint for one in sources], 'growth': dataclasses.asdict(config.inherit)}
  config = dataclasses.replace(config, model=stage.model)
  info = {'vocabulary': stage.words.fingerprint, 'first_step': sources[0].updates}
  curve = sources[0].model_dir / 'metrics.jsonl'
  with TensorWriter(folder, config, info, stage.leaves.values(), made_from) as writer:
    stage.words.save(writer.partial / 'vocabulary')
    if curve.exists():  # for a run that goes on with it
      files.write_atomically(writer.partial / 'metrics.jsonl', files.read_bytes(curve))
    writer.fill(stage.read, 'inherit')
  print(f'{model_dir}: a checkpoint of step 0. Train it on by\n'
        f'  python -m t5x_cpm train --init_from={model_dir} --gin_file=gin/runs/pretrain.gin --model_dir=RUN')
