"""The configuration of a command: that of the run it reads, or the defaults, changed by gin files and then by flags."""

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_cpm.cli.parse import Arguments
from t5x_cpm.config import Config, ConfigError, DeltaConfig, MeshConfig, TaskConfig
from t5x_cpm.config.fields import as_count, one_line


def import_modules(names: Sequence[str]) -> None:
  """Imports the user's own modules, which register tasks.

  Raises:
    ConfigError: there is no such module, or it registers a task under a name that exists.
  """
  if not names:
    return
  from t5x_cpm import backend, tasks

  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # a console script, unlike `python -m`, does not look there
  for name in names:
    try:
      if not all(part and part.isprintable() for part in name.split('.')):
        raise ModuleNotFoundError(name=name)
      with backend.quiet():  # it imports TensorFlow
        importlib.import_module(name)
    except ModuleNotFoundError as error:
      if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
        raise  # the module is there and fails in an import of its own
      missing = one_line(error.name or name)
      raise ConfigError(f'--import={one_line(name)}: there is no module {missing} here ({os.getcwd()}) or installed.') from None
    except ValueError as error:
      if 'duplicate provider' not in str(error):  # what SeqIO says
        raise
      raise ConfigError(f'--import={name}: it registers a task or mixture under a name that exists: {error}') from None
  tasks.remember_modules(list(names))


def recall_modules(model_dir: str, started: Mapping[str, Any]) -> None:
  """Imports what a run was started with by --import, from where --import would find it; says what is missing.

  The folder in which the run was started is only named: a model_dir that somebody else made shall not choose what code runs.
  """
  from t5x_cpm import tasks

  for name in started.get('import', ()):
    if name not in tasks.imported():
      try:
        import_modules([name])
      except Exception as error:  # the task at hand may not need it
        print(f'{model_dir} was trained with --import={name}, which cannot be imported here ({str(error).splitlines()[0]}): '
              f'what it registers is missing. It was started in {started.get("folder")}: PYTHONPATH={started.get("folder")} '
              'makes its modules known.', file=sys.stderr, flush=True)


def checkpoint_step(arguments: Arguments) -> int | None:
  """--step as a number. None: the last checkpoint; for `eval` also 'all'."""
  step = arguments.get('step')
  if not step or (step == 'all' and arguments.mode.name == 'eval'):
    return None
  number = as_count(step)
  if number is None:
    or_all = ' or all' if arguments.mode.name == 'eval' else ''
    raise ConfigError(f'--step={one_line(step)}: expected the number of a checkpoint{or_all}.')
  return number


def named_folders(flag: str, values: Sequence[str]) -> dict[str, str]:
  """The values NAME=DIR of a flag that may be repeated. Raises ConfigError for another form, or a name that comes twice."""
  found: dict[str, str] = {}
  for value in values:
    name, _, folder = value.partition('=')
    if not name.strip() or not folder:
      raise ConfigError(f'--{flag}={one_line(value)}: expected --{flag}=NAME=DIR.')
    if name in found:
      raise ConfigError(f'--{flag}={one_line(value)}: the name {name!r} is given twice, for {found[name]} and {folder}.')
    found[name] = folder
  return found


def teachers_of(values: Sequence[str]) -> str | dict[str, str]:
  """The runs of --teacher, as TeacherConfig.model_dir has them: that of DIR, or of each TASK=DIR. What exists is a directory.

  Raises:
    ConfigError: a task comes twice; or several runs are given, and one of them for no task.
  """
  for value in dict.fromkeys(values):
    task, equals, _ = value.partition('=')
    if not equals or '/' in task or os.path.exists(value):
      if len(set(values)) > 1:
        raise ConfigError(f'--teacher={one_line(value)} is the teacher of all rows, and --teacher is given {len(values)} '
                          'times: expected --teacher=DIR once, or --teacher=TASK=DIR for each task that has its own teacher.')
      return value
  return named_folders('teacher', values)


def vocabulary_of(model_dir: str) -> str:
  """The vocabulary of a run as a value of TaskConfig.vocabulary."""
  from t5x_cpm import vocabularies
  from t5x_cpm.checkpoints import run_directory

  run = run_directory.read_run(model_dir)
  with contextlib.suppress(ConfigError):
    if vocabularies.load(run.config.task.vocabulary).fingerprint == run.info['vocabulary']:
      return run.config.task.vocabulary  # caches were made under this name
  return vocabularies.load_saved(run_directory.resolve(model_dir) / 'vocabulary').spec


def origin(source: str, model_dir: str) -> Config:
  """The configuration that a run inherits from the run `source`: model and vocabulary, and a delta that trains on with them."""
  from t5x_cpm.checkpoints import run_directory

  if model_dir and run_directory.scan(run_directory.resolve(model_dir))[0]:  # a resumed run has its own; the source may be gone
    own = run_directory.read_run(model_dir).config
    return Config(model=own.model, task=TaskConfig(vocabulary=own.task.vocabulary),
                  delta=own.delta if own.delta.train_base else DeltaConfig())
  theirs = run_directory.read_run(source).config
  delta = dataclasses.replace(theirs.delta, base='', train_base=bool(theirs.delta.method))
  return Config(model=theirs.model, task=TaskConfig(vocabulary=vocabulary_of(source)), delta=delta)


def check_routers(config: Config) -> None:
  """Raises ConfigError for a router that nobody registered, which Config.validate() cannot know."""
  if config.model.moe.num_experts:
    from t5x_cpm.models import routers  # imports JAX

    routers.check(config.model.moe)


