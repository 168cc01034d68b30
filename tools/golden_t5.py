"""Makes tests/golden/{t5,switch}_parity.npz: what transformers' T5 and SwitchTransformers compute from given weights.

    pip install -e .[torch] && python tools/golden_t5.py

The model is a small T5 1.1 (gated-gelu, untied head), with a head_dim that is not d_model / num_heads, stacks of different
depth and sequences longer than max_distance. Weights are drawn so that logits have a standard deviation above 1: with the tiny
initial weights of CPM-2 almost any mistake would pass. One row is padded on the right, one on the left; the decoder on the
right. `tests/test_parity.py` compares this project with the file, and where torch and transformers are installed it makes
the figures anew.
"""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser
from t5x_cpm.config import ConfigError

CONFIG = {
    'vocab_size': 67, 'd_model': 32, 'd_kv': 12, 'd_ff': 48, 'num_layers': 3, 'num_decoder_layers': 2, 'num_heads': 2,
    'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 16, 'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False, 'dropout_rate': 0.0, 'layer_norm_epsilon': 1e-6, 'pad_token_id': 0, 'eos_token_id': 1,
    'decoder_start_token_id': 0}
# One layer of two has experts in each stack: transformers combines the auxiliary losses of several layers in another way.
SWITCH_CONFIG = {key: value for key, value in CONFIG.items() if key != 'feed_forward_proj'} | {
    'model_type': 'switch_transformers', 'num_layers': 2, 'num_decoder_layers': 2, 'num_sparse_encoder_layers': 1,
    'num_sparse_decoder_layers': 1, 'num_experts': 4, 'expert_capacity': 64, 'router_jitter_noise': 0.0,
    'router_aux_loss_coef': 1.0, 'router_z_loss_coef': 1.0, 'tie_word_embeddings': True}
GREEDY = {'num_beams': 1, 'max_new_tokens': 16}
# Settings of the beam searches; the first has transformers' defaults of length_penalty and early_stopping.
BEAMS = [
    {'num_beams': 4, 'max_new_tokens': 16, 'length_penalty': 1.0, 'early_stopping': False},
    {'num_beams': 4, 'max_new_tokens': 16, 'length_penalty': 0.6, 'early_stopping': True},
    {'num_beams': 4, 'max_new_tokens': 16, 'length_penalty': 2.0, 'early_stopping': False},
]
SEED = 4  # the three searches give different answers
SWITCH_SEED = 12  # every expert gets tokens, and answers have more than one token
GOLDEN = {'t5': (CONFIG, SEED), 'switch': (SWITCH_CONFIG, SWITCH_SEED)}


def draw(model: Any, rng: np.random.Generator) -> None:
  """Replaces the weights of a model by random ones with which every part matters and no softmax is saturated."""
  import torch

  scaled = getattr(model.config, 'scale_decoder_outputs', model.config.tie_word_embeddings)
  head = 1.5 if not scaled else 1.5 * model.config.d_model**0.5
  with torch.no_grad():
    for name, value in sorted(model.named_parameters()):
      shape = tuple(value.shape)
      if name.endswith('layer_norm.weight'):
        drawn = 1.0 + 0.3 * rng.standard_normal(shape)
      elif name.endswith('relative_attention_bias.weight'):
        drawn = rng.standard_normal(shape)
      elif name == 'shared.weight':
        drawn = rng.standard_normal(shape) * (head * shape[1]**-0.5 if model.lm_head.weight is value else 1.0)
      elif name == 'lm_head.weight':
        drawn = head * rng.standard_normal(shape) * shape[1]**-0.5
        drawn[1] *= 1.5  # so that the end of sequence comes now and then
      else:
        gain = model.config.d_kv**-0.5 if name.endswith('.q.weight') else 1.0
        if model.lm_head.weight is model.shared.weight and name.endswith('o.weight'):
          gain = 4.0  # otherwise each token would be followed by itself
        drawn = gain * rng.standard_normal(shape) * shape[1]**-0.5
      value.copy_(torch.from_numpy(drawn.astype(np.float32)))


def draw_batch(config: dict[str, Any], rng: np.random.Generator, rows: int, S: int, T: int) -> tuple[np.ndarray, ...]:
  """input_ids and attention_mask [rows, S], labels [rows, T]; rows must be 4 or more."""
  switch = config.get('model_type') == 'switch_transformers'
  V = config['vocab_size']
  input_ids = rng.integers(2, V, (rows, S))
  attention_mask = np.ones((rows, S), np.int64)
  if not switch:  # Switch's routers and auxiliary losses would count padding
    attention_mask[1, S - 7:] = 0
    attention_mask[2, :5] = 0
  input_ids[attention_mask == 0] = 0
  labels = rng.integers(1, V, (rows, T))
  if not switch:
    labels[1, T - 4:] = -100
    labels[3, T - 9:] = -100
  return input_ids, attention_mask, labels


