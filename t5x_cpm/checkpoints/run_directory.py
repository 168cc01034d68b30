"""A run's directory: what lies where in it, whose it is, and which of its checkpoints are complete.

A model_dir holds

  config.json          the configuration of the latest start, format and code version, and `info`
  checkpoints/<step>/  state/: the arrays; meta/: the description: what config.json holds, as of that checkpoint, its step and
                       metrics, a digest of each array, and a digest of all this, the seal
  vocabulary/, metrics.jsonl, tensorboard/, profile/

A checkpoint is complete when Orbax has renamed its directory and left its commit mark in it. What is not complete is never
read. Nothing here imports JAX or Orbax.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from etils import epath

import t5x_cpm
from t5x_cpm import files, stored, tasks
from t5x_cpm.config import Config, ConfigError, from_dict, identity_differences, to_dict
from t5x_cpm.config.fields import as_count, one_line, shown

FORMAT_VERSION = 1
COMMIT_MARK = 'commit_success.txt'  # Orbax writes it last
DESCRIPTION = {'format_version': int, 'code_version': str, 'config': dict, 'info': dict, 'metrics': dict}
ADVICE = {
    errno.ENOSPC: 'Make room', errno.EDQUOT: 'Make room', errno.EACCES: 'Make it writable', errno.EPERM: 'Make it writable',
    errno.EROFS: 'Make it writable', errno.EISDIR: 'Move it away', errno.ENOTDIR: 'Move away the file in its path',
    errno.EEXIST: 'Move away what stands in its place', errno.ELOOP: 'Move the link away'}


class CheckpointError(ConfigError):
  """A checkpoint or model_dir that cannot be used or written. The message says which, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
  """A checkpoint of which some part is not what was saved. What reads it adds which other one to use; see `offering`."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
  """What a checkpoint says about its run."""

  config: Config
  step: int
  info: dict[str, Any]
  steps: list[int]  # of all complete checkpoints of the run, ascending
  metrics: dict[str, float]
  started: dict[str, Any]  # 'folder': where it was started, to which relative paths belong; 'import': modules of --import

  @property
  def updates(self) -> int:
    """How many updates the parameters have seen, those of other runs that this one went on with or was grown from included."""
    return self.step or self.info.get('first_step', 0)


@functools.cache  # once
def _reach(path: epath.Path) -> None:
  """Raises whatever the library of a bucket raises where there is no network, or no such kind of bucket."""
  path.exists()


def resolve(model_dir: Any, name: str = '--model_dir') -> epath.Path:
  """An absolute path: Orbax accepts no relative ones, and a program may change its working directory. Errors call it `name`."""
  try:
    path = epath.Path(model_dir)
    if b'\0' in os.fsencode(str(path)):
      raise ValueError('it has a NUL in it')
    if '://' in str(path):
      _reach(path)
      return path
    path = path.expanduser().resolve()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # told by what needs it
      os.stat(path)
    return path
  except Exception as error:  # a loop of links, what is no path, what libraries of buckets say: errors of many kinds
    reason = one_line(' '.join(str(error).split()) or type(error).__name__)
    given = one_line(str(model_dir)) if isinstance(model_dir, str | os.PathLike) else shown(model_dir)
    raise CheckpointError(f'{name}={given} cannot be used: {reason}.') from error


def new(path: Any, name: str = '--model_dir') -> epath.Path:
  """A directory that is to be made. Raises CheckpointError, which calls it `name`, where something is there already."""
  folder = resolve(path, name)
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise CheckpointError(f'{name}={path} exists already: give a new directory.')
  return folder


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
  """Turns an error of the system in writing a file into a CheckpointError that names the file and says what to do."""
  try:
    yield
  except OSError as error:
    advice = ADVICE.get(error.errno or 0, 'Mend this')
    raise CheckpointError(
        f'{error.filename2 or error.filename or path} cannot be written: {error.strerror or error}. {advice} and start the '
        'same command again.') from error


def scan(model_dir: epath.Path) -> tuple[list[int], list[epath.Path]]:
  """The steps of complete checkpoints, ascending, and the directories of half-written ones."""
  root = model_dir / 'checkpoints'
  complete, partial = [], []
  try:
    found = list(root.iterdir())
  except FileNotFoundError:
    found = []
  except Exception as error:  # libraries of buckets have classes of their own
    if type(error).__name__ == 'NotFoundError':
      return [], []
    if isinstance(error, OSError):
      advice = ADVICE.get(error.errno or 0, 'Mend this')
      raise CheckpointError(f'{root} cannot be read: {error.strerror or error}. {advice}.') from error
    if '://' not in str(root):
      raise
    raise CheckpointError(f'{root} cannot be read: {one_line(" ".join(str(error).split()))}.') from error
  for path in found:
    if '.orbax-checkpoint-tmp' in path.name:
      partial.append(path)
    elif str(as_count(path.name)) == path.name:  # not 007, of which nothing else would find the folder
      if (path / COMMIT_MARK).exists() and (path / 'meta' / 'metadata').exists():
        complete.append(int(path.name))
      else:
        partial.append(path)
  return sorted(complete), sorted(partial)


def _did_you_mean(folder: epath.Path) -> str:
  """Names the runs that lie in a folder which is none itself."""
  runs = sorted(str(path) for path in folder.iterdir() if path.is_dir() and scan(path)[0]) if folder.is_dir() else []
  return f'; did you mean {" or ".join(runs[:3])}?' if runs else '.'


@functools.cache  # once, until something changes there
def _tell_of_incomplete(path: epath.Path, changed: int) -> None:
  del changed
  print(f'Ignoring a checkpoint that is being written, or was damaged: {path}', file=sys.stderr, flush=True)


def choose(model_dir: epath.Path, step: int | None) -> int:
  """The given step, or the last.

  Raises:
    CheckpointError: there is no such checkpoint; says why, or which there are.
  """
  steps, partial = scan(model_dir)
  if not steps:
    if not model_dir.exists():
      reason = 'the directory does not exist.'
    elif (model_dir / 'bundle.json').exists():
      reason = 'it is a bundle, which `infer` and `eval` read; give the run that it was made of.'
    elif (model_dir / 'config.json').exists():
      reason = 'its run stopped before the first one was complete.'
    else:
      reason = 'it is not the model_dir of a run (no config.json)' + _did_you_mean(model_dir)
    raise CheckpointError(f'No checkpoint in {model_dir}: {reason}')
  if step is None:
    for path in partial:
      if (as_count(path.name) or 0) > steps[-1]:
        _tell_of_incomplete(path, 0 if '://' in str(path) else os.lstat(path).st_mtime_ns)
    return steps[-1]
  if step not in steps:
    raise CheckpointError(f'No checkpoint of step {step} in {model_dir}: it has {", ".join(map(str, steps))}.')
  return step


def describe(config: Config, info: dict[str, Any]) -> dict[str, Any]:
  """The JSON tree of config.json."""
  return {
      'format_version': FORMAT_VERSION, 'code_version': t5x_cpm.__version__, 'config': to_dict(config),
      'started': {'folder': os.getcwd(), 'import': tasks.imported()}, 'info': json.loads(json.dumps(info))}


def damaged(model_dir: epath.Path, step: int, what: str) -> DamagedCheckpointError:
  """The error about a checkpoint of which `what`, a file or an array, is not as it was saved."""
  return DamagedCheckpointError(f'The checkpoint {model_dir / "checkpoints" / str(step)} is damaged: {what}.')


def _strange(folder: str) -> Iterator[str]:
  """Paths in a local folder, at any depth, that are neither files nor folders."""
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_dir(follow_symlinks=False):
        yield from _strange(entry.path)
      elif not (entry.is_file() or entry.is_dir()):
        yield entry.path


def check_files(model_dir: epath.Path, step: int) -> None:
  """Raises DamagedCheckpointError if not all in a checkpoint can be read as files: Orbax would wait for a pipe for ever."""
  path = model_dir / 'checkpoints' / str(step)
  if '://' in str(path):
    return
  try:
    for name in _strange(str(path)):
      raise damaged(model_dir, step, f'{os.path.relpath(name, path)} is not a regular file')
  except OSError as error:
    raise damaged(model_dir, step, f'{error.filename or path}: {error.strerror or error}') from error


@contextlib.contextmanager
def offering(model_dir: epath.Path, step: int, read: Callable[[int], object], kind: str) -> Iterator[None]:
  """Adds to the error about a damaged checkpoint which one to use instead: the newest other one that `read` can read.

  Args:
    model_dir: the run's directory.
    step: of the checkpoint that the block reads.
    read: reads that of another step, or raises CheckpointError.
    kind: what is known of one that `read` can read, such as 'which is intact'.
  """
  try:
    yield
  except DamagedCheckpointError as error:
    for other in reversed(scan(model_dir)[0]):
      try:
        if other == step:
          continue
        read(other)
      except CheckpointError:
        continue
      advice = f'Move it away to use that of step {other}, {kind}; what only reads the run also takes --step={other}.'
      break
    else:
      advice = 'There is no other intact one: put back a copy of it, or start in a new --model_dir.'
    raise CheckpointError(f'{error} {advice}') from error


def seal(meta: Mapping[str, Any]) -> str:
  """The digest of a description, by which a changed one is told."""
  return stored.digest({name: value for name, value in meta.items() if name != 'seal'})


def read_meta(model_dir: epath.Path, step: int) -> dict[str, Any]:
  """The description of a complete checkpoint. One that was written before there were digests has no 'arrays' and no 'seal'.

  Raises:
    DamagedCheckpointError: it is damaged, or that of another step.
    CheckpointError: it cannot be read, or a later version of t5x_cpm wrote it in another format.
  """
  try:
    meta = stored.parse(model_dir / 'checkpoints' / str(step) / 'meta' / 'metadata', '', finite=False)
  except stored.DamagedError as error:
    raise damaged(model_dir, step, f'meta/metadata: {error.what}') from error
  except ConfigError as error:  # for want of permission, say
    raise CheckpointError(str(error)) from error
  version = meta.get('format_version')
  if isinstance(version, int) and version > FORMAT_VERSION:
    raise CheckpointError(
        f'Checkpoint {step} in {model_dir} has format version {version}, written by t5x_cpm {meta.get("code_version")}; this '
        f'is t5x_cpm {t5x_cpm.__version__}, which reads up to {FORMAT_VERSION}. Update t5x_cpm.')
  if ('seal' in meta or 'arrays' in meta) and meta.get('seal') != seal(meta):
    raise damaged(model_dir, step, 'meta/metadata is not what was written')
  for name, kind in DESCRIPTION.items():
    if not isinstance(meta.get(name), kind):
      raise damaged(model_dir, step, f'meta/metadata: {name} is missing or of another type')
  if meta.get('step', step) != step:
    raise damaged(model_dir, step, f'meta/metadata is that of step {meta["step"]}; the directory was renamed, or parts of two '
                  'were mixed')
  try:
    from_dict(meta['config'])
  except ConfigError as error:
    raise CheckpointError(f'The checkpoint {model_dir / "checkpoints" / str(step)} cannot be used: {error}') from error
  except (TypeError, AttributeError) as error:
    raise damaged(model_dir, step, f'meta/metadata: config: {error}') from error
  return meta


def _read_meta_or_offer(model_dir: epath.Path, step: int) -> dict[str, Any]:
  with offering(model_dir, step, lambda other: read_meta(model_dir, other), 'whose description is intact'):
    return read_meta(model_dir, step)


def read_run(model_dir: Any, step: int | None = None) -> RunInfo:
  """The configuration, step and info of a checkpoint (default: the last). Reads no array.

  Raises:
    CheckpointError: there is none, it is damaged, or a later version wrote it.
  """
  model_dir = resolve(model_dir)
  step = choose(model_dir, step)
  meta = _read_meta_or_offer(model_dir, step)
  return RunInfo(from_dict(meta['config']), step, meta['info'], scan(model_dir)[0], meta['metrics'],
                 meta.get('started', {}))


def check_is_model(model_dir: Any, config: Config) -> None:
  """Raises CheckpointError if the run in a model_dir, configured so, trained a delta, and no model of its own."""
  if config.delta.train_base:
    raise CheckpointError(f'{model_dir} holds a model that was trained together with a delta ({config.delta.method}): `infer`, '
                          '`eval` and --init_from take it, but what needs a plain model does not.')
  if config.delta.method:
    raise CheckpointError(f'{model_dir} holds no model, but a delta ({config.delta.method}) on {config.delta.base}: `infer` '
                          'and `eval` take it, but what needs a whole model takes its base.')


def check_vocabulary(model_dir: Any, info: Mapping[str, Any], fingerprint: str) -> None:
  """Raises CheckpointError unless the vocabulary in a model_dir is the one that its run was trained with."""
  trained = info.get('vocabulary')
  if trained is not None and trained != fingerprint:
    raise CheckpointError(
        f'{resolve(model_dir) / "vocabulary"} holds another vocabulary ({fingerprint}) than the model was trained with '
        f'({trained}): it was changed or damaged. `train` writes it anew from TaskConfig.vocabulary.')


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
      with writing(path / '.lock'):
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


def check_identity(model_dir: epath.Path, config: Config, info: dict[str, Any], may_differ: Collection[str] = ()) -> None:
  """Compares a configuration and `info`, but for the entries in `may_differ`, with those of the last checkpoint, if any.

  Raises:
    CheckpointError: lists every identity field and every entry of info that differs.
  """
  steps, _ = scan(model_dir)
  if not steps:
    return
  saved = _read_meta_or_offer(model_dir, steps[-1])
  lines = identity_differences(from_dict(saved['config']), config)
  before, now = ({name: value for name, value in tree.items() if name not in may_differ}
                 for tree in (saved['info'], json.loads(json.dumps(info))))
  lines += info_differences(before, now)
  if lines:
    raise CheckpointError(
        f'--model_dir={model_dir} holds checkpoint {steps[-1]} of another run:\n  ' + '\n  '.join(lines) +
        '\nContinue with the same values, or start in a new --model_dir (with --init_from, from these parameters).')
