"""The modes of the program: what each takes, what it does, and an example that runs."""

import contextlib
import dataclasses
import inspect
import os
import sys

import t5x_cpm
from t5x_cpm.cli import configure
from t5x_cpm.cli.errors import tell
from t5x_cpm.cli.parse import Arguments, Flag, Mode, print_table, print_text
from t5x_cpm.config import Config, ConfigError, ModelConfig, TeacherConfig
from t5x_cpm.config.fields import did_you_mean, one_line

GIN_FLAGS = (
    Flag('gin_file', 'FILE', 'gin file, of the current folder or of the package; later ones win', repeat=True),
    Flag('import', 'MODULE', 'import a module of your own first, for its tasks', repeat=True),
    Flag('dry_run', '', 'print the resolved configuration, sizes and learning rates, and stop'),
)
MODEL_DIR = Flag('model_dir', 'DIR', 'folder of the run')
# What `convert` does, with the flags that it takes.
CONVERSIONS = {'hf': ('vocabulary', 'objective'), 'cpm2': ('vocabulary', 'objective'), 'to_hf': ('step',)}
# What `delta` does, with the flags that each needs and those that it also takes.
ON_DELTAS = {'show': (('delta',), ()), 'merge': (('delta', 'output'), ('base',)),
             'average': (('delta', 'output'), ('base', 'weights')), 'to_peft': (('delta', 'output'), ('base',)),
             'from_peft': (('peft', 'base', 'output'), ())}
TEXTS = Flag('input', 'GLOB', 'files of text: .txt, .tsv or .jsonl, also .gz', repeat=True)
FIELD = Flag('field', 'NAME', 'of .jsonl, the field with the text', default='text')
BASE = Flag('base', 'DIR', 'the run whose model a delta is trained on (DeltaConfig.method); also where it has moved')
OTHER_BASE = Flag('allow_other_base', '', 'use a base whose weights are not those that the delta was trained on, and say so')
TEACHER = Flag('teacher', 'DIR', 'the run whose model is the teacher, of the same vocabulary (TeacherConfig); TASK=DIR is that '
               'of one task of a mixture', repeat=True)
TEACHER_CACHE = Flag('teacher_cache', 'DIR', 'folder with what a teacher says of the rows of a run, made by `cache --teacher`')
INIT_FROM = Flag('init_from', 'DIR', 'start from the parameters of another run, with its model and vocabulary')


def train(arguments: Arguments, config: Config) -> None:
  """Trains, together with the other processes where there are several."""
  from t5x_cpm import backend, tasks
  from t5x_cpm.cluster import launch
  from t5x_cpm.config import gin

  tasks.identity(config)  # an unknown task is reported before JAX starts
  backend.keep_memory()
  model_dir = arguments.get('model_dir')
  member = launch.find_member(*map(arguments.get, ('coordinator', 'num_processes', 'process_id')))
  settings = [f't5x_cpm {t5x_cpm.__version__}', f'--model_dir={model_dir}', *gin.dump(config).splitlines()]
  with launch.together(member, config.processes, settings, model_dir, tell) as group:
    from t5x_cpm.inference import in_training
    from t5x_cpm.training import train as training
    training.run(config, model_dir, group, in_training.answers)


def evaluate(arguments: Arguments, config: Config) -> None:
  """Evaluates checkpoints."""
  from t5x_cpm.inference import evaluate as evaluation

  evaluation.run(config, arguments.get('model_dir'), arguments.get('tasks').split(','))


def infer(arguments: Arguments, config: Config) -> None:
  """Answers a file or a prompt."""
  from t5x_cpm.inference import infer as infer_lib

  infer_lib.run(config, *map(arguments.get, ('model_dir', 'input', 'output')), step=configure.checkpoint_step(arguments),
                deltas=configure.named_folders('delta', arguments.get('delta')))


