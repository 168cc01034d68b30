"""Whose a model_dir is, which of its checkpoints are complete, and what they say of their run."""

import dataclasses
import json
import math
import shutil

import pytest
from small_run import INFO, config, saved, tmpfs

from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.arrays import load_params
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.checkpoints.run_directory import CheckpointError, read_run
from t5x_cpm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def test_read_run(tmp_path):
  cfg = Config(model=ModelConfig(d_model=64), train=TrainConfig(steps=7))
  saved(tmp_path, (1, 3), cfg, {3: {'eval/loss': 2.5}})
  run = read_run(tmp_path)
  assert (run.config, run.step, run.info, run.steps, run.metrics) == (cfg, 3, INFO, [1, 3], {'eval/loss': 2.5})
  assert read_run(tmp_path, 1).step == 1
  assert json.loads((tmp_path / 'config.json').read_text())['info'] == INFO


def test_a_start_reads_each_description_once(tmp_path, monkeypatch):
  saved(tmp_path, (1, 2, 3), None, {2: {'eval/loss': math.nan}, 3: {'eval/loss': math.inf}})  # neither of which JSON has
  assert [math.isfinite(read_run(tmp_path, step).metrics['eval/loss']) for step in (2, 3)] == [False, False]
  calls, real = [], run_directory.read_meta
  monkeypatch.setattr(run_directory, 'read_meta', lambda model_dir, step: (calls.append(step), real(model_dir, step))[1])
  Manager(tmp_path, config(), info=INFO).close()
  assert calls == [3, 1, 2, 3]  # the last is compared with the configuration first


@pytest.mark.parametrize('make, reason', [
    (lambda path: None, 'the directory does not exist'),
    (lambda path: path.mkdir(), 'not the model_dir of a run'),
    (lambda path: Manager(path, config(), info=INFO).close(), 'stopped before the first one was complete')])
def test_no_checkpoint_says_why(tmp_path, make, reason):
  make(tmp_path / 'run')
  with pytest.raises(CheckpointError, match=reason):
    read_run(tmp_path / 'run')
  with pytest.raises(CheckpointError, match=reason):
    load_params(tmp_path / 'run')


def test_a_folder_of_runs_names_them(tmp_path):
  for name in ('model', 'untrained'):
    saved(tmp_path / 'runs' / name)
  (tmp_path / 'runs' / 'stories.txt').touch()
  (tmp_path / 'runs' / 'empty').mkdir()
  folder = tmp_path / 'runs'
  with pytest.raises(CheckpointError, match=f'no config.json.; did you mean {folder}/model or {folder}/untrained\\?$'):
    read_run(folder)
  with pytest.raises(CheckpointError, match=r'no config\.json\)\.$'):
    read_run(tmp_path)
  with pytest.raises(CheckpointError, match='stories.txt.*Not a directory'):
    read_run(folder / 'stories.txt')


def test_a_run_of_another_identity_is_refused(tmp_path):
  saved(tmp_path)
  before = (tmp_path / 'config.json').read_bytes()
  other = Config(model=ModelConfig(d_model=256), optimizer=OptimizerConfig(learning_rate=0.5))
  info = INFO | {'data': {'rates': {'zh': 1.0, 'en': 3.0}, 'cache': 'abc', 'tasks': ['x']}}
  with pytest.raises(CheckpointError) as error:
    Manager(tmp_path, other, info=info)
  lines = (
      'ModelConfig.d_model: 128 in the checkpoint, 256 now', 'OptimizerConfig.learning_rate: 0.001 in the checkpoint, 0.5 now',
      'data.rates.en: 2.0 in the checkpoint, 3.0 now', 'data.tasks: (nothing) in the checkpoint, ["x"] now', '--init_from')
  for line in lines:
    assert line in str(error.value)
  assert 'rates.zh' not in str(error.value)
  assert (tmp_path / 'config.json').read_bytes() == before


def test_free_fields_may_change_and_are_recorded(tmp_path):
  saved(tmp_path)
  free = Config(train=TrainConfig(steps=5, microbatches=2), mesh=MeshConfig(model=2))
  assert saved(tmp_path, (2,), free) == [1, 2]
  assert read_run(tmp_path).config == free
  assert read_run(tmp_path, 1).config == config()


def test_identity_is_free_until_the_first_checkpoint(tmp_path):
  Manager(tmp_path, config(), info=INFO).close()
  Manager(tmp_path, Config(model=ModelConfig(d_model=256)), info={}).close()
  assert json.loads((tmp_path / 'config.json').read_text())['config']['model']['d_model'] == 256


def test_a_later_format_is_refused(tmp_path):
  saved(tmp_path)
  path = tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'format_version': 99, 'code_version': '9.9'}))
  for call in (read_run, load_params, lambda path: Manager(path, config(), info=INFO)):
    with pytest.raises(CheckpointError, match=r'format version 99, written by t5x_cpm 9.9'):
      call(tmp_path)


def test_a_directory_of_something_else_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(CheckpointError, match=r'not empty and not the model_dir of a run.*thesis.tex'):
    Manager(tmp_path, config(), info=INFO)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_a_model_dir_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match=r'file/run cannot be written: Not a directory'):
    Manager(tmp_path / 'file' / 'run', config(), info=INFO)


def test_a_read_only_model_dir(tmp_path):
  with tmpfs(tmp_path / 'ro', 'size=64k,ro') as path, pytest.raises(CheckpointError, match='cannot be written: Read-only'):
    Manager(path, config(), info=INFO)


def test_config_of_a_checkpoint_survives_new_fields(tmp_path):
  """A checkpoint written before a field existed is read with the field's default."""
  saved(tmp_path)
  path = tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  del meta['config']['model']['remat'], meta['seal'], meta['arrays']  # neither existed then
  path.write_text(json.dumps(meta))
  assert read_run(tmp_path).config == config()
  assert dataclasses.asdict(read_run(tmp_path).config)['model']['remat'] == 'none'


def test_folders_with_numbers_that_are_no_steps(tmp_path):
  saved(tmp_path, (1, 3))
  for name in ('³', '٣', '007', '1_0', '9' * 200):
    shutil.copytree(tmp_path / 'checkpoints' / '3', tmp_path / 'checkpoints' / name)
  assert read_run(tmp_path).steps == [1, 3]
  with Manager(tmp_path, config(), info=INFO) as manager:
    assert manager.latest_step() == 3


def test_a_newer_checkpoint_that_is_not_complete_is_told(tmp_path, capsys):
  saved(tmp_path, (1, 3))
  (tmp_path / 'checkpoints' / '3' / 'commit_success.txt').unlink()
  assert read_run(tmp_path).step == 1
  assert f'Ignoring a checkpoint that is being written, or was damaged: {tmp_path}/checkpoints/3\n' == capsys.readouterr().err


@pytest.mark.parametrize('name', ['a\0b', 'a\ud800b', '://', 'nowhere://a', 'x' * 5000])
def test_what_is_no_path_is_refused_in_a_line(name):
  with pytest.raises(CheckpointError, match='cannot be used') as error:
    read_run(name)
  assert str(error.value).isprintable() and len(str(error.value)) < 500
