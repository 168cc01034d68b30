"""Where data comes from: a table of tasks, and SeqIO objects made from it when they are asked for.

`get` makes the seqio.Task or seqio.Mixture that a configuration names, `tokens` gives what its cache is made from, and `caches`
makes the cache. Tasks that other modules registered with SeqIO are found by name too. Nothing here knows how tokens become
batches. Importing the package imports neither TensorFlow nor SeqIO, because listing tasks, naming a cache and refusing an
unknown name need neither.
"""

import dataclasses
import difflib
import hashlib
import importlib
import os
import pathlib
import re
import sys
from typing import Any

from t5x_cpm import backend, vocabularies
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.tasks import local, pretrain, quickstart
from t5x_cpm.tasks.documents import Documents, Source
from t5x_cpm.tasks.table import MixtureRow, Row

ROWS: dict[str, Row | MixtureRow] = {row.name: row for row in (*quickstart.ROWS, *pretrain.ROWS)}
_FREE = {'local': 'your own .txt or .jsonl files: LocalTaskConfig.files is a glob, or a dict of globs for a mixture',
         'tfds:BUILDER': 'text of any TFDS builder, e.g. tfds:wiki40b/zh-cn; tfds:c4/multilingual@zh for split zh'}
_MADE = re.compile('__[0-9a-f]{8}$')  # ends the SeqIO name of a task of these tables
_modules: dict[str, str] = {}  # modules that register tasks -> a digest of their code


def _registered() -> set[str]:
  seqio = sys.modules.get('seqio')  # without importing it, nobody can have registered a task
  return set() if seqio is None else {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def listing() -> dict[str, str]:
  """Every name that TaskConfig.name may have, with a line about each."""
  texts = {name: row.text for name, row in ROWS.items()} | _FREE
  return texts | {name: 'registered with SeqIO' for name in sorted(_registered() - set(texts)) if not _MADE.search(name)}


def _unknown(name: str) -> ConfigError:
  known = list(listing())
  near = difflib.get_close_matches(re.sub(r'\W', '_', name), known, n=3, cutoff=0.5)
  hint = f'did you mean {" or ".join(near)}?' if near else f'expected one of {", ".join(known)}.'
  return ConfigError(f'TaskConfig.name = {name!r} is not registered; {hint} `t5x_cpm tasks` lists them; a task of your own '
                     'module needs --import=MODULE.')


def _code(name: str) -> str:
  """A digest of those Python files of a module's package that have been imported."""
  package = name.partition('.')[0]
  digest = hashlib.blake2b(digest_size=8)
  for module in sorted(sys.modules):
    file = getattr(sys.modules[module], '__file__', None)
    if f'{module}.'.startswith(f'{package}.') and file and file.endswith('.py'):
      digest.update(pathlib.Path(file).read_bytes())
  return digest.hexdigest()


def remember_modules(names: list[str]) -> None:
  """Remembers modules that register tasks with SeqIO, for the processes that make a cache to import as well.

  Raises:
    ConfigError: a registered task has the name of one of these tables, which would be read in its place.
  """
  own = sorted(name for name in _registered() if name in ROWS or name == 'local' or name.startswith(('local:', 'tfds:')))
  if own:
    raise ConfigError(f'--import={",".join(names)}: the task {own[0]!r} that is registered there has the name of a task of '
                      't5x_cpm: give it another one.')
  for name in names:
    _modules.setdefault(name, _code(name))


def imported() -> list[str]:
  """The modules that `remember_modules` has remembered."""
  return list(_modules)


def import_modules(names: list[str]) -> None:
  """Imports modules that register tasks, in a process that makes a cache."""
  for name in names:
    importlib.import_module(name)
  remember_modules(names)


def _row(config: Config) -> Row | MixtureRow | None:
  name = config.task.name
  if name == 'local' or name.startswith('local:'):
    return local.row(name, config.local_task)
  if name.startswith('tfds:'):
    return pretrain.tfds_row(name)
  return ROWS.get(name)


def _named(config: Config, name: str) -> Config:
  return dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))


def _rates(row: MixtureRow, config: Config) -> dict[str, float]:
  return local.rates(config.local_task) if row.kind == 'local' else dict(row.rates)


def _documents(row: Row, config: Config) -> Documents | None:
  if row.kind == 'tfds':
    return None
  return local.documents(row.name, config) if row.kind == 'local' else quickstart.documents(row)


def in_any_process(config: Config) -> bool:
  """Whether another process can make the task of `config` too."""
  return _row(config) is not None or bool(_modules)


def _absolute(path: str) -> str:
  """An absolute path, so that the same relative path in another folder names another cache."""
  return path if '://' in path else os.path.abspath(os.path.expanduser(path))