def bundle(arguments: Arguments, config: Config) -> None:
  """Stores a model so that its experts can be read one by one, or reads all of what was stored so."""
  from t5x_cpm.infmoe import write

  model_dir, output, is_dry = map(arguments.get, ('model_dir', 'output', 'dry_run'))
  if arguments.get('verify'):
    if output:
      raise ConfigError('bundle --verify reads the bundle that --model_dir names and writes none: leave --output out.')
    write.verify(model_dir)
    return
  if not output and not is_dry:
    raise ConfigError('bundle needs --output=DIR; with --verify it reads the bundle that --model_dir names.')
  write.write(config, model_dir, output, configure.checkpoint_step(arguments), dry_run=is_dry)


def plan(arguments: Arguments, config: Config) -> None:
  """Says what a model with experts takes on a machine, and how fast it answers there."""
  import pathlib

  from t5x_cpm.infmoe import plan as plan_lib

  given, disk = arguments.get('disk'), 0.0
  if given:
    with contextlib.suppress(ValueError):
      disk = float(given)
    if not 0 < disk < 1e6:
      raise ConfigError(f'--disk={one_line(given)}: expected the rate of a disk in GB/s, such as 1.5.')
  plan_lib.run(config, pathlib.Path.cwd(), disk=disk, measured=arguments.get('measure'))


def compile_step(arguments: Arguments, config: Config) -> None:
  """Compiles a step for a slice of chips."""
  from t5x_cpm import compile as compile_lib

  compile_lib.run(config, arguments.get('topology'), arguments.get('step') or 'train', search=arguments.get('search'),
                  output=arguments.get('output'))


def cache(arguments: Arguments, config: Config) -> None:
  """Makes the cache of a task and prints where it lies and, on stderr, what of the data it holds."""
  from t5x_cpm import tasks
  from t5x_cpm.data import report
  from t5x_cpm.tasks import caches
  from t5x_cpm.training import before

  tasks.identity(config)
  if config.teacher.model_dir:
    from t5x_cpm import backend
    from t5x_cpm.training import teacher_cache

    backend.keep_memory()
    print(teacher_cache.make(config), flush=True)
    return
  if config.teacher.cache:
    raise ConfigError('cache --teacher_cache=DIR needs --teacher=DIR, the run of the teacher that speaks.')
  config = dataclasses.replace(config, teacher=TeacherConfig())  # the text is the same with any teacher
  if config.model == ModelConfig():  # files that say nothing of a model may be cached for any
    before.check_sentinels(config, before.vocabulary(config))
  else:
    before.check(config)
  path = caches.build(config)
  print(path, flush=True)
  for line in report.of_cache(path, config):
    print(f'data: {line}', file=sys.stderr, flush=True)


def convert(arguments: Arguments) -> None:
  """Carries a model over from the files of others, or to those of transformers."""
  what = arguments.get('what')
  if what not in CONVERSIONS:
    raise ConfigError(f'convert {what}: expected convert {", ".join(CONVERSIONS)}.{did_you_mean(what, CONVERSIONS)}')
  for flag in arguments.mode.flags:
    if arguments.get(flag.name) and flag.name not in CONVERSIONS[what]:
      raise ConfigError(f'--{flag.name} is not a flag of convert {what}.')
  source, output = arguments.get('source'), arguments.get('output')
  given = {name: arguments.get(name) for name in ('vocabulary', 'objective')}
  from t5x_cpm.checkpoints import convert as convert_lib
  from t5x_cpm.checkpoints import export

  if what == 'to_hf':
    export.to_huggingface(source, output, step=configure.checkpoint_step(arguments))
  elif what == 'hf':
    convert_lib.from_huggingface(source, output, **given)
  else:
    convert_lib.from_cpm2(source, output, **given)


def show_tensors(arguments: Arguments) -> None:
  """Prints what a checkpoint of any kind holds, or in what two of them differ."""
  from t5x_cpm.checkpoints import inspection

  path, step = arguments.get('path'), configure.checkpoint_step(arguments)
  if arguments.get('diff'):
    inspection.diff(path, arguments.get('diff'), step=step)
  else:
    inspection.show(path, step=step)


