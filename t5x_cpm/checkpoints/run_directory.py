"""A run's directory: what lies where in it, whose it is, and which of its checkpoints are complete.

A model_dir holds

  config.json          the configuration of the latest start, format and code version, and `info`
  checkpoints/<step>/  state/: the arrays; meta/: what config.json holds, as of that checkpoint, and its metrics
  vocabulary/, metrics.jsonl, tensorboard/, profile/

A checkpoint is complete when Orbax has renamed its directory and left its commit mark in it. What is not complete is never
read. Nothing here imports JAX or Orbax.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

import t5x_cpm
from t5x_cpm import files, tasks
from t5x_cpm.config import Config, ConfigError, from_dict, identity_differences, to_dict

FORMAT_VERSION = 1
COMMIT_MARK = 'commit_success.txt'  # Orbax writes it last


class CheckpointError(ConfigError):
  """A checkpoint or model_dir that cannot be used or written. The message says which, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
  """What a checkpoint says about its run."""

  config: Config
  step: int
  info: dict[str, Any]
  steps: list[int]  # of all complete checkpoints of the run, ascending
  metrics: dict[str, float]
  started: dict[str, Any]  # 'folder': where it was started, to which relative paths belong; 'import': modules of --import


def resolve(model_dir: Any) -> epath.Path:
  """An absolute path: Orbax accepts no relative ones, and a program may change its working directory."""
  path = epath.Path(model_dir)
  return path if '://' in str(path) else path.expanduser().resolve()


def scan(model_dir: epath.Path) -> tuple[list[int], list[epath.Path]]:
  """The steps of complete checkpoints, ascending, and the directories of half-written ones."""
  root = model_dir / 'checkpoints'
  complete, partial = [], []
  for path in root.iterdir() if root.exists() else ():
    if '.orbax-checkpoint-tmp' in path.name:
      partial.append(path)
    elif path.name.isdigit():
      if (path / COMMIT_MARK).exists() and (path / 'meta' / 'metadata').exists():
        complete.append(int(path.name))
      else:
        partial.append(path)
  return sorted(complete), sorted(partial)


def _did_you_mean(folder: epath.Path) -> str:
  """Names the runs that lie in a folder which is none itself."""
  runs = sorted(str(path) for path in folder.iterdir() if path.is_dir() and scan(path)[0]) if folder.is_dir() else []
  return f'; did you mean {" or ".join(runs[:3])}?' if runs else '.'


def choose(model_dir: epath.Path, step: int | None) -> int:
  """The given step, or the last.

  Raises:
    CheckpointError: there is no such checkpoint; says why, or which there are.
  """
  steps, _ = scan(model_dir)
  if not steps:
    if not model_dir.exists():
      reason = 'the directory does not exist.'
    elif (model_dir / 'config.json').exists():
      reason = 'its run stopped before the first one was complete.'
    else:
      reason = 'it is not the model_dir of a run (no config.json)' + _did_you_mean(model_dir)
    raise CheckpointError(f'No checkpoint in {model_dir}: {reason}')
  if step is None:
    return steps[-1]
  if step not in steps:
    raise CheckpointError(f'No checkpoint of step {step} in {model_dir}: it has {", ".join(map(str, steps))}.')
  return step


def describe(config: Config, info: dict[str, Any]) -> dict[str, Any]:
  """The JSON tree of config.json."""
  return {
      'format_version': FORMAT_VERSION, 'code_version': t5x_cpm.__version__, 'config': to_dict(config),
      'started': {'folder': os.getcwd(), 'import': tasks.imported()}, 'info': json.loads(json.dumps(info))}


def read_meta(model_dir: epath.Path, step: int) -> dict[str, Any]:
  """The metadata of a complete checkpoint.

  Raises:
    CheckpointError: it is damaged, or a later version of t5x_cpm wrote it in another format.
  """
  path = model_dir / 'checkpoints' / str(step)
  try:
    meta = json.loads((path / 'meta' / 'metadata').read_text())
  except ValueError as error:
    raise CheckpointError(f'The checkpoint {path} is damaged: meta/metadata: {error}. Move it away to use an earlier '
                          'one.') from error
  if meta['format_version'] > FORMAT_VERSION:
    raise CheckpointError(
        f'Checkpoint {step} in {model_dir} has format version {meta["format_version"]}, written by t5x_cpm '
        f'{meta["code_version"]}; this is t5x_cpm {t5x_cpm.__version__}, which reads up to {FORMAT_VERSION}. Update t5x_cpm.')
  return meta


def read_run(model_dir: Any, step: int | None = None) -> RunInfo:
  """The configuration, step and info of a checkpoint (default: the last). Reads no array.

  Raises:
    CheckpointError: there is none, or a later version wrote it.
  """
  model_dir = resolve(model_dir)
  step = choose(model_dir, step)
  meta = read_meta(model_dir, step)
  return RunInfo(from_dict(meta['config']), step, meta['info'], scan(model_dir)[0], meta['metrics'],
                 meta.get('started', {}))


@contextlib.contextmanager
def claim(path: epath.Path) -> Iterator[None]:
  """Creates a model_dir and keeps other runs out of it. The system lifts the claim when the process ends, however it ends.

  Raises:
    CheckpointError: it cannot be written, holds something that is not a run, or another process trains in it.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / '.write_probe'
    probe.write_text('')
    probe.unlink()
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith('.'))
  except OSError as error:
    raise CheckpointError(f'--model_dir={path} cannot be written: {error.strerror or error}.') from error
  if names and 'config.json' not in names:
    raise CheckpointError(
        f'--model_dir={path} is not empty and not the model_dir of a run (no config.json; it holds {", ".join(names[:5])}). '
        'Give an empty or new directory.')
  if '://' in str(path):  # a bucket has no locks
    yield
    return
  with contextlib.ExitStack() as held:
    try:
      held.enter_context(files.lock(path / '.lock', wait=False))
    except files.LockedError as error:
      raise CheckpointError(f'--model_dir={path} is in use: {error} trains there. Wait for its end, or give another '
                            'directory.') from None
    yield


def _short(value: Any) -> str:
  text = value if value == '(nothing)' else json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 100 else text[:97] + '...'


def info_differences(saved: Any, given: Any, name: str = '') -> list[str]:
  """Lines 'data.rates.zh: 1.0 in the checkpoint, 2.0 now' for what differs between two JSON trees."""
  if isinstance(saved, Mapping) and isinstance(given, Mapping):
    lines = []
    for key in sorted(saved.keys() | given.keys()):
      lines += info_differences(saved.get(key, '(nothing)'), given.get(key, '(nothing)'), f'{name}.{key}' if name else key)
    return lines
  return [] if saved == given else [f'{name}: {_short(saved)} in the checkpoint, {_short(given)} now']


def check_identity(model_dir: epath.Path, config: Config, info: dict[str, Any]) -> None:
  """Compares a configuration and `info` with those of the last checkpoint, if there is one.

  Raises:
    CheckpointError: lists every identity field and every entry of info that differs.
  """
  steps, _ = scan(model_dir)
  if not steps:
    return
  saved = read_meta(model_dir, steps[-1])
  lines = identity_differences(from_dict(saved['config']), config)
  lines += info_differences(saved['info'], json.loads(json.dumps(info)))
  if lines:
    raise CheckpointError(
        f'--model_dir={model_dir} holds checkpoint {steps[-1]} of another run:\n  ' + '\n  '.join(lines) +
        '\nContinue with the same values, or start in a new --model_dir (with --init_from, from these parameters).')
