"""A model_dir with a small random model, for the tests of inference."""

import pathlib

import jax
import jax.numpy as jnp

from t5x_cpm import vocabularies
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import Config, DecodeConfig, InferConfig, ModelConfig, MoEConfig, TaskConfig
from t5x_cpm.models import encoder_decoder


def without_parameters(folder: pathlib.Path, vocabulary: vocabularies.Vocabulary) -> pathlib.Path:
  """Writes a checkpoint that says everything but has no model, for what is refused before a parameter is read."""
  config, path = Config(task=TaskConfig(vocabulary=vocabulary.spec)), folder / 'model'
  with Manager(path, config, info={'vocabulary': vocabulary.fingerprint}) as manager:
    manager.save(3, {'step': jnp.int32(3)})
  vocabulary.save(path / 'vocabulary')
  return path


def model_dir(folder: pathlib.Path, vocabulary: vocabularies.Vocabulary, *, steps: tuple[int, ...] = (3,),
              objective: str = 'isolated', moe: MoEConfig | None = None, **task) -> pathlib.Path:
  """Writes checkpoints of a random model with logits far enough apart to decode in a stable way."""
  config = Config(
      model=ModelConfig(vocab_size=vocabulary.size + 4, d_model=16, d_ff=24, num_heads=2, head_dim=8, num_encoder_layers=1,
                        num_decoder_layers=2, init_std=0.5, layer_loop='scan', moe=moe or MoEConfig()),
      task=TaskConfig(vocabulary=vocabulary.spec, objective=objective, encoder_length=32, decoder_length=16, **task),
      decode=DecodeConfig(max_new_tokens=8), infer=InferConfig(batch_size=4, input_length=60))
  path = folder / 'model'
  model = encoder_decoder.build(config.model)
  with Manager(path, config, info={'vocabulary': vocabulary.fingerprint}) as manager:
    for step in steps:
      manager.save(step, {'step': jnp.int32(step), 'params': jax.jit(model.init)(jax.random.key(step))})
  vocabulary.save(path / 'vocabulary')
  return path