def work_on_deltas(arguments: Arguments) -> None:
  """Shows, merges or averages deltas, or carries one over from peft, or to it."""
  action = arguments.get('action')
  if action not in ON_DELTAS:
    raise ConfigError(f'delta {action}: expected delta {", ".join(ON_DELTAS)}.{did_you_mean(action, ON_DELTAS)}')
  needs, takes = ON_DELTAS[action]
  for flag in arguments.mode.flags:
    given = bool(arguments.get(flag.name))
    if flag.name in needs and not given:
      raise ConfigError(f'delta {action} needs --{flag.name}={flag.value}.')
    if given and flag.name not in (*needs, *takes, 'import'):
      raise ConfigError(f'--{flag.name} is not a flag of delta {action}.')
  deltas, base, output = arguments.get('delta'), arguments.get('base'), arguments.get('output')
  if action == 'average' and len(deltas) < 2:
    raise ConfigError('delta average needs --delta=DIR two times or more.')
  if action != 'average' and len(deltas) > 1:
    raise ConfigError(f'delta {action} takes one --delta=DIR, got {len(deltas)}.')
  from t5x_cpm.tuning import average, merge, peft, show

  if action == 'show':
    show.show(deltas[0])
  elif action == 'merge':
    merge.merge(deltas[0], output, base)
  elif action == 'average':
    average.average(deltas, output, arguments.get('weights'), base)
  elif action == 'to_peft':
    peft.to_peft(deltas[0], output, base)
  else:
    peft.from_peft(arguments.get('peft'), base, output)


def inherit(arguments: Arguments, config: Config) -> None:
  """Makes a model from checkpoints of others."""
  from t5x_cpm import inherit as inherit_lib

  inherit_lib.grow(config, arguments.get('source'), arguments.get('model_dir'), dry_run=arguments.get('dry_run'))


def train_vocabulary(arguments: Arguments) -> None:
  """Trains a vocabulary."""
  from t5x_cpm.vocabularies import train as vocabulary

  vocabulary.run(*map(arguments.get, ('input', 'output')), **{
      name: arguments.get(name) for name in ('field', 'size', 'sentinels', 'byte_fallback', 'extends')})


def report_tokens(arguments: Arguments) -> None:
  """Prints how well a vocabulary fits some text."""
  from t5x_cpm.vocabularies import report

  report.run(*map(arguments.get, ('vocabulary', 'input')), field=arguments.get('field'), compared=arguments.get('differences'))


def list_tasks(arguments: Arguments, config: Config) -> None:
  """Prints the registered tasks with a line about each."""
  from t5x_cpm import tasks

  print_table(tasks.listing().items())


def list_files(arguments: Arguments) -> None:
  """Prints the gin files of the package with a line about each."""
  from t5x_cpm.config import gin

  for folder in ('models', 'runs', 'mesh'):
    print(f'{folder}: --gin_file=gin/{folder}/NAME.gin')
    print_table((name, gin.summary(folder, name)) for name in gin.shipped_files(folder))


def list_fields(arguments: Arguments) -> None:
  """Prints every field of one configuration class, or of all."""
  from t5x_cpm.config import describe

  chosen = [describe.find(arguments.get('class'))] if arguments.get('class') else list(describe.classes())
  for number, cls in enumerate(chosen):
    print(('\n' if number else '') + cls.__name__)
    print_text(inspect.cleandoc(cls.__doc__ or ''), 2)
    for field in describe.fields(cls):
      print(f'\n  {field.name}: {field.kind} = {field.default!r}' + (' (may change on resume)' if field.free else ''))
      print_text(field.comment, 6)


