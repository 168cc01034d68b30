"""python -m t5x_cpm MODE: flags -> gin -> one function."""

import contextlib
import dataclasses
import errno
import importlib
import os
import sys
from collections.abc import Sequence

import t5x_cpm
from t5x_cpm import backend
from t5x_cpm.config import Config, ConfigError, MeshConfig, TaskConfig


@dataclasses.dataclass(frozen=True)
class Flag:
  """A command-line flag. `value` is what help shows after '=', '' for a switch."""

  value: str
  text: str
  modes: tuple[str, ...] = ()  # those that take it; () is all
  repeat: bool = False


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What stands on a command line: flags by name, and `--gin.` overrides without their prefix."""

  mode: str
  flags: dict[str, list[str]]
  overrides: list[str]

  def get(self, name: str) -> str:
    """The last value of a flag, '' where it is not given."""
    return self.flags.get(name, [''])[-1]


MODES = {
    'train': 'pre-train or fine-tune; the same command again continues where it stopped',
    'eval': 'evaluate checkpoints on tasks: metrics, predictions and a table',
    'infer': 'answer a file of inputs, or a prompt; a blank is written <span>',
    'compile': 'compile a step for a TPU slice on any machine: memory of a chip, collectives, a bound on its time',
    'cache': 'turn the text of a task into tokens, once',
    'tasks': 'list the tasks and mixtures that TaskConfig.name and --tasks may name',
}
FLAGS = {
    'gin_file': Flag('FILE', 'gin file, of the current folder or of the package; later ones win', repeat=True),
    'model_dir': Flag('DIR', 'folder of the run', ('train', 'eval', 'infer')),
    'init_from': Flag('DIR', 'start from the parameters of another run, with its model and vocabulary', ('train', 'cache')),
    'coordinator': Flag('HOST:PORT', 'where process 0 of several is; SLURM, Open MPI and TPUs say it themselves', ('train',)),
    'num_processes': Flag('N', 'how many processes run this command', ('train',)),
    'process_id': Flag('I', 'which of them this is, from 0', ('train',)),
    'profile_steps': Flag('START:COUNT', 'write a profile of these steps for TensorBoard', ('train',)),
    'tasks': Flag('NAME,...', 'tasks to evaluate', ('eval',)),
    'input': Flag('FILE', '.txt (one input a line) or .jsonl; without it the prompt is interactive', ('infer',)),
    'output': Flag('FILE', '.jsonl of answers, .json of a plan; without it they are printed', ('infer', 'compile')),
    'step': Flag('STEP', 'checkpoint to read, default the last; of compile: train, encode or decode',
                 ('eval', 'infer', 'compile')),
    'topology': Flag('SLICE', 'slice to compile for, its shape in chips, as in v5p:4x4x4', ('compile',)),
    'search': Flag('', 'look for the best mesh first', ('compile',)),
    'import': Flag('MODULE', 'import a module of your own first, for its tasks', repeat=True),
    'dry_run': Flag('', 'print the resolved configuration, sizes and learning rates, and stop'),
    'help': Flag('', 'print this text'),
}
# Errors of the machine, not of the program: the message is enough.
OF_THE_MACHINE = ('ENOSPC', 'EDQUOT', 'EROFS', 'EACCES', 'EPERM', 'ENOENT', 'EISDIR', 'ENOTDIR')


def parse(argv: Sequence[str]) -> Arguments:
  """Splits a command line. Raises ConfigError for what it does not know, with the nearest name."""
  from t5x_cpm.config.fields import did_you_mean

  words: list[str] = []
  flags: dict[str, list[str]] = {}
  overrides: list[str] = []
  rest = list(argv)
  while rest:
    word = rest.pop(0)
    if not word.startswith('-') or word == '-':
      words.append(word)
      continue
    name, equals, value = word.lstrip('-').partition('=')
    if name.startswith('gin.'):
      if not equals:
        raise ConfigError(f'{word}: expected --gin.CLASS.FIELD=VALUE or --gin.MACRO=VALUE.')
      overrides.append(f'{name[4:]}={value}')
      continue
    name = 'help' if name == 'h' else name
    if name not in FLAGS:
      hint = f' Did you mean --gin.{word.lstrip("-")}?' if '.' in name else did_you_mean(f'--{name}', [f'--{f}' for f in FLAGS])
      raise ConfigError(f'unknown flag --{name}.{hint} `t5x_cpm --help` lists the flags.')
    if not FLAGS[name].value:
      if equals:
        raise ConfigError(f'--{name} is a switch and takes no value.')
    elif not equals:
      if not rest or rest[0].startswith('--'):
        raise ConfigError(f'--{name} needs a value: --{name}={FLAGS[name].value}.')
      value = rest.pop(0)
    if name in flags and not FLAGS[name].repeat and flags[name] != [value]:
      raise ConfigError(f'--{name} is given twice: {flags[name][0]!r} and {value!r}.')
    flags.setdefault(name, []).append(value)

  mode = words[0] if words else ''
  if 'help' in flags or not (words or flags or overrides):
    return Arguments(mode, {'help': ['']}, [])
  if mode not in MODES:
    given = f'unknown mode {mode!r}' if mode else 'no mode'
    raise ConfigError(f'{given}: expected one of {", ".join(MODES)}.{did_you_mean(mode, MODES)}')
  if len(words) > 1:
    raise ConfigError(f'{words[1]!r} is left over after mode {mode!r}; flags begin with --.')
  for name in flags:
    if FLAGS[name].modes and mode not in FLAGS[name].modes:
      raise ConfigError(f'--{name} is a flag of {" and ".join(FLAGS[name].modes)}, not of {mode}.')
  return Arguments(mode, flags, overrides)


def print_help() -> None:
  """Modes, flags, tasks, models and runs. Imports neither JAX nor TensorFlow."""
  from t5x_cpm.config import gin

  print('usage: python -m t5x_cpm MODE [--flag=value ...] [--gin.CLASS.FIELD=VALUE ...]\n\nmodes')
  for name, text in MODES.items():
    print(f'  {name:<8}{text}')
  print('\nflags')
  for name, flag in FLAGS.items():
    left = f'--{name}={flag.value}'.rstrip('=')
    notes = [*flag.modes, *(['repeat'] if flag.repeat else [])]
    print(f'  {left:<29}{flag.text}' + (f' ({", ".join(notes)})' if notes else ''))
  print(f'  {"--gin.CLASS.FIELD=VALUE":<29}bind a field, as in --gin.TrainConfig.steps=200 (repeat)')
  for folder in ('models', 'runs', 'mesh'):
    print(f'\n{folder} (--gin_file=gin/{folder}/NAME.gin)')
    for name in gin.shipped_files(folder):
      print(f'  {name:<20}{gin.summary(folder, name)}')
  print('\ntasks (--gin.TaskConfig.name=NAME)')
  print_tasks()


def print_tasks() -> None:
  """The registered tasks with a line about each."""
  from t5x_cpm import tasks

  for name, text in tasks.listing().items():
    print(f'  {name:<24}{text}')


def import_modules(names: Sequence[str]) -> None:
  """Imports the user's own modules, which register tasks."""
  if not names:
    return
  from t5x_cpm import tasks

  sys.path.insert(0, os.getcwd())  # a console script, unlike `python -m`, does not look there
  for name in names:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
        raise  # the module is there and fails in an import of its own
      raise ConfigError(f'--import={name}: there is no module {error.name} here ({os.getcwd()}) or installed.') from None
  tasks.remember_modules(list(names))


