"""Plans: what a model takes and how fast it answers, against sums by hand and against bundles."""

import dataclasses
import pathlib

import pytest
import test_bundle
from test_bundle import made, model_dir  # noqa: F401

from t5x_cpm.chips import GiB
from t5x_cpm.cli import modes, parse
from t5x_cpm.config import ConfigError, gin
from t5x_cpm.infmoe import budget, formats, machine, plan
from t5x_cpm.infmoe.bundle import Place


def machine_of(disk=1.0, memory=10.0, products=1e6, call=0.0):
  """A machine with rates in GB/s, and in billions of operations a second."""
  weights, operations = (dict.fromkeys(formats.FORMATS, 1e9 * rate) for rate in (memory, products))
  return machine.Machine(1e9 * disk, weights, operations, call, 'made up')


def configured(**fields):
  """The 198 billion, with 8-bit weights."""
  given = {'memory_gib': 32.0, 'format': 'int8', 'dense_format': 'int8'} | fields
  return gin.load(['gin/models/cpm2_moe_198b.gin'], [f'OffloadConfig.{name}={value!r}' for name, value in given.items()])


def test_sizes_are_those_of_a_bundle(model_dir, made):  # noqa: F811
  one = test_bundle.opened(made)
  config = test_bundle.configured(model_dir, format='float32')
  sizes = plan.sizes_of(config)
  assert sizes.bundle == one.size == sum(file.stat().st_size for file in pathlib.Path(made).glob('*.safetensors'))
  assert sizes.slot == one.block(one.places[0])[0] and set(sizes.layers) >= set(one.places)


def test_a_token_reads_an_expert_of_each_layer_that_is_not_kept():
  config = configured()
  made_plan = plan.make(config, machine_of(products=1e9))
  row = made_plan.rows[0]
  kept = [row.budget.kept[Place('decoder', number)] for number in range(24)]
  expert = 3 * 4096 * 10240 + 4 * (2 * 10240 + 4096)  # numbers, and a scale for each output
  assert made_plan.sizes.slot == pytest.approx(expert, abs=4096)
  missing = sum(1 - count / 32 for count in kept)
  assert row.decoder.reading == pytest.approx(missing * expert / 1e9, rel=1e-3)
  # Every weight of a layer but the keys and values of the encoder's output is read, and a float32 table for the logits.
  dense = 24 * 8 * 4096 * 4096 + 4 * 4096 * 51968
  assert row.decoder.weights == pytest.approx((dense + 24 * expert) / 10e9, rel=0.01)
  assert row.decoder.total == pytest.approx(row.decoder.reading + row.decoder.weights, rel=0.01)
  assert row.decoder.bound == 'disk' and plan.make(config, machine_of(disk=1e4)).rows[0].decoder.bound == 'memory'
  assert sum(kept) + row.budget.staging == (32 * GiB - row.budget.dense - row.budget.work) // made_plan.sizes.slot


def test_the_encoder_reads_all_once_for_many_tokens():
  row = plan.make(configured(), machine_of(products=1e9)).rows[0]
  assert row.encoder.reading == pytest.approx(24 * 32 * 0.126, rel=0.01) and row.encoder.bound == 'disk'
  slow = plan.make(configured(), machine_of(products=1.0)).rows[0]
  assert slow.encoder.bound == 'arithmetic'
  tokens, weights = row.inputs, 24 * (4 * 4096**2 + 3 * 4096 * 10240)
  assert slow.encoder.arithmetic == pytest.approx(2 * tokens * (weights + 24 * 2 * tokens * 4096) / 1e9, rel=0.01)


def test_tokens_share_experts():
  assert plan.distinct(32, 1, 1) == pytest.approx(1) and plan.distinct(32, 2, 1) == pytest.approx(2)
  assert plan.distinct(32, 1, 8) == pytest.approx(7.18, abs=0.01) and plan.distinct(32, 1, 64) == pytest.approx(27.8, abs=0.1)


def test_what_helps_most():
  assert plan.changes(configured(), machine_of())[0][0] == "OffloadConfig.format = 'int4'"
  assert plan.changes(configured(format='int4'), machine_of())[0][0] == 'twice the memory (memory_gib = 64)'
  slow = plan.changes(configured(format='int4', memory_gib=8.0), machine_of(disk=0.1))
  assert slow[0] == ('a disk that is twice as fast', pytest.approx(2, abs=0.2))
  assert all(ratio >= 0.99 for _, ratio in slow)


def test_where_nothing_helps_that_is_said(capsys):
  rich = machine_of(disk=1e6, memory=1e6, call=1.0)
  plan.tell(plan.make(configured(), rich), rich)
  assert 'neither more memory nor a faster disk nor fewer bits' in capsys.readouterr().out


def test_slots_are_shared_out():
  places = [Place('encoder', 0), *(Place('decoder', number) for number in range(3))]
  assert list(budget.shared_out(7, places, 8).values()) == [0, 3, 2, 2]
  assert list(budget.shared_out(26, places, 8).values()) == [2, 8, 8, 8]


def test_a_plan_is_printed(capsys, monkeypatch, tmp_path):
  monkeypatch.setenv('T5X_CPM_CACHE', str(tmp_path))

  def run(*flags):
    modes.run(parse.parse(['plan', '--gin_file=gin/models/cpm2_moe_198b.gin', *flags], modes.MODES))
    return capsys.readouterr().out

  out = run('--gin.OffloadConfig.memory_gib=32', '--disk=3')
  assert 'a laptop is assumed' in out and 'disk 3 GB/s' in out and 'what helps most' in out
  assert '64    too many for this memory' in out
  for flags, words in ((['--gin.OffloadConfig.memory_gib=8'], r'needs at least 20\.\d+: 19.'),
                       (['--disk=fast'], '--disk=fast: expected the rate of a disk in GB/s'),
                       (['--gin.MoEConfig.num_experts=0'], 'plan is for a model with experts')):
    with pytest.raises(ConfigError, match=words):
      run(*flags)


def test_a_machine_is_measured_and_remembered(monkeypatch, tmp_path):
  monkeypatch.setenv('T5X_CPM_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(machine, 'READ_BYTES', 1 << 22)
  assert machine.known() == machine.ASSUMED
  config = gin.load(['gin/models/cpm2_moe_tiny.gin'], ["OffloadConfig.format='int8'"])
  found = machine.measure(config, tmp_path)
  assert 1e6 < found.disk < 1e12 and set(found.weights) == {'int8', 'float32'}
  assert dataclasses.replace(machine.known(), about='') == dataclasses.replace(found, about='')
  assert not list(tmp_path.glob('.t5x_cpm-measure*'))