MODES = {mode.name: mode for mode in (
    Mode('train', 'pre-train or fine-tune; the same command again continues where it stopped', train, """\
t5x_cpm train --gin_file=gin/models/cpm2_tiny.gin --gin_file=gin/runs/quickstart.gin \\
    --gin.TrainConfig.steps=20 --model_dir=runs/example""",
         flags=(MODEL_DIR, INIT_FROM, BASE, OTHER_BASE, TEACHER, TEACHER_CACHE, *GIN_FLAGS,
                Flag('profile_steps', 'START:COUNT', 'write a profile of these steps for TensorBoard'),
                Flag('coordinator', 'HOST:PORT',
                     'where process 0 of several is; SLURM, Open MPI and TPUs say it themselves'),
                Flag('num_processes', 'N', 'how many processes run this command'),
                Flag('process_id', 'I', 'which of them this is, from 0')),
         needs=('model_dir',), scope='train',
         gin=('ModelConfig', 'MoEConfig', 'MeshConfig', 'TaskConfig', 'LocalTaskConfig', 'OptimizerConfig', 'TrainConfig',
              'CheckpointConfig', 'ProcessesConfig', 'MetricsConfig', 'EvalConfig', 'DecodeConfig', 'DeltaConfig',
              'TeacherConfig')),
    Mode('eval', 'evaluate checkpoints on tasks: metrics, predictions and a table', evaluate, """\
t5x_cpm eval --model_dir=runs/example --tasks=quickstart --gin.EvalConfig.max_examples=64""",
         flags=(MODEL_DIR, BASE, OTHER_BASE, Flag('tasks', 'NAME,...', 'tasks to evaluate'),
                Flag('step', 'STEP', 'checkpoint to read, or all; default the last'), *GIN_FLAGS),
         needs=('model_dir', 'tasks'), scope='eval',
         gin=('EvalConfig', 'DecodeConfig', 'InferConfig', 'MeshConfig', 'OffloadConfig', 'TaskConfig', 'LocalTaskConfig')),
    Mode('infer', 'answer a file of inputs, or a prompt; a blank is written <span>', infer, """\
printf 'She opened the <span> and looked outside.\\n' > runs/blanks.txt
t5x_cpm infer --model_dir=runs/example --input=runs/blanks.txt --output=runs/answers.jsonl""",
         flags=(MODEL_DIR, BASE, OTHER_BASE,
                Flag('input', 'FILE', '.txt (one input a line) or .jsonl, whose other fields its answer carries too; - reads '
                     'standard input as .txt, -.jsonl as .jsonl; without it the prompt is interactive'),
                Flag('output', 'FILE', '.jsonl of answers, or .txt of their texts, one a line (a line feed in it as \\n); '
                     'without it they are printed'),
                Flag('delta', 'NAME=DIR', 'serve the delta of this run beside the model: it answers the lines of a .jsonl that '
                     'have its name in the field delta', repeat=True),
                Flag('step', 'STEP', 'checkpoint to read; default the last'), *GIN_FLAGS),
         needs=('model_dir',), scope='eval', gin=('InferConfig', 'DecodeConfig', 'MeshConfig', 'OffloadConfig', 'DeltaConfig')),
    Mode('compile', 'compile a step for a TPU slice on any machine: memory, collectives, bound on its time', compile_step, """\
t5x_cpm compile --gin_file=gin/models/cpm2_tiny.gin --gin_file=gin/runs/pretrain.gin \\
    --topology=v5e:2x2""",
         flags=(Flag('topology', 'SLICE', 'slice to compile for, its shape in chips, as in v5p:4x4x4'),
                Flag('step', 'STEP', 'train, encode or decode; default train'),
                Flag('search', '', 'look for the best mesh first'),
                Flag('output', 'FILE', '.json of the plan, with the mesh of --search as .gin beside it'), BASE,
                TEACHER, TEACHER_CACHE, *GIN_FLAGS),
         needs=('topology',), scope='train', on_cpu=True,  # libtpu compiles; nothing runs
         gin=('ModelConfig', 'MoEConfig', 'MeshConfig', 'TaskConfig', 'OptimizerConfig', 'TrainConfig', 'InferConfig',
              'DecodeConfig', 'DeltaConfig', 'TeacherConfig')),
    Mode('cache', 'turn the text of a task into tokens, or a run\'s rows into what a teacher says of them, once', cache, """\
t5x_cpm cache --gin_file=gin/runs/quickstart.gin""",
         flags=(INIT_FROM, BASE, TEACHER, TEACHER_CACHE, *GIN_FLAGS), scope='train',
         gin=('TaskConfig', 'LocalTaskConfig', 'TeacherConfig')),
    Mode('convert', 'carry a model over from transformers, or to it: T5, T5 1.1, mT5, Switch; from CPM-2', convert, """\
t5x_cpm convert to_hf runs/example runs/example_hf
t5x_cpm convert hf runs/example_hf runs/example_back""",
         words=(Flag('what', '|'.join(CONVERSIONS), 'from transformers, from the files that CPM-2 was published in, or to '
                     'transformers'),
                Flag('source', 'SOURCE', 'what is read: the folder of its files; of to_hf, a model_dir'),
                Flag('output', 'DIR', 'what is made: a new model_dir with a checkpoint of step 0; of to_hf, a new folder')),
         flags=(Flag('vocabulary', 'KIND:FILE', 'hf, cpm2: such as sentencepiece:FILE; default, of hf, what lies in SOURCE'),
                Flag('objective', 'NAME', 'hf, cpm2: how it was trained; default t5, for CPM vocabularies isolated'),
                Flag('step', 'STEP', 'to_hf: checkpoint to read; default the last')),
         needs=('what', 'source', 'output'), on_cpu=True),
    Mode('inspect', 'say what a checkpoint of any format holds, tensor by tensor, or in what two differ', show_tensors, """\
t5x_cpm inspect runs/example_hf
t5x_cpm inspect runs/example --diff=runs/example_hf""",
         words=(Flag('path', 'DIR|FILE', 'a run, a delta, a folder of transformers or peft, the files of CPM-2, .safetensors, '
                     'or what torch saved'),),
         flags=(Flag('diff', 'OTHER', 'another one: what is only in one, has other shapes or values, and how much is equal'),
                Flag('step', 'STEP', 'of a run: checkpoint to read; default the last')),
         needs=('path',), on_cpu=True),
    Mode('inherit', 'make a model from what trained ones have learned: other words, more layers, experts', inherit, """\
t5x_cpm inherit --source=runs/example --model_dir=runs/grown \\
    --gin_file=gin/runs/inherit_experts.gin --gin.MoEConfig.num_experts=4""",
         flags=(Flag('source', 'DIR', 'model_dir of the run whose last checkpoint is grown; DIR@STEP is another; several for '
                     'growths that make one model of them', repeat=True),
                Flag('model_dir', 'DIR', 'new folder of the larger model, for `train --init_from`'), *GIN_FLAGS),
         needs=('source', 'model_dir'), scope='train', on_cpu=True, tells=True,
         gin=('InheritConfig', 'ModelConfig', 'MoEConfig', 'TaskConfig')),
    Mode('bundle', 'store a model so that it runs where its experts do not fit, each read when it is needed', bundle, """\
t5x_cpm bundle --model_dir=runs/grown --output=runs/example_bundle
t5x_cpm infer --model_dir=runs/example_bundle --input=runs/blanks.txt""",
         flags=(MODEL_DIR, Flag('output', 'DIR', 'new folder of the bundle, which `infer` and `eval` read as --model_dir'),
                Flag('verify', '', 'read all of the bundle that --model_dir names, and say whether it is intact'),
                Flag('step', 'STEP', 'checkpoint to read; default the last'), *GIN_FLAGS),
         needs=('model_dir',), scope='eval', on_cpu=True, tells=True, gin=('OffloadConfig',)),
    Mode('plan', 'say what a model with experts takes on a machine, and how fast it answers there', plan, """\
t5x_cpm plan --gin_file=gin/models/cpm2_moe_198b.gin --gin.OffloadConfig.memory_gib=32 \\
    --gin.OffloadConfig.format=int4 --gin.OffloadConfig.dense_format=int8""",
         flags=(Flag('disk', 'GB/S', 'rate of the disk that experts are read from; default as measured, or assumed'),
                Flag('measure', '', 'measure the disk and the products of this machine first, and remember them'), *GIN_FLAGS),
         scope='train', on_cpu=True, gin=('ModelConfig', 'MoEConfig', 'OffloadConfig', 'InferConfig', 'TaskConfig',
                                          'DecodeConfig')),
    Mode('delta', 'show, merge or average deltas; carry one over from peft, or to it', work_on_deltas, """\
printf '{"inputs": "1 + %d", "targets": "x"}\\n' 1 2 3 4 5 6 7 8 > runs/pairs.jsonl
t5x_cpm train --base=runs/example --gin_file=gin/runs/lora.gin --model_dir=runs/example_lora \\
    --gin.LocalTaskConfig.files=runs/pairs.jsonl --gin.TrainConfig.steps=5 \\
    --gin.LocalTaskConfig.validation_files=runs/pairs.jsonl
t5x_cpm delta show --delta=runs/example_lora
t5x_cpm delta merge --delta=runs/example_lora --output=runs/merged""",
         words=(Flag('action', '|'.join(ON_DELTAS),
                     'what to do; merge writes a plain model_dir, the others folders of a delta'),),
         flags=(Flag('delta', 'DIR', 'folder of a delta, or model_dir of its run; of average two or more', repeat=True), BASE,
                Flag('output', 'DIR', 'new folder to write'),
                Flag('weights', 'X,...', 'average: the share of each delta, 1 in all; default equal'),
                Flag('peft', 'DIR', 'from_peft: folder with adapter_config.json'), GIN_FLAGS[1]),
         needs=('action',), on_cpu=True),
    Mode('vocabulary', 'train a vocabulary on text files, in the manner of CPM-2', train_vocabulary, """\
t5x_cpm vocabulary --input='tasks/corpus/??.txt' --size=2000 --output=runs/vocab.txt""",
         flags=(TEXTS, FIELD, Flag('size', 'N', 'pieces in all, special tokens included', kind=int, default=8000),
                Flag('sentinels', 'N', 'marks of masked spans', kind=int, default=100),
                Flag('byte_fallback', '', 'add the 256 bytes: every text can be written without loss'),
                Flag('extends', 'FILE', 'vocab.txt whose pieces come first, each with its id: for `inherit`'),
                Flag('output', 'FILE', 'vocab.txt to write; used as TaskConfig.vocabulary = cpm2:FILE')),
         needs=('input', 'output')),
    Mode('tokenize', 'measure how a vocabulary fits text: length, speed, what is lost and why', report_tokens, """\
t5x_cpm tokenize --vocabulary=cpm2:tasks/corpus/vocab.txt --input='tasks/corpus/??.txt'""",
         flags=(Flag('vocabulary', 'KIND:FILE', 'as in TaskConfig.vocabulary'), TEXTS, FIELD,
                Flag('differences', 'N', 'texts whose losses are looked at one by one', kind=int, default=2000)),
         needs=('vocabulary', 'input')),
    Mode('tasks', 'list the tasks and mixtures that TaskConfig.name and --tasks may name', list_tasks, """\
t5x_cpm tasks""", flags=GIN_FLAGS, gin=('TaskConfig',)),
    Mode('fields', 'list every field that gin can bind, with its type, default and meaning', list_fields, """\
t5x_cpm fields TrainConfig""", words=(Flag('class', '[CLASS]', 'a configuration class; without it all of them'),)),
    Mode('files', 'list the gin files that ship: models, runs and meshes', list_files, """\
t5x_cpm files"""),
)}


def run(arguments: Arguments) -> None:
  """Checks what a mode needs and calls its function."""
  mode = arguments.mode
  is_dry = arguments.get('dry_run')
  if is_dry or mode.on_cpu:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported, which is when JAX reads it
  configure.import_modules(arguments.get('import'))
  for name in mode.needs:
    # A dry run needs only the run that it reads, if any.
    if not arguments.get(name) and (not is_dry or name == 'source' or (name == 'model_dir' and mode.scope == 'eval')):
      raise ConfigError(f'{mode.name} needs {mode.call(name)}.')
  if not mode.gin:
    mode.function(arguments)
    return
  config = configure.make_config(arguments)
  if is_dry and not mode.tells:
    configure.dry_run(config)
    if mode.name == 'train':
      from t5x_cpm.training import before

      before.check(config, arguments.get('model_dir'))
  else:
    mode.function(arguments, config)