def overrides_of(arguments: Arguments) -> list[str]:
  """The gin bindings of a command line: those of --gin., then those that other flags stand for."""
  overrides = list(arguments.overrides)
  if profile := arguments.get('profile_steps'):
    start, _, count = profile.partition(':')
    if as_count(start) is None or as_count(count) is None:
      raise ConfigError(f'--profile_steps={one_line(profile)}: expected START:COUNT, as in --profile_steps=100:5.')
    overrides += [f'MetricsConfig.profile_start={start}', f'MetricsConfig.profile_steps={count}']
  if arguments.mode.name == 'eval' and arguments.get('step'):
    overrides.append(f'EvalConfig.checkpoints={arguments.get("step")}')
  for flag, field in (
      ('init_from', 'TrainConfig.init_from'), ('base', 'DeltaConfig.base'), ('teacher_cache', 'TeacherConfig.cache')):
    if given := arguments.get(flag):
      overrides.append(f'{field}={given!r}')
  if given := arguments.get('teacher'):
    overrides.append(f'TeacherConfig.model_dir={teachers_of(given)!r}')
  if arguments.get('allow_other_base'):
    overrides.append('DeltaConfig.allow_other_base=True')
  return overrides


def begun_from(arguments: Arguments) -> Config | None:
  """The configuration that a command changes: of the run that it reads, or of one that it goes on from; None: the defaults."""
  from t5x_cpm import tasks
  from t5x_cpm.infmoe import about

  model_dir, source, frozen = map(arguments.get, ('model_dir', 'init_from', 'base'))
  if arguments.mode.scope == 'eval':
    run = about.read_run(model_dir, checkpoint_step(arguments))
    recall_modules(model_dir, run.started)
    return dataclasses.replace(tasks.located(run.config, run.started.get('folder', '')), mesh=MeshConfig())
  if arguments.get('source'):  # of several, all have one model
    from t5x_cpm.inherit import sources

    return dataclasses.replace(origin(sources.split(arguments.get('source')[0])[0], ''), delta=DeltaConfig())
  if not source and not frozen:
    return None
  base = origin(source or frozen, model_dir)
  return dataclasses.replace(base, delta=DeltaConfig()) if frozen else base  # a base that has a delta is refused later


def make_config(arguments: Arguments) -> Config:
  """The configuration of a command.

  Raises:
    ConfigError: a mistake in a file or flag, with the line or the flag at fault; or a change to a trained model.
  """
  from t5x_cpm import config as config_lib
  from t5x_cpm.config import gin

  reads_run, model_dir = arguments.mode.scope == 'eval', arguments.get('model_dir')
  if arguments.get('init_from') and arguments.get('base'):
    raise ConfigError('--init_from trains all parameters of a run, --base a delta on them: give one of the two.')
  overrides = overrides_of(arguments)
  start = base = begun_from(arguments)
  if base and arguments.get('source'):  # whether the source's number of rows stays is known when it is known what grows
    start = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=0))
  config = gin.load(arguments.get('gin_file'), overrides, scope=arguments.mode.scope, base=start, check=check_routers)
  if arguments.get('allow_other_base') and not config.delta.method:
    raise ConfigError('--allow_other_base is for the base of a delta, and this run trains none (DeltaConfig.method).')
  if base and not config.model.vocab_size and 'vocabulary' not in config.inherit.growth:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=base.model.vocab_size))
  elif arguments.mode.scope == 'train':
    from t5x_cpm.training import before

    config = before.with_vocab_size(config, model_dir)
  if base and reads_run:
    changed = [line for line in config_lib.identity_differences(base, config) if line.startswith('ModelConfig.')]
    if changed:
      raise ConfigError(f'the model of {model_dir} cannot be changed:\n  ' + '\n  '.join(changed))
  return config


def dry_run(config: Config) -> None:
  """Prints what a run would be. Of the data it reads only a cache that is there already."""
  from t5x_cpm.config import gin
  from t5x_cpm.data import reader, report
  from t5x_cpm.tasks import caches
  from t5x_cpm.training import train

  print(gin.dump(config))
  facts = train.describe(config)
  active = facts['active parameters']
  print(f'parameters        {facts["parameters"]:,}' + (f', {active:,} for one token' if config.model.moe.num_experts else ''))
  if trained := facts['trained parameters']:
    print(f'trained           {trained:,} of them: {config.delta.method} on {config.delta.base}')
  print(f'tokens per step   {facts["slots per step"]:,} with padding: {config.train.batch_size} rows of '
        f'{config.task.encoder_length} + {config.task.decoder_length}')
  if caches.is_ready(caches.directory(config)):
    data = reader.open_reader(caches.directory(config), config, 'train')
    epochs = config.train.steps * config.train.batch_size / data.rows_per_epoch
    print(f'epochs            {epochs:.3g}: {config.train.steps:,} steps, {data.rows_per_epoch:,.0f} rows an epoch')
    for line in report.of_cache(caches.directory(config), config):
      print(f'data              {line}')
  else:
    print('epochs            unknown, the task has no cache that is intact and up to date; `t5x_cpm cache` with the same gin '
          'files and flags makes it')
  rates = ', '.join(f'{rate:.3g} at step {step:,}' for step, rate in facts['learning rate'].items())
  print(f'learning rate     {rates}')
