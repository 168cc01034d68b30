"""What is found out before any time is spent: a run that cannot work is refused before its data is cached.

Nothing here imports JAX, and TensorFlow is imported only for a task that another module registered and that is not cached.
"""

import contextlib
import dataclasses
from typing import Any

from t5x_cpm import tasks, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError, TeacherConfig, row_features
from t5x_cpm.config.fields import one_line
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import rows
from t5x_cpm.tasks import caches

# Of the spans that a window of 'cpm2' has on average, some documents have fewer, because counts are rounded.
CERTAINLY_TOO_MANY = 1.5


def vocabulary(config: Config) -> vocabularies.Vocabulary:
  """The vocabulary of a run, from the user's file; from the copy in the cache where that file is gone or not known.

  Raises:
    ConfigError: there is none.
  """
  path = caches.directory(config)
  if not caches.is_ready(path):
    return tasks.vocabulary(config)
  copy = cache_lib.components(path)[0][1].vocabulary()
  with contextlib.suppress(ConfigError):
    own = vocabularies.load(tasks.vocabulary_spec(config))
    if own.fingerprint == copy.fingerprint:
      return own
  return copy


def has_begun(model_dir: Any) -> bool:
  """Whether a model_dir has a checkpoint, from which a run would continue."""
  return bool(model_dir) and bool(run_directory.scan(run_directory.resolve(model_dir))[0])


def first_step(config: Config, model_dir: Any) -> int:
  """The updates that a run counts as done when it begins: 0, or with TrainConfig.go_on those of the run that it starts from."""
  if not config.train.go_on:
    return 0
  if has_begun(model_dir):
    return run_directory.read_run(model_dir).info['first_step']
  return run_directory.read_run(config.train.init_from).updates


def with_vocab_size(config: Config, model_dir: Any) -> Config:
  """The configuration with a number in place of ModelConfig.vocab_size = 0.

  It is that of the run in model_dir or, for a new one, of the run that it starts from; else the size of the vocabulary.
  """
  if config.model.vocab_size:
    return config
  source = model_dir if has_begun(model_dir) else (
      config.train.init_from or config.delta.base or next(iter(config.teacher.runs), ''))
  size = run_directory.read_run(source).config.model.vocab_size if source else vocabulary(config).size
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def check_sentinels(config: Config, found: vocabularies.Vocabulary) -> None:
  """Raises ConfigError unless the vocabulary has the sentinels that the objective needs."""
  task, sentinels = config.task, len(found.sentinels)
  if task.objective == 'pairs':
    if task.target_form == 'span' and sentinels < 2:
      raise ConfigError(f"TaskConfig.target_form = 'span', but the vocabulary {found.spec} has {sentinels} sentinels: set it "
                        "to 'text'.")
    return
  if task.objective in rows.WITHOUT_SENTINELS:
    return
  told = f'TaskConfig.objective = {task.objective!r}, but the vocabulary {found.spec} has {sentinels} sentinels'
  needed = 1 if task.objective == 't5' else 2  # a span, and what ends the targets
  if sentinels < needed:
    raise ConfigError(f'{told}: masked spans need at least {needed}. Set TaskConfig.vocabulary to one that has them (as in '
                      "sentencepiece:FILE?extra_ids=100), or TaskConfig.objective = 'pairs'.")
  if task.objective == 'cpm2':
    spans = task.noise_density / task.mean_span_length  # of each token of a document
    expected = task.encoder_length * spans / (1 - task.noise_density + spans)
    if expected > CERTAINLY_TOO_MANY * sentinels:
      raise ConfigError(f'{told}: a window of TaskConfig.encoder_length = {task.encoder_length} tokens needs about '
                        f"{expected:.0f}. Set a shorter encoder_length, a larger mean_span_length, or objective 'isolated'.")


def check_source(field: str, model_dir: str, found: vocabularies.Vocabulary, with_delta: bool = False) -> None:
  """Raises ConfigError if the run in model_dir, from which another starts, has another vocabulary, or no model.

  Args:
    field: the field of the configuration that names the run.
    model_dir: its value.
    found: the vocabulary of the other run.
    with_delta: whether the other run may have a delta.
  """
  run = run_directory.read_run(model_dir)
  if not with_delta:
    run_directory.check_is_model(model_dir, run.config)
  theirs = run.info.get('vocabulary')
  if theirs != found.fingerprint:
    flag = '--' + field.rpartition('.')[2]
    raise ConfigError(
        f'{field} = {model_dir!r}: that run was trained with another vocabulary than {found.spec} ({theirs}, not '
        f'{found.fingerprint}). Set TaskConfig.vocabulary to the one in {model_dir}/vocabulary, or leave it out with {flag}.')


def known_teacher(model_dir: Any) -> dict[str, Any] | None:
  """What the last checkpoint of a run says of its teacher; None where it has none, or there is no checkpoint."""
  return run_directory.read_run(model_dir).info.get('teacher') if has_begun(model_dir) else None


