"""What a delta asks of its base and of its files, and what a run of one may not be."""

import dataclasses
import hashlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_tuning
from etils import epath
from test_tuning import LORA, tuned

from t5x_cpm import stored, trees, tuning
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.cli import configure, modes, parse
from t5x_cpm.config import Config, ConfigError, DeltaConfig, MeshConfig, OptimizerConfig
from t5x_cpm.training import train as training

base_dir = test_tuning.base_dir


def test_tensors_that_do_not_fit_are_named(tmp_path):
  config = test_tuning.with_delta()
  leaves = tuning.build_model(config).leaves()['delta']
  named = trees.named(leaves)
  tensors = {name: np.ones([size for size, axis in zip(leaf.shape, leaf.axes) if axis != 'slot'], np.float32)
             for name, leaf in named.items()}
  folder = epath.Path(tmp_path) / 'run' / 'delta'
  tuning.write(folder, tensors, config, tuning.Base(epath.Path('base'), 5, 'f00d'), step=4, vocabulary='beef', metrics={})
  saved = tuning.read(tmp_path / 'run')
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), tuning.fitted(saved.tensors, leaves, folder), leaves)

  first, second, third, fourth, *_ = sorted(tensors)
  changed = tensors | {second: tensors[second][..., :-1], 'lora/c': np.zeros(2, np.float32)}
  changed |= {third: np.full_like(tensors[third], np.nan), fourth: tensors[fourth].astype(np.int32)}
  del changed[first]
  raw = safetensors.numpy.save(changed)  # by hand, with digests made anew
  (folder / 'weights-4.safetensors').write_bytes(raw)
  stored.write(folder / 'delta.json', saved.about | {'weights_digest': hashlib.blake2b(raw, digest_size=12).hexdigest()})
  with pytest.raises(ConfigError) as error:
    tuning.fitted(tuning.read(folder).tensors, leaves, folder)
  for words in (f'{folder}: ', f'{first} is missing', f'{second} is [', 'lora/c is left over', f'{third} is not finite',
                f'{fourth} is of type int32'):
    assert words in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_run_goes_on_with_another_base_where_that_is_allowed(base_dir, tmp_path, capsys):
  run, other = str(tmp_path / 'run'), tmp_path / 'other'
  training.run(tuned(base_dir), run)
  shutil.copytree(base_dir, other)
  shutil.rmtree(other / 'checkpoints' / '5')
  longer = dataclasses.replace(tuned(base_dir, steps=6), delta=dataclasses.replace(LORA, base=str(other)))
  with pytest.raises(ConfigError, match='--allow_other_base takes this one'):
    training.run(longer, run)
  training.run(dataclasses.replace(longer, delta=dataclasses.replace(longer.delta, allow_other_base=True)), run)
  assert 'it is used all the same' in capsys.readouterr().err
  assert tuning.read(run).about['base']['step'] == 3
  assert not run_directory.read_run(run).config.delta.allow_other_base
  training.run(longer, run)  # from now on it is its base


def test_host_memory_is_not_for_deltas():
  for gib in (-1.0, 1.0):
    config = Config(delta=DeltaConfig(method='lora', base='base'), mesh=MeshConfig(host_gib=gib),
                    optimizer=OptimizerConfig(name='adamw'))
    with pytest.raises(ConfigError, match='MeshConfig.host_gib: the optimizer state of a delta is too small'):
      config.validate()


def test_a_plan_is_made_for_a_delta_on_a_base(base_dir):
  flags = ['--topology=v5e:2x2', f'--base={base_dir}', '--gin_file=gin/runs/lora.gin']
  config = configure.make_config(parse.parse(['compile', *flags], modes.MODES))
  model = run_directory.read_run(base_dir).config.model
  assert config.delta.frozen and config.model == dataclasses.replace(model, dropout_rate=0.0)
