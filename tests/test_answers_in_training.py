"""Runs that rank their checkpoints by answers, and stop when these get no better."""

import dataclasses
import json
import re

import pytest
import test_tuning
from test_tuning import tuned

from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import CheckpointConfig, ConfigError, DecodeConfig
from t5x_cpm.inference import evaluate, in_training
from t5x_cpm.training import train as training
from t5x_cpm.training import validation

base_dir = test_tuning.base_dir


def run_of(base_dir, steps=4, metric='eval/char_f1', eval_every=1, **options):
  config = tuned(base_dir, delta=test_tuning.LORA, steps=steps)
  return dataclasses.replace(
      config, train=dataclasses.replace(config.train, eval_every=eval_every), decode=DecodeConfig(max_new_tokens=2),
      checkpoint=CheckpointConfig(**{
          'every': 100, 'keep': 1, 'keep_best': 1, 'best_metric': metric, 'best_mode': 'max'} | options))


def reported(model_dir, split='eval'):
  lines = (model_dir / 'metrics.jsonl').read_text().splitlines()
  return {record['step']: record for record in map(json.loads, lines) if record['split'] == split}


@pytest.mark.slow
def test_the_best_checkpoint_is_that_with_the_best_answers(base_dir, tmp_path, capsys):
  config = run_of(base_dir, steps=3, eval_every=2)
  last = training.run(config, str(tmp_path / 'run'), make_answers=in_training.answers)
  assert re.search(r'answers to \d+ inputs of validation .* the maximum of eval/char_f1 is the best', capsys.readouterr().out)
  found = reported(tmp_path / 'run')
  assert sorted(found) == [2, 3] and {'loss', 'exact_match', 'char_f1'} <= found[2].keys() and last['loss'] == found[3]['loss']
  # What a checkpoint answers afterwards is what it answered in the run.
  trained = run_directory.read_run(tmp_path / 'run')
  again = evaluate.run(dataclasses.replace(trained.config, eval=dataclasses.replace(trained.config.eval, checkpoints='3')),
                       str(tmp_path / 'run'), ['local'])[3]['local']
  assert again['char_f1'] == found[3]['char_f1'] and again['exact_match'] == found[3]['exact_match']


class Scripted:
  """Answers whose metric follows a script."""

  names, note = ('score',), 'a script'

  def __init__(self, values):
    self.values = iter(values)

  def __call__(self, params):
    assert {'delta', 'encoder', 'token_embedder'} <= set(params)  # the whole model
    return {'score': next(self.values)}


@pytest.mark.slow
def test_a_run_stops_when_answers_get_no_better_also_after_a_resume(base_dir, tmp_path, capsys):
  scores = [0.1, 0.3, 0.2, 0.3, 0.25, 0.9]
  config, run = run_of(base_dir, steps=20, metric='eval/score', patience=3), tmp_path / 'run'
  for begin, steps in ((0, 3), (3, 20)):  # the count goes on over a resume
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    training.run(shorter, str(run), make_answers=lambda *_: Scripted(scores[begin:]))  # noqa: B023
  assert sorted(reported(run)) == [1, 2, 3, 4, 5]
  reason = 'no eval/score better than 0.3 of step 2 in 3 evaluations'
  assert f'{reason} at step 5: saved, stopping' in capsys.readouterr().out
  assert run_directory.read_run(run).steps == [2, 5]
  training.run(config, str(run), make_answers=lambda *_: Scripted([]))
  assert f'stopped at step 5: {reason}. Set CheckpointConfig.patience higher' in capsys.readouterr().out
  assert sorted(reported(run)) == [1, 2, 3, 4, 5]


def test_patience_counts_what_is_not_better(tmp_path):
  options = CheckpointConfig(keep_best=1, patience=2)
  patience = validation.Patience(options, tmp_path, 0, 0)
  values = [float('nan'), 3.0, None, 2.0, 2.0, float('inf')]
  said = [patience.add(step, {'eval/loss': value}) for step, value in enumerate(values, 1)]
  assert said == [''] * 5 + ['no eval/loss better than 2 of step 4 in 2 evaluations']
  never = validation.Patience(CheckpointConfig(), tmp_path, 0, 0)
  assert not any(never.add(step, {'eval/loss': 1.0}) for step in range(9))


@pytest.mark.parametrize('fields, message', [  # the first imports TensorFlow
    ({'metric': 'eval/exact_mach'}, 'expected one of eval/accuracy, eval/char_f1, eval/exact_match, eval/loss. Did you mean '
                                    'eval/exact_match'),
    ({'patience': 2, 'keep_best': 0}, 'patience = 2 counts evaluations and leaves the best: set TrainConfig.eval_every'),
    ({'patience': 2, 'eval_every': 0}, 'set TrainConfig.eval_every and CheckpointConfig.keep_best')])
def test_what_cannot_be_ranked_by_is_told_first(base_dir, tmp_path, fields, message):
  config = run_of(base_dir, **fields)
  config = dataclasses.replace(config, task=dataclasses.replace(config.task, cache_dir=str(tmp_path / 'cache')))
  with pytest.raises(ConfigError, match=re.escape(message)):
    training.run(config, str(tmp_path / 'run'), make_answers=in_training.answers)
  assert not (tmp_path / 'cache').exists() and not (tmp_path / 'run').exists()


def test_metrics_of_answers_have_names_before_there_is_an_answer():
  def fails(targets, predictions):
    raise ZeroDivisionError

  class Task:
    predict_metric_fns = [lambda targets, predictions: {'hits': float(targets == predictions)}, fails]
    score_metric_fns = [lambda targets, scores: {'mean_score': scores[0]}]
    predict_with_aux_metric_fns = [lambda targets, predictions, aux: {'calibration': aux['scores'][0]}]

  example = evaluate.Example(None, [], 'x', {})
  assert list(in_training._names(Task, [example])) == ['hits', 'fails', 'mean_score', 'calibration']
