"""The command line: help, dry run, and what a mistake says. Runs in this process except where start-up itself is tested."""

import errno
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import small_data

import t5x_cpm
from t5x_cpm import __main__, tasks, vocabularies
from t5x_cpm import config as config_lib
from t5x_cpm.cli import configure, modes, parse
from t5x_cpm.config import Config, describe, gin

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ('--gin_file=gin/models/cpm2_tiny.gin', '--gin_file=gin/runs/quickstart.gin')


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
  """call(*argv) -> (exit code, stdout, stderr), in an empty current folder with an empty cache."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('T5X_CPM_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(tasks, '_modules', {})

  def run(*argv):
    code = __main__.main(argv)
    return code, *capsys.readouterr()

  return run


def test_help_is_short_and_quick_and_needs_no_jax():
  code = ('import sys; from t5x_cpm.__main__ import main; main(sys.argv[1:]); '
          'heavy = {"jax", "tensorflow", "numpy", "seqio"} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)')
  for argv in (['--help'], ['train', '--help']):
    started = time.monotonic()
    result = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert time.monotonic() - started < 3
    assert result.returncode == 0, result.stderr
  names = re.findall(r'^  ([a-z]+) ', subprocess.run(
      [sys.executable, '-m', 't5x_cpm'], capture_output=True, text=True, cwd=ROOT, check=True).stdout, re.MULTILINE)
  assert names == list(modes.MODES)


def test_help_fits_a_screen(call):
  code, out, _ = call('--help')
  assert code == 0 and out == call()[1] == call('-h')[1]
  assert out.count('\n') < 40
  for argv in (['--help'], ['files'], ['tasks'], *([name, '--help'] for name in modes.MODES)):
    out = call(*argv)[1]
    assert out and max(map(len, out.splitlines())) <= 100, argv


@pytest.mark.parametrize('name', modes.MODES)
def test_help_of_a_mode_has_its_flags_gin_classes_and_an_example(call, name):
  mode = modes.MODES[name]
  code, out, error = call(name, '--help')
  assert (code, error) == (0, '')
  assert call('--help', name)[1] == call(name, '-h')[1] == out
  assert set(re.findall(r'^  --(\w+)', out, re.MULTILINE)) == {flag.name for flag in mode.flags} | {'help'}
  for line in mode.example.splitlines():
    assert f'  {line}\n' in out
  assert all(mode.call(name) != name for name in mode.needs)
  for cls in mode.gin:
    assert hasattr(config_lib, cls) and cls in out
  assert ('--gin_file' in out.partition('\nexample\n')[0]) == bool(mode.gin)


def test_version(call):
  assert call('--version') == (0, f't5x_cpm {t5x_cpm.__version__}\n', '')


def test_files_lists_what_ships(call):
  out = call('files')[1]
  for folder in ('models', 'runs', 'mesh'):
    for name in gin.shipped_files(folder):
      assert re.search(rf'^  {name} +\w', out, re.MULTILINE), name


def test_fields_lists_and_explains_every_field(call):
  code, out, error = call('fields')
  assert (code, error) == (0, '')
  assert max(map(len, out.splitlines())) <= 100
  found = dict(re.findall(r'^(\w+)\n(.*?)(?=^\w|\Z)', out, re.MULTILINE | re.DOTALL))
  assert set(found) == {line.partition('.')[0] for line in gin.dump(Config()).splitlines() if line}
  for binding in filter(None, gin.dump(Config()).splitlines()):
    cls, field, default = re.fullmatch(r'(\w+)\.(\w+) = (.*)', binding).groups()
    entry = re.search(rf'^  {field}: (.+) = {re.escape(default)}( \(may change on resume\))?\n((?:      .+\n)*)', found[cls],
                      re.MULTILINE)
    assert entry, binding
    explained = len(entry[3].strip()) > 5 or f'`{field}`' in getattr(config_lib, cls).__doc__
    assert explained, f'{cls}.{field} needs a comment beside it, or a word in the docstring of its class'
  assert call('fields', 'MoEConfig')[1].strip() == f'MoEConfig\n{found["MoEConfig"]}'.strip()


def test_fields_reads_comments_beside_and_above():
  by_name = {field.name: field for field in describe.fields(config_lib.MoEConfig)}
  assert by_name['router'].comment.startswith("'switch', 'top_k'")  # above
  assert by_name['top_k'].comment.startswith('experts of a token') and by_name['top_k'].default == 2  # beside
  assert describe.fields(config_lib.TrainConfig)[0] == describe.Field(
      'steps', 'int', 1000, True, 'steps of the whole run, those before a resume included')
  assert 'moe' not in {field.name for field in describe.fields(config_lib.ModelConfig)}
  assert {name for name in by_name if by_name[name].free} == set()


def test_flags_stand_anywhere_with_or_without_equals():
  for argv in (['train', '--model_dir=x', '--gin_file=a', '--gin.A.b={1: 2}', '--gin_file', 'b', '--dry_run'],
               ['--model_dir', 'x', '--gin_file', 'a', 'train', '--dry_run', '--gin.A.b={1: 2}', '--gin_file=b',
                '--model_dir=x']):
    arguments = parse.parse(argv, modes.MODES)
    assert arguments.mode.name == 'train' and arguments.overrides == ['A.b={1: 2}']
    assert (arguments.get('model_dir'), arguments.get('gin_file'), arguments.get('dry_run')) == ('x', ['a', 'b'], True)
    assert arguments.get('step') == arguments.get('init_from') == ''


def test_tasks(call):
  code, out, _ = call('tasks')
  assert code == 0
  assert re.search(r'^  quickstart +\w', out, re.MULTILINE)


@pytest.mark.parametrize('argv, message', [
    (['trian'], 'unknown mode .trian.*Did you mean train'),
    (['--dry_run'], 'no mode: expected one of train, eval, infer, compile, cache, convert'),
    (['tasks', '--step=3'], '--step is a flag of eval, infer, compile, convert, inspect and bundle, not of tasks'),
    (['fields', 'TrianConfig'], 'unknown class TrianConfig: expected one of .*MoEConfig.*Did you mean TrainConfig'),
    (['files', '--gin.TrainConfig.steps=3'], 'files reads no gin configuration'),
    (['train', '--model_dri=x'], 'unknown flag --model_dri. Did you mean --model_dir'),
    (['train', '--TrainConfig.steps=3'], r'Did you mean --gin\.TrainConfig\.steps=3'),
    (['train', '--model_dir'], '--model_dir needs a value: --model_dir=DIR'),
    (['train', '--model_dir', '--dry_run'], '--model_dir needs a value'),
    (['train', '--dry_run=maybe'], 'is a switch'),
    (['train', '--model_dir=a', '--model_dir=b'], 'given twice'),
    (['train', '--tasks=a'], '--tasks is a flag of eval, not of train'),
    (['train', 'more'], "'more' is left over"),
    (['train', '--gin.TrainConfig.steps'], r'expected --gin\.CLASS\.FIELD=VALUE'),
    (['train'], 'train needs --model_dir=DIR'),
    (['infer'], 'infer needs --model_dir=DIR'),
    (['eval', '--model_dir=x'], 'eval needs --tasks=NAME'),
    (['eval', '--model_dir=x', '--tasks=a', '--step=last'], '--step=last: expected the number of a checkpoint or all'),
    (['infer', '--model_dir=nowhere'], 'No checkpoint in .*nowhere: the directory does not exist'),
    (['train', '--model_dir=x', '--allow_other_base'], 'is for the base of a delta, and this run trains none'),
    (['train', '--model_dir=x', '--init_from=nowhere'], 'No checkpoint in .*nowhere'),
    (['train', '--model_dir=x', '--profile_steps=5'], 'expected START:COUNT'),
    (['train', '--model_dir=x', '--import=no_such_module'], '--import=no_such_module: there is no module no_such_module'),
    (['train', '--model_dir=x', '--gin_file=gin/runs/pretrian.gin'], 'Did you mean gin/runs/pretrain.gin'),
    (['train', '--model_dir=x', '--gin.TrainConfig.stps=3'], 'Did you mean steps'),
    (['train', '--model_dir=x', '--gin_file=gin/models/cpm2_moe_tiny.gin', '--gin.MoEConfig.router=swich'],
     r'Did you mean switch.*\(set in --gin\.MoEConfig\.router=swich\)'),
    (['train', '--model_dir=x', '--gin.STPES=3'], 'macro STPES is defined but never used'),
    (['train', '--model_dir=x', *TINY, '--gin.TaskConfig.name=quickstrat'], 'quickstrat.*did you mean quickstart'),
    (['train', '--model_dir=x', *TINY, '--gin.TaskConfig.name=local', '--gin.LocalTaskConfig.files=none/*.txt',
      '--gin.TaskConfig.vocabulary=cpm2:none.txt'], r'none'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_mistakes_are_told_in_a_line(call, argv, message):
  code, out, error = call(*argv)
  assert code == 2
  assert error.startswith('error: ')
  assert error.count('\n') <= 4
  assert 'Traceback' not in error
  assert re.search(message, error, re.DOTALL), error
  assert not out
  assert not pathlib.Path('x').exists()  # nothing was made before the mistake was found


def test_exit_code_of_the_program(tmp_path):
  result = subprocess.run([sys.executable, '-m', 't5x_cpm', 'train', '--gin.X=1', '--model_dir=x'], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert (result.returncode, result.stdout, result.stderr.count('\n')) == (2, '', 1)


def test_an_error_of_the_program_keeps_its_traceback(call, monkeypatch):
  def fail(*arguments):
    raise ValueError('a bug')

  monkeypatch.setattr(configure, 'make_config', fail)
  with pytest.raises(ValueError, match='a bug'):
    call('cache')


@pytest.mark.parametrize('error, code', [
    (OSError(errno.ENOSPC, 'No space left on device'), 2), (FloatingPointError('loss = nan at step 3'), 1),
    (KeyboardInterrupt(), 130)])
def test_errors_that_need_no_traceback(call, monkeypatch, error, code):
  def fail(*arguments):
    raise error

  monkeypatch.setattr(configure, 'make_config', fail)
  found, _, text = call('cache')
  assert found == code
  assert text == (f'error: {error}\n' if code != 130 else '')


def test_dry_run_says_what_a_run_would_be(call):
  code, out, _ = call('train', *TINY, '--gin.TrainConfig.steps=50', '--gin.TrainConfig.batch_size=4', '--dry_run')
  assert code == 0
  text, facts = out.split('parameters ')
  pathlib.Path('resolved.gin').write_text(text)
  resolved = gin.load(['resolved.gin'])  # what it prints is a gin file
  assert (resolved.train.steps, resolved.train.batch_size, resolved.task.name) == (50, 4, 'quickstart')
  assert re.search(r'^ +3,\d{3},\d{3}$', facts, re.MULTILINE)
  slots = 4 * (resolved.task.encoder_length + resolved.task.decoder_length)
  assert f'tokens per step   {slots:,} ' in facts
  assert 'the task has no cache' in facts
  assert re.search(r'learning rate +[\d.e-]+ at step 0, .* at step 50\b', facts, re.MULTILINE)
  assert sorted(os.listdir()) == ['resolved.gin']  # nothing was cached or made


def test_dry_run_counts_epochs_where_there_is_a_cache(call, tmp_path):
  config = small_data.make_config(tmp_path, encoder_length=64, decoder_length=32)
  documents = small_data.random_documents(np.random.default_rng(0), [100] * 400)
  vocabulary = small_data.fill(config, {'train': {'targets': documents}})
  argv = ('train', '--dry_run', *TINY, '--gin.TaskConfig.name=wiki_zh', f'--gin.TaskConfig.vocabulary={config.task.vocabulary}',
          f'--gin.TaskConfig.cache_dir={tmp_path}', '--gin.TaskConfig.encoder_length=64', '--gin.TaskConfig.decoder_length=32')
  code, out, error = call(*argv, f'--gin.ModelConfig.vocab_size={vocabulary.size}')
  assert code == 0, error
  found = re.search(r'^epochs +([\d.]+): ([\d,]+) steps, ([\d,]+) rows an epoch', out, re.MULTILINE)
  assert found, out
  epochs, steps, rows = (float(value.replace(',', '')) for value in found.groups())
  assert 400 < rows < 1200  # a document of 100 tokens is cut into two pieces of up to 64, of which few share a row
  batch_size = gin.load(['gin/runs/quickstart.gin']).train.batch_size
  assert epochs == pytest.approx(steps * batch_size / rows, rel=0.01)
  code, _, error = call(*argv, '--gin.ModelConfig.vocab_size=900')  # a mistake that only the cache tells
  assert code == 2
  assert f'set ModelConfig.vocab_size = {vocabulary.size}' in error


def test_dry_run_of_11_billion_parameters_is_quick(call):
  started = time.monotonic()
  code, out, error = call('train', '--gin_file=gin/models/cpm2_11b.gin', '--gin_file=gin/runs/pretrain.gin', '--dry_run')
  assert '11,297,861,632' in out
  assert code == 2 and 'set ModelConfig.vocab_size = 3200' in error  # it is not the vocabulary of the quickstart
  assert time.monotonic() - started < 10


def test_own_tasks_are_imported_from_the_current_folder(call):
  pathlib.Path('my_module.py').write_text('raise_here = 1\nimport no_such_thing_at_all\n')
  with pytest.raises(ModuleNotFoundError, match='no_such_thing_at_all'):  # the mistake is in the module: its traceback helps
    call('tasks', '--import=my_module')
  pathlib.Path('other_module.py').write_text('open("imported", "w").close()\n')
  assert call('tasks', '--import=other_module')[0] == 0
  assert pathlib.Path('imported').exists()


@pytest.mark.parametrize('flag', [
    '--import=.x', '--import=a..b', '--import=\ud800', '--import=a\x1bb', '--import=--', '--init_from=a\0b', '--init_from=--',
    '--init_from=\x1b[31m', '--gin_file=a\nb', '--profile_steps=²:³', '--gin.x\ny=1', '--init_from=' + 'x' * 5000])
def test_what_is_typed_comes_back_in_a_printable_line(call, flag):
  code, _, error = call('train', '--dry_run', flag)
  assert code == 2 and error.startswith('error: ') and error[-1] == '\n' and error[:-1].isprintable() and len(error) < 1000


def test_a_module_that_registers_a_name_twice_is_refused(call):
  pathlib.Path('twice.py').write_text("raise ValueError('Attempting to register duplicate provider: mine')\n")  # as SeqIO does
  code, _, error = call('tasks', '--import=twice')
  assert code == 2 and error.count('\n') == 1 and 'under a name that exists: Attempting to register duplicate' in error


def test_a_run_brings_its_modules_and_finds_its_files_from_any_folder(call, tmp_path, monkeypatch):
  config = gin.load(['gin/models/cpm2_tiny.gin'], ['TaskConfig.vocabulary=cpm2:vocab.txt', 'LocalTaskConfig.files=a/*.txt'])
  for name in ('my_first', 'my_second'):
    pathlib.Path(f'{name}.py').write_text(f'open("{tmp_path}/{name}.imported", "a").close()\n')
  monkeypatch.setattr(tasks, '_modules', {'my_first': '', 'my_second': ''})
  fake_run('run', config)
  monkeypatch.setattr(tasks, '_modules', {})
  (tmp_path / 'other').mkdir()
  shutil.copy('my_first.py', 'other')
  monkeypatch.chdir(tmp_path / 'other')
  code, out, error = call('eval', '--model_dir=../run', '--dry_run', '--gin.LocalTaskConfig.validation_files=here.txt')
  assert code == 0, error
  assert f"TaskConfig.vocabulary = 'cpm2:{tmp_path}/vocab.txt'" in out
  assert f"LocalTaskConfig.files = '{tmp_path}/a/*.txt'" in out and "LocalTaskConfig.validation_files = 'here.txt'" in out
  assert (tmp_path / 'my_first.imported').exists() and not (tmp_path / 'my_second.imported').exists()
  assert 'with --import=my_second, which cannot be imported here' in error and f'PYTHONPATH={tmp_path} ' in error


def fake_run(folder: str, config: Config) -> vocabularies.Vocabulary:
  """A model_dir with a vocabulary, and a checkpoint that has a description and no arrays."""
  from t5x_cpm.checkpoints import run_directory
  step = pathlib.Path(folder) / 'checkpoints' / '3'
  (step / 'meta').mkdir(parents=True)
  (step / run_directory.COMMIT_MARK).touch()
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(pathlib.Path())}')
  vocabulary.save(pathlib.Path(folder) / 'vocabulary')
  described = run_directory.describe(config, {'vocabulary': vocabulary.fingerprint}) | {'metrics': {}}
  (step / 'meta' / 'metadata').write_text(json.dumps(described))
  return vocabulary


def test_reading_modes_take_the_configuration_of_the_run(call):
  config = gin.load(['gin/models/cpm2_tiny.gin'], ['TrainConfig.seed=11', 'DecodeConfig.beam_size=7'])
  fake_run('run', config)
  code, out, error = call('infer', '--model_dir=run', '--gin.DecodeConfig.rule=beam', '--dry_run')
  assert code == 0, error
  assert "DecodeConfig.rule = 'beam'" in out
  assert 'DecodeConfig.beam_size = 7' in out
  assert 'TrainConfig.seed = 11' in out
  code, _, error = call('infer', '--model_dir=run', '--gin.ModelConfig.d_model=64')
  assert code == 2
  assert 'ModelConfig.d_model: 192 in the checkpoint, 64 now' in error
  code, _, error = call('eval', '--model_dir=run', '--tasks=a', '--step=4')
  assert code == 2
  assert '4' in error


@pytest.mark.parametrize('named', ['cpm2:vocab.txt', ''])
def test_init_from_brings_the_model_and_the_vocabulary(call, tmp_path, named):
  size = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}').size
  fake_run('run', gin.load(['gin/models/cpm2_tiny.gin'], [
      'TrainConfig.seed=11', f'TaskConfig.vocabulary={named}', f'ModelConfig.vocab_size={size}']))
  code, out, error = call('train', '--init_from=run', '--gin_file=gin/runs/finetune.gin', '--dry_run',
                          '--gin.TaskConfig.name=quickstart_arithmetic')
  assert code == 0, error
  assert 'ModelConfig.d_model = 192' in out
  assert 'ModelConfig.dropout_rate = 0.1' in out
  assert "TrainConfig.init_from = 'run'" in out
  assert 'TrainConfig.seed = 0' in out  # the rest is of this run
  # By the name it had there, or, where that was the task's own, from the model_dir.
  assert f'TaskConfig.vocabulary = {named or f"cpm2:{tmp_path}/run/vocabulary/vocab.txt"!r}' in out


@pytest.mark.slow
def test_examples_of_help_run(tmp_path):
  """The examples of all modes, in the order of the table, from the top of a clone."""
  for path in ROOT.iterdir():
    if not path.name.startswith('.') and path.name not in ('runs', 'tour'):
      (tmp_path / path.name).symlink_to(path)
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'T5X_CPM_CACHE': str(tmp_path / 'cache'), 'PYTHONPATH': str(ROOT)}
  environment['XLA_FLAGS'] = '--xla_backend_optimization_level=0'  # without XLA:CPU's flags that libtpu does not know
  for mode in modes.MODES.values():
    if mode.name == 'compile' and importlib.util.find_spec('libtpu') is None:
      continue  # an extra
    script = f't5x_cpm() {{ "{sys.executable}" -m t5x_cpm "$@"; }}\nset -euo pipefail\n{mode.example}'
    done = subprocess.run(['bash', '-c', script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f'{mode.example}\n{done.stdout}\n{done.stderr}'
  assert (tmp_path / 'runs' / 'answers.jsonl').exists() and (tmp_path / 'runs' / 'example_back' / 'config.json').exists()
