"""What a run starts from."""

import dataclasses
import json
import re

import numpy as np
import pytest
from small_data import fill, make_config, random_documents

from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import CheckpointConfig, ConfigError, MetricsConfig, ModelConfig, OptimizerConfig
from t5x_cpm.training import train

SCHEDULE = OptimizerConfig(name='sgd', schedule='noam', learning_rate=0.1, warmup_steps=3)  # has no moments to lose


def run(config, folder, steps, **fields):
  fields = {'steps': steps, 'eval_every': 1} | fields
  train.run(dataclasses.replace(config, train=dataclasses.replace(config.train, **fields)), str(folder))


def curve(folder):
  records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [(one['step'], one['split'], one['loss'], one.get('learning_rate')) for one in records if 'loss' in one]


@pytest.fixture
def config(tmp_path):
  config = make_config(tmp_path, batch_size=4, encoder_length=24, decoder_length=12)
  documents = random_documents(np.random.default_rng(0), [40] * 30)
  vocabulary = fill(config, {split: {'targets': documents} for split in ('train', 'validation')})
  model = ModelConfig(vocab_size=vocabulary.size, d_model=8, d_ff=12, num_heads=1, head_dim=8, num_encoder_layers=1,
                      num_decoder_layers=1)
  return dataclasses.replace(config, model=model, optimizer=SCHEDULE, metrics=MetricsConfig(every=1, tensorboard=False),
                             checkpoint=CheckpointConfig(keep_best=1, patience=2))


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_continues_its_steps_rows_rates_and_curve(config, tmp_path, capsys):
  run(config, tmp_path / 'whole', 5)
  run(config, tmp_path / 'first', 2)
  goes_on = {'init_from': str(tmp_path / 'first'), 'go_on': True}
  run(config, tmp_path / 'second', 4, **goes_on)
  run(config, tmp_path / 'second', 5, **goes_on)
  found = curve(tmp_path / 'second')
  assert found[4][1] == 'eval' and found[3] == found[4]  # before the joint, and after it
  assert found[:4] + found[5:] == curve(tmp_path / 'whole') and len(found) == 11
  assert run_directory.read_run(tmp_path / 'second').info['first_step'] == 2
  # A run whose loss was flat is gone on with: what ended it does not count any more.
  lines = [json.loads(line) for line in (tmp_path / 'first' / 'metrics.jsonl').read_text().splitlines()]
  flat = ''.join(json.dumps(line | {'loss': 0.0}) + '\n' for line in lines)
  (tmp_path / 'first' / 'metrics.jsonl').write_text(flat)
  run(config, tmp_path / 'third', 3, **goes_on)
  run(config, tmp_path / 'third', 4, **goes_on)
  assert curve(tmp_path / 'third')[5:] == curve(tmp_path / 'whole')[4:8] and 'stopped' not in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_go_on_is_told(config, tmp_path):
  with pytest.raises(ConfigError, match='go_on = True goes on with the steps of another run: give --init_from=DIR'):
    run(config, tmp_path / 'run', 2, go_on=True)
  run(config, tmp_path / 'first', 2)
  message = f'TrainConfig.steps = 1, and by TrainConfig.go_on the run begins after step 2 of {tmp_path / "first"}'
  with pytest.raises(ConfigError, match=re.escape(message)):
    run(config, tmp_path / 'run', 1, go_on=True, init_from=str(tmp_path / 'first'))
  assert not (tmp_path / 'run').exists()
