"""Where data comes from: a table of tasks, and SeqIO objects made from it when they are asked for.

Importing this package imports neither TensorFlow nor SeqIO: listing tasks, naming a cache and refusing an unknown name need
neither. `get` makes the seqio.Task or seqio.Mixture. Tasks that other modules registered with SeqIO are found by name too.
"""

import dataclasses
import difflib
import importlib
import re
import sys
from typing import Any

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import vocabulary as vocabulary_lib
from t5x_cpm.tasks import local, pretrain, quickstart
from t5x_cpm.tasks.table import MixtureRow, Row

ROWS: dict[str, Row | MixtureRow] = {row.name: row for row in (*quickstart.ROWS, *pretrain.ROWS)}
_FREE = {'local': 'your own .txt or .jsonl files: LocalTaskConfig.files is a glob, or a dict of globs for a mixture',
         'tfds:BUILDER': 'text of any TFDS builder, e.g. tfds:wiki40b/zh-cn; tfds:c4/multilingual@zh for split zh'}
_modules: list[str] = []


def listing() -> dict[str, str]:
  """Every name that TaskConfig.name may hold, with a line about each."""
  texts = {name: row.text for name, row in ROWS.items()} | _FREE
  return texts | {name: 'registered with SeqIO' for name in sorted(_registered() - set(texts)) if '__' not in name}


def remember_modules(names: list[str]) -> None:
  """Names modules that register tasks with SeqIO, so that the workers of the cache can import them as well."""
  _modules.extend(name for name in names if name not in _modules)


def imported() -> list[str]:
  """The modules that were named."""
  return list(_modules)


def import_modules(names: list[str]) -> None:
  """Imports modules that register tasks, in a worker of the cache."""
  for name in names:
    importlib.import_module(name)
  remember_modules(names)


def in_any_process(config: Config) -> bool:
  """Whether another process can make the task of `config` too."""
  return _row(config) is not None or bool(_modules)


def identity(config: Config) -> dict:
  """What determines the tokens of a task: the name of its cache is a hash of it. Raises ConfigError for an unknown name."""
  row = _row(config)
  if row is None and config.task.name not in _registered():
    raise _unknown(config.task.name)
  parts = {'name': config.task.name, 'vocabulary': config.task.vocabulary, 'row': repr(row)}
  if isinstance(row, Row) and row.kind == 'local':
    chosen = dataclasses.asdict(local.part(config.task.name, config.local_task))
    parts |= {'local': chosen, 'pairs': config.task.objective == 'pairs'}
  elif row is not None and row.kind == 'local':
    parts |= {'local': dataclasses.asdict(config.local_task), 'pairs': config.task.objective == 'pairs'}
  return parts


def get(config: Config) -> Any:
  """The seqio.Task or seqio.Mixture that `config.task` names; imports TensorFlow, which sees no GPU.

  Raises:
    ConfigError: no such task (with near names), no vocabulary, no file.
  """
  row = _row(config)
  if row is None and config.task.name not in _registered():
    raise _unknown(config.task.name)
  from t5x_cpm.tasks import make
  if row is None:
    return make.registered(config.task.name)
  if isinstance(row, MixtureRow):
    rates = local.rates(config.local_task) if row.kind == 'local' else row.rates
    parts = [(get(_named(config, name)), rate) for name, rate in rates.items()]
    return make.mixture(config.task.name, parts)
  return make.task(row, config, vocabulary(config))


def vocabulary(config: Config, task: Any = None) -> vocabulary_lib.Vocabulary:
  """The vocabulary of a run: TaskConfig.vocabulary, or the task's own.

  Args:
    config: of the run.
    task: for a task that another module registered, the object that `get` gave.
  """
  row = _row(config)
  if row is None and task is not None:
    from t5x_cpm.tasks import make
    return make.vocabulary_of(task, config)
  spec = config.task.vocabulary or (row.vocabulary if row else '')
  if not spec:
    raise ConfigError(f'task {config.task.name!r} has no vocabulary of its own: set TaskConfig.vocabulary, for example to '
                      "'cpm2:FILE' or 'sentencepiece:FILE'.")
  return vocabulary_lib.load(spec)


def public_name(name: str) -> str:
  """The name in TaskConfig.name of a task that `get` made."""
  if name in _registered() and '__' not in name:
    return name
  from t5x_cpm.tasks import make
  return make.NAMES.get(name, name)


def _named(config: Config, name: str) -> Config:
  return dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))


def _row(config: Config) -> Row | MixtureRow | None:
  name = config.task.name
  if name == 'local' or name.startswith('local:'):
    return local.row(name, config.local_task)
  if name.startswith('tfds:'):
    return pretrain.tfds_row(name)
  return ROWS.get(name)


def _registered() -> set[str]:
  seqio = sys.modules.get('seqio')  # nobody can have registered a task without importing it
  return set() if seqio is None else {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def _unknown(name: str) -> ConfigError:
  known = list(listing())
  near = difflib.get_close_matches(re.sub(r'\W', '_', name), known, n=3, cutoff=0.5)
  hint = f'did you mean {" or ".join(near)}?' if near else f'expected one of {", ".join(known)}.'
  return ConfigError(f'TaskConfig.name = {name!r} is not registered; {hint} `t5x_cpm tasks` lists them; a task of your own '
                     'module needs --import=MODULE.')