def generate(model: Any, encoder: dict[str, Any], settings: dict[str, Any]) -> tuple[np.ndarray, Any]:
  """Answers [rows, n] without the start token, padded after their end, and all that transformers found."""
  found = model.generate(**encoder, **settings, do_sample=False, return_dict_in_generate=True, output_scores=True)
  tokens, end = found.sequences.numpy()[:, 1:], model.config.eos_token_id
  ended = np.cumsum(tokens == end, axis=1) - (tokens == end) > 0
  return np.where(ended, model.config.pad_token_id, tokens), found  # what follows the end depends on the version


def make(config: dict[str, Any], seed: int, rows: int = 4, S: int = 24, T: int = 21) -> dict[str, Any]:
  """Weights, inputs and results of one model, float32.

  Args:
    config: keys of config.json; 'tie_word_embeddings' False gives the model a head of its own.
    seed: the seed of weights and inputs.
    rows, S, T: batch size and lengths.

  Returns:
    Arrays by name, fit for np.savez: config (JSON), input_ids, attention_mask [rows, S], labels [rows, T] (-100: none),
    decoder_input_ids [rows, T], weight/NAME and gradient/NAME by the names of transformers, logits [rows, T, V], loss, greedy
    and beam/K/tokens [rows, n] (the start token left out, 0 after the end), beam/K/settings (JSON), beam/K/scores [rows].
  """
  import torch
  import transformers

  rng = np.random.default_rng(seed)
  switch = config.get('model_type') == 'switch_transformers'
  if switch:
    model: Any = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**config)).eval()
  else:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
  if not config['tie_word_embeddings']:  # version 5 of transformers ties the tables whatever the configuration says
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  draw(model, rng)
  weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}

  input_ids, attention_mask, labels = draw_batch(config, rng, rows, S, T)
  encoder = {'input_ids': torch.from_numpy(input_ids), 'attention_mask': torch.from_numpy(attention_mask)}
  out = model(**encoder, labels=torch.from_numpy(labels))
  out.loss.backward()
  result = {
      'config': np.asarray(json.dumps({'model_type': 't5'} | config)),
      'input_ids': input_ids, 'attention_mask': attention_mask, 'labels': labels,
      'decoder_input_ids': model.prepare_decoder_input_ids_from_labels(torch.from_numpy(labels)).numpy(),
      'logits': out.logits.detach().numpy(), 'loss': out.loss.detach().numpy(),
      'versions': np.asarray(f'torch {torch.__version__}, transformers {transformers.__version__}, seed {seed}'),
  }
  if switch:
    with torch.no_grad():
      routed = model(**encoder, labels=torch.from_numpy(labels), output_router_logits=True)
    for stack in ('encoder', 'decoder'):
      for loss in ('aux', 'z'):
        result[f'{stack}_{loss}_loss'] = routed[f'{stack}_{loss}_loss'].numpy()
  result |= {f'weight/{name}': value for name, value in weights.items()}
  for name, value in model.named_parameters():
    assert value.grad is not None, name
    result[f'gradient/{name}'] = value.grad.numpy()
  result['greedy'] = generate(model, encoder, GREEDY)[0]
  for index, settings in enumerate(BEAMS):
    result[f'beam/{index}/tokens'], found = generate(model, encoder, settings)
    result[f'beam/{index}/settings'] = np.asarray(json.dumps(settings))
    result[f'beam/{index}/scores'] = found.sequences_scores.numpy()
  return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in result.items()}


def main() -> None:
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  default = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'golden'
  parser.add_argument('--output', type=pathlib.Path, default=default, help='folder')
  given = parser.parse_args()
  if missing := [name for name in ('torch', 'transformers') if not importlib.util.find_spec(name)]:
    raise ConfigError(f'{" and ".join(missing)} must be installed: pip install -e .[torch]')
  given.output.mkdir(parents=True, exist_ok=True)
  for name, (config, seed) in GOLDEN.items():
    result, file = make(config, seed), given.output / f'{name}_parity.npz'
    np.savez_compressed(file, **result)
    lengths = [int((row != 0).sum()) for row in result['greedy']]
    print(f'{file}: {file.stat().st_size / 1e3:.0f} kB, {result["versions"]}, deviation of logits '
          f'{result["logits"].std():.2f}, loss {float(result["loss"]):.4f}, lengths of greedy answers {lengths}')


if __name__ == '__main__':
  run_script(main)