def located(config: Config, folder: str) -> Config:
  """The configuration of a run with its relative paths made absolute: they belong to the folder in which it was started.

  As it is where that folder is not known or gone, such as on another machine.
  """
  if not folder or folder == os.getcwd() or not os.path.isdir(folder):
    return config

  def absolute(path: str) -> str:
    return path if not path or '://' in path or path.startswith('~') else os.path.join(folder, path)

  def each(paths: str | dict[str, str]) -> str | dict[str, str]:
    return {name: absolute(path) for name, path in paths.items()} if isinstance(paths, dict) else absolute(paths)

  kind, colon, file = config.task.vocabulary.partition(':')
  own = config.local_task
  task = dataclasses.replace(
      config.task, vocabulary=f'{kind}{colon}{absolute(file)}', cache_dir=absolute(config.task.cache_dir))
  own = dataclasses.replace(own, files=each(own.files), validation_files=each(own.validation_files))
  delta = dataclasses.replace(config.delta, base=absolute(config.delta.base), prompt_file=absolute(config.delta.prompt_file))
  return dataclasses.replace(config, task=task, local_task=own, delta=delta)


def get(config: Config) -> Any:
  """Makes the seqio.Task or seqio.Mixture that `config.task` names. Imports TensorFlow, from which GPUs are hidden.

  Raises:
    ConfigError: there is no such task (the message has similar names), no vocabulary, or no file.
  """
  row = _row(config)
  if row is None and config.task.name not in _registered():
    raise _unknown(config.task.name)
  source = _documents(row, config) if isinstance(row, Row) else None  # before TensorFlow: a wrong glob is reported at once
  with backend.quiet():
    from t5x_cpm.tasks import make
  if row is None:
    return make.registered(config.task.name)
  if isinstance(row, MixtureRow):
    return make.mixture(config.task.name, [(get(_named(config, name)), rate) for name, rate in _rates(row, config).items()])
  return make.task(row, source, vocabulary(config))


def vocabulary_spec(config: Config) -> str:
  """The name of the vocabulary of a run, as far as it is known without TensorFlow: '' where a task of SeqIO alone knows."""
  row = _row(config)
  return config.task.vocabulary or (row.vocabulary if row else '')


def vocabulary(config: Config) -> vocabularies.Vocabulary:
  """The vocabulary of a run: TaskConfig.vocabulary, or the task's own."""
  row = _row(config)
  if row is None:
    provider = get(config)
    from t5x_cpm.tasks import make
    return make.vocabulary_of(provider, config)
  spec = vocabulary_spec(config)
  if not spec:
    raise ConfigError(f'task {config.task.name!r} has no vocabulary of its own: set TaskConfig.vocabulary, for example to '
                      "'cpm2:FILE' or 'sentencepiece:FILE'.")
  return vocabularies.load(spec)


def identity(config: Config) -> dict:
  """What determines the tokens of a task; the name of its cache is a hash of this.

  The text of files is not part of it, because `caches.stale` watches that. The code of other modules is, because nothing else
  is known about their tasks.

  Raises:
    ConfigError: an unknown name.
  """
  row = _row(config)
  if row is None and config.task.name not in _registered():
    raise _unknown(config.task.name)
  kind, _, file = config.task.vocabulary.partition(':')
  vocabulary = f'{kind}:{_absolute(file)}' if file else config.task.vocabulary
  result: dict[str, Any] = {'name': config.task.name, 'vocabulary': vocabulary, 'row': repr(row)}
  if isinstance(row, MixtureRow):
    result['rates'] = _rates(row, config)
    result['parts'] = [identity(_named(config, name)) for name in result['rates']]
  elif row is not None and row.kind == 'local':
    own = dataclasses.asdict(local.own_config(config.task.name, config.local_task))
    own |= {field: _absolute(own[field]) for field in ('files', 'validation_files') if own[field]}
    for field in ('inputs_template', 'targets_template'):
      if not own[field]:
        del own[field]  # caches of earlier versions, which had no templates, are named without them
    result |= {'local': own, 'pairs': config.task.objective == 'pairs'}
  elif row is None:
    result['modules'] = _modules
  return result


def parts(config: Config) -> dict[str, float] | None:
  """The rate of each task of a mixture; None for a task. Imports TensorFlow only for what other modules registered."""
  row = _row(config)
  if row is not None:
    return _rates(row, config) if isinstance(row, MixtureRow) else None
  provider = get(config)
  return {task.name: float(provider.get_rate(task)) for task in provider.tasks} if hasattr(provider, 'tasks') else None


def tokens(config: Config) -> Source:
  """What the cache of a task is made from.

  Documents of quickstart and local tasks are tokenized without TensorFlow, those of others by running their SeqIO task.
  """
  row = _row(config)
  source = _documents(row, config) if isinstance(row, Row) else None
  if source is not None:
    return source
  provider = get(config)
  from t5x_cpm.tasks import make
  return make.TaskTokens(provider, config.task.name)
