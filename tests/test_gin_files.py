"""The gin files of the package: parameter counts, and that every file loads."""

import time

import jax
import pytest

from t5x_cpm.config import Config, ModelConfig, gin, identity_differences
from t5x_cpm.models import encoder_decoder

# Published: Zhang et al. 2021 for CPM-2 (198 billion with experts); the T5 1.1, mT5 and Switch checkpoints (transformers'
# num_parameters()).
PUBLISHED = {
    'cpm2_11b_zh': 11_087_097_856, 'cpm2_11b': 11_297_861_632,
    't5_1_1_small': 76_961_152, 't5_1_1_base': 247_577_856, 't5_1_1_large': 783_150_080, 't5_1_1_xl': 2_849_757_184,
    't5_1_1_xxl': 11_135_332_352,
    'mt5_small': 300_176_768, 'mt5_base': 582_401_280, 'mt5_large': 1_229_581_312, 'mt5_xl': 3_742_619_648,
    'mt5_xxl': 12_921_057_280, 'switch_base_8': 619_339_008, 'cpm2_moe_198b': 198_537_883_648,
}
MODELS = gin.shipped_files('models')


def closed_form(c: ModelConfig) -> int:
  """Parameters of an encoder-decoder without bias vectors; every router here has a matrix [d_model, experts]."""
  attention, norm = 4 * c.d_model * c.num_heads * c.head_dim, c.d_model
  mlp = (3 if c.mlp_activation.startswith('gated') else 2) * c.d_model * c.d_ff
  encoder = c.num_encoder_layers * (attention + mlp + 2 * norm)
  decoder = c.num_decoder_layers * (2 * attention + mlp + 3 * norm)
  E, routed = c.moe.num_experts, 0
  if E:
    routed = c.num_encoder_layers // c.moe.encoder_every + c.num_decoder_layers // c.moe.decoder_every
  experts = routed * ((E - 1) * mlp + c.d_model * E)
  tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.d_model
  return encoder + decoder + experts + 2 * norm + 2 * c.num_buckets * c.num_heads + tables


def model_config(name: str) -> ModelConfig:
  return gin.load([f'gin/models/{name}.gin']).model


def test_every_published_size_is_there():
  assert set(PUBLISHED) <= set(MODELS)


@pytest.mark.parametrize('name', MODELS)
def test_parameter_counts(name):
  config = model_config(name)
  count = closed_form(config)
  if name in PUBLISHED:
    assert count == PUBLISHED[name]
  assert f'{count:,} parameters' in gin.summary('models', name)  # what --help says
  assert config.initializer == ('cpm2' if name.startswith('cpm2') and 'tiny' not in name and 'small' not in name else 't5')


@pytest.mark.parametrize('name', [
    'cpm2_tiny', 't5_1_1_small', 'mt5_xxl', 'cpm2_11b', 'cpm2_moe_198b', 'switch_base_32', 'm6t_prototype'])
def test_the_model_has_as_many_parameters_without_making_one(name):
  config = model_config(name)
  started = time.monotonic()
  shapes, _ = encoder_decoder.build(config).abstract()
  assert time.monotonic() - started < 10
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == closed_form(config)


def test_sizes_for_small_machines():
  assert 2e6 <= closed_form(model_config('cpm2_tiny')) <= 5e6
  assert 55e6 <= closed_form(model_config('cpm2_small')) <= 65e6


@pytest.mark.parametrize('name', gin.shipped_files('runs'))
def test_runs_load_with_any_model_in_any_order(name):
  run, model = f'gin/runs/{name}.gin', 'gin/models/cpm2_tiny.gin'
  config = gin.load([run, model], scope='train')
  assert config == gin.load([model, run], scope='train')
  assert config != Config()
  assert gin.summary('runs', name)


@pytest.mark.parametrize('name', gin.shipped_files('mesh'))
def test_mesh_files_bind_what_does_not_change_a_run(name):
  config, plain = (gin.load(files, ['TrainConfig.batch_size=2048']) for files in ([f'gin/mesh/{name}.gin'], []))
  assert config.mesh != plain.mesh and not identity_differences(plain, config)
  assert gin.summary('mesh', name)


def test_flags_of_the_documented_commands():
  config = gin.load(
      ['gin/runs/pretrain.gin', 'gin/models/cpm2_tiny.gin'],
      ['TrainConfig.steps=200', 'CheckpointConfig.every=10', 'MetricsConfig.every=1', 'TaskConfig.name=local',
       'LocalTaskConfig.files=text/*.txt'])
  assert (config.train.steps, config.task.name, config.local_task.files) == (200, 'local', 'text/*.txt')