def make_config(arguments: Arguments) -> Config:
  """The configuration of a command: of the run that it reads, or the defaults, changed by gin files and then by flags."""
  from t5x_cpm import config as config_lib
  from t5x_cpm.checkpoints import run_directory
  from t5x_cpm.config import gin

  mode, model_dir, source = arguments.mode, arguments.get('model_dir'), arguments.get('init_from')
  overrides = list(arguments.overrides)
  if profile := arguments.get('profile_steps'):
    start, _, count = profile.partition(':')
    if not (start.isdigit() and count.isdigit()):
      raise ConfigError(f'--profile_steps={profile}: expected START:COUNT, as in --profile_steps=100:5.')
    overrides += [f'MetricsConfig.profile_start={start}', f'MetricsConfig.profile_steps={count}']
  if mode == 'eval' and arguments.get('step'):
    overrides.append(f'EvalConfig.checkpoints={arguments.get("step")}')
  base = None
  if mode in ('eval', 'infer'):
    base = dataclasses.replace(run_directory.read_run(model_dir, step_of(arguments)).config, mesh=MeshConfig())
  elif source:
    base = origin(source, model_dir)
    overrides.append(f'TrainConfig.init_from={source!r}')

  scope = {'train': 'train', 'compile': 'train', 'cache': 'train', 'eval': 'eval', 'infer': 'eval'}.get(mode, '')
  config = gin.load(arguments.flags.get('gin_file', []), overrides, scope=scope, base=base)
  if base and mode in ('eval', 'infer'):
    changed = [line for line in config_lib.identity_differences(base, config) if line.startswith('ModelConfig.')]
    if changed:
      raise ConfigError(f'the model of {model_dir} cannot be changed:\n  ' + '\n  '.join(changed))
  return config


