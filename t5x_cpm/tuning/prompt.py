"""Prompt tuning (Lester et al. 2021; Zhang et al. 2021, section 5): vectors before the input of the encoder, and nothing else.

As tokens the vectors have the ids from ModelConfig.vocab_size on, so that batches, packing, relative positions and decoding
treat them like any others. (CPM-2 gives them negative ids.)
"""

import jax
import numpy as np

from t5x_cpm.config import ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.tuning.methods import Method, register
from t5x_cpm.vocabularies import Vocabulary

FREQUENT = 5000  # pieces of a vocabulary, whose first ids are the most frequent ones (Lester et al. 2021)


def make(config: DeltaConfig) -> Method:
  """The method 'prompt'."""

  def declared(model: ModelConfig) -> Weight:
    return Weight((1, config.prompt_length, model.d_model), ('slot', None, 'embed'),
                  lambda key, shape: jax.random.uniform(key, shape, minval=-0.5, maxval=0.5))

  return Method(prompt=declared, alike={'prompt_length': 1})


def first_ids(config: DeltaConfig, vocabulary: Vocabulary, seed: int) -> np.ndarray | None:
  """The tokens whose embeddings the prompt is at first [prompt_length]; None where it is random.

  Args:
    config: `prompt_init` 'vocabulary' draws from the FREQUENT first ids of the vocabulary, special ones apart, each as seldom
      as possible; 'text' takes the tokens of `prompt_text`, from the start again where there are too few.
    vocabulary: of the base.
    seed: of the draw.

  Raises:
    ConfigError: the text has no token.
  """
  if config.prompt_init == 'random':
    return None
  if config.prompt_init == 'text':
    ids = vocabulary.encode(config.prompt_text)
    if not ids:
      raise ConfigError(f'DeltaConfig.prompt_text = {config.prompt_text!r} has no token in {vocabulary.spec}.')
    return np.resize(np.array(ids, np.int32), config.prompt_length)
  special = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, *vocabulary.sentinels}
  frequent = np.array([token for token in range(min(FREQUENT, vocabulary.size)) if token not in special], np.int32)
  rng = np.random.default_rng(seed)
  rounds = -(-config.prompt_length // len(frequent))
  return np.concatenate([rng.permutation(frequent) for _ in range(rounds)])[:config.prompt_length]


register('prompt', make)