def is_guided(config: Config, model_dir: Any) -> bool:
  """Whether a teacher guides any of the steps that a run has left.

  Raises:
    ConfigError: one must, and none is given.
  """
  done = run_directory.read_run(model_dir).step if has_begun(model_dir) else 0
  if done >= config.teacher.guided(config.train.steps):
    return False
  if config.teacher.given:
    return True
  if known_teacher(model_dir) is not None:
    raise ConfigError(f'--model_dir={model_dir} learns from a teacher until step {config.teacher.guided(config.train.steps)}, '
                      f'and is at step {done}: give --teacher=DIR, or the --teacher_cache=DIR that it began with.')
  if config.teacher != TeacherConfig():
    raise ConfigError('TeacherConfig says how to learn from a teacher, and there is none: give --teacher=DIR, the model_dir of '
                      'its run, or --teacher_cache=DIR.')
  return False


def check_teachers(config: Config, found: vocabularies.Vocabulary | None) -> None:
  """Raises ConfigError if a run of TeacherConfig.model_dir cannot teach a run that has the vocabulary `found` (None: any)."""
  model = config.model
  for model_dir, taught in config.teacher.runs.items():
    flag = f'--teacher={taught[0]}={model_dir}' if taught else f'--teacher={model_dir}'
    run = run_directory.read_run(model_dir)
    run_directory.check_is_model(model_dir, run.config)
    theirs = run.info.get('vocabulary')
    if found is not None and theirs != found.fingerprint:
      raise ConfigError(f'{flag}: that run was trained with another vocabulary than {found.spec} ({theirs}, not '
                        f'{found.fingerprint}). A teacher speaks of the same tokens: set TaskConfig.vocabulary to the one in '
                        f'{model_dir}/vocabulary, or give another teacher.')
    rows = run.config.model.vocab_size
    if rows != model.vocab_size:
      raise ConfigError(f'{flag}: its model has ModelConfig.vocab_size = {rows}, this one {model.vocab_size}: set it to '
                        f'{rows}.')
    needed = set(row_features.names(dataclasses.replace(config, model=run.config.model)))
    if needed and (needed - set(row_features.names(config)) or run.config.model.moe.num_experts != model.moe.num_experts):
      raise ConfigError(f"{flag}: its experts go by the task of a row (router 'domain'), which rows carry only for a model "
                        'with the same number of such experts.')


def check_taught_tasks(config: Config) -> None:
  """Raises ConfigError if TeacherConfig.model_dir names what is no task of the mixture."""
  given = config.teacher.model_dir
  if isinstance(given, str):
    return
  path = caches.directory(config)
  known = [cache.name for _, cache in cache_lib.components(path)] if caches.is_ready(path) else list(tasks.parts(config) or ())
  unknown = [task for task in given if task not in known]
  if not unknown:
    return
  flag = f'--teacher={one_line(unknown[0])}={given[unknown[0]]}'
  if len(known) < 2:
    raise ConfigError(f'{flag} is for a task of a mixture, and TaskConfig.name = {config.task.name!r} is a single task: give '
                      '--teacher=DIR.')
  raise ConfigError(f'{flag}: the mixture TaskConfig.name = {config.task.name!r} has no task {one_line(unknown[0])}; its tasks '
                    f'are {", ".join(known)}.')


def check(config: Config, model_dir: Any = '') -> None:
  """Raises ConfigError for what cannot work whatever the documents are.

  Args:
    config: the run, with its ModelConfig.vocab_size resolved.
    model_dir: where it will write; a run that continues there no longer reads TrainConfig.init_from.
  """
  if config.delta.train_base and not config.train.init_from and not has_begun(model_dir):
    raise ConfigError('DeltaConfig.train_base = True goes on from a delta and its base: give --init_from=DIR, the model_dir of '
                      'the run that trained the delta.')
  if config.train.go_on and not config.train.init_from:
    raise ConfigError('TrainConfig.go_on = True goes on with the steps of another run: give --init_from=DIR, its model_dir.')
  if config.delta.frozen and not config.delta.base:
    raise ConfigError(f'DeltaConfig.method = {config.delta.method!r} trains a delta on another run: give --base=DIR, its '
                      'model_dir.')
  found = vocabulary(config)
  if config.train.init_from and not has_begun(model_dir):  # first: its vocabulary decides, not ModelConfig.vocab_size
    check_source('TrainConfig.init_from', config.train.init_from, found, config.delta.train_base)
  if config.delta.base:
    check_source('DeltaConfig.base', config.delta.base, found)
  if is_guided(config, model_dir) and config.teacher.model_dir:
    check_taught_tasks(config)
    check_teachers(config, found)
  vocabularies.check_size(config.model, found)
  check_sentinels(config, found)
  if (done := first_step(config, model_dir)) and config.train.steps < done and not has_begun(model_dir):
    raise ConfigError(f'TrainConfig.steps = {config.train.steps}, and by TrainConfig.go_on the run begins after step {done} of '
                      f'{config.train.init_from}: expected at least as many.')