def origin(source: str, model_dir: str) -> Config:
  """What a run takes over from the run `source`: its model and its vocabulary."""
  from t5x_cpm.checkpoints import run_directory

  if model_dir and run_directory.scan(run_directory.resolve(model_dir))[0]:  # it has them already; the source may be gone
    own = run_directory.read_run(model_dir).config
    return Config(model=own.model, task=TaskConfig(vocabulary=own.task.vocabulary))
  return Config(model=run_directory.read_run(source).config.model, task=TaskConfig(vocabulary=vocabulary_of(source)))


def vocabulary_of(model_dir: str) -> str:
  """The vocabulary of a run as a value of TaskConfig.vocabulary."""
  from t5x_cpm import vocabularies
  from t5x_cpm.checkpoints import run_directory

  run = run_directory.read_run(model_dir)
  with contextlib.suppress(ConfigError):
    if vocabularies.load(run.config.task.vocabulary).fingerprint == run.info['vocabulary']:
      return run.config.task.vocabulary  # under this name caches were made
  return vocabularies.load_saved(run_directory.resolve(model_dir) / 'vocabulary').spec


def step_of(arguments: Arguments) -> int | None:
  """--step as a number. None: the last checkpoint; for `eval` also 'all'."""
  step = arguments.get('step')
  if not step or (step == 'all' and arguments.mode == 'eval'):
    return None
  if not step.isdigit():
    raise ConfigError(f'--step={step}: expected the number of a checkpoint{" or all" if arguments.mode == "eval" else ""}.')
  return int(step)


def dry_run(config: Config) -> None:
  """Prints what a run would be. Touches no accelerator, and of the data only a cache that is there already."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from t5x_cpm.config import gin
  from t5x_cpm.data import reader
  from t5x_cpm.tasks import caches
  from t5x_cpm.training import train

  print(gin.dump(config))
  facts = train.describe(config)
  active = facts['active parameters']
  print(f'parameters        {facts["parameters"]:,}' + (f', {active:,} for one token' if config.model.moe.num_experts else ''))
  print(f'tokens per step   {facts["slots per step"]:,} with padding: {config.train.batch_size} rows of '
        f'{config.task.encoder_length} + {config.task.decoder_length}')
  if caches.is_ready(caches.directory(config)):
    data = reader.open_reader(caches.directory(config), config, 'train')
    train.check_vocabulary(config, data.vocabulary)
    epochs = config.train.steps * config.train.batch_size / data.rows_per_epoch
    print(f'epochs            {epochs:.3g}: {config.train.steps:,} steps, {data.rows_per_epoch:,.0f} rows an epoch')
  else:
    print('epochs            unknown, the task is not cached; `t5x_cpm cache` with the same gin files and flags does it')
  rates = ', '.join(f'{rate:.3g} at step {step:,}' for step, rate in facts['learning rate'].items())
  print(f'learning rate     {rates}')


def start_training(arguments: Arguments, config: Config) -> None:
  """Trains, together with the other processes where there are several."""
  from t5x_cpm.cluster import launch
  from t5x_cpm.config import gin

  model_dir = arguments.get('model_dir')
  place = launch.find_place(*map(arguments.get, ('coordinator', 'num_processes', 'process_id')))
  settings = [f't5x_cpm {t5x_cpm.__version__}', f'--model_dir={model_dir}', *gin.dump(config).splitlines()]
  with launch.together(place, config.processes, settings, tell) as group:
    from t5x_cpm.training import train
    train.run(config, model_dir, group)


def run(arguments: Arguments) -> None:
  """Checks what a mode needs and calls its function."""
  mode, model_dir = arguments.mode, arguments.get('model_dir')
  import_modules(arguments.flags.get('import', []))
  by_mode = {'train': ['model_dir'], 'eval': ['model_dir', 'tasks'], 'infer': ['model_dir'], 'compile': ['topology']}
  needed = by_mode.get(mode, [])
  if 'dry_run' in arguments.flags:
    needed = [] if mode == 'train' else needed[:1]
  for name in needed:
    if not arguments.get(name):
      raise ConfigError(f'{mode} needs --{name}={FLAGS[name].value}.')
  if mode == 'tasks' and 'dry_run' not in arguments.flags:
    print_tasks()
    return
  config = make_config(arguments)
  if mode in ('train', 'cache'):
    from t5x_cpm import tasks
    tasks.identity(config)  # an unknown task is told before JAX starts
  if 'dry_run' in arguments.flags:
    dry_run(config)
  elif mode == 'train':
    backend.keep_memory()
    start_training(arguments, config)
  elif mode == 'compile':
    os.environ['JAX_PLATFORMS'] = 'cpu'  # libtpu compiles; nothing runs
    from t5x_cpm import compile as compile_lib
    compile_lib.run(config, arguments.get('topology'), arguments.get('step') or 'train',
                    search='search' in arguments.flags, output=arguments.get('output'))
  elif mode == 'cache':
    from t5x_cpm.tasks import caches
    print(caches.build(config))
  elif mode == 'eval':
    from t5x_cpm.inference import evaluate
    evaluate.run(config, model_dir, arguments.get('tasks').split(','))
  else:
    from t5x_cpm.inference import generate
    generate.run(config, model_dir, arguments.get('input'), arguments.get('output'), step=step_of(arguments))


def is_users(error: Exception) -> bool:
  """Whether the message of an error is all that a user needs: one that t5x_cpm raised for bad input, or a disk that refuses."""
  if isinstance(error, OSError):
    return errno.errorcode.get(error.errno or 0) in OF_THE_MACHINE
  return isinstance(error, ValueError) and type(error).__module__.split('.')[0] == 't5x_cpm'


def tell(error: BaseException) -> int:
  """Prints an error whose message is enough, and returns the exit code: 2 for bad input. Raises any other."""
  if isinstance(error, KeyboardInterrupt):
    return 130
  if isinstance(error, FloatingPointError) or (isinstance(error, Exception) and is_users(error)):
    print(f'error: {error}', file=sys.stderr)
    return 1 if isinstance(error, FloatingPointError) else 2
  raise error


def main(argv: Sequence[str] | None = None) -> int:
  """The program. Returns its exit code."""
  try:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if 'help' in arguments.flags:
      print_help()
    else:
      run(arguments)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has seen enough
  except (Exception, KeyboardInterrupt) as error:
    return tell(error)
  return 0


if __name__ == '__main__':
  sys.exit(main())
