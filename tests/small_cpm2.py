"""Writes the files that CPM-2 was published in from a T5 of transformers: an independent statement of their layout."""

import pathlib
import random
from typing import Any

import numpy as np

CONFIG = {'vocab_size': 64, 'd_model': 32, 'd_kv': 12, 'd_ff': 48, 'num_layers': 2, 'num_decoder_layers': 2, 'num_heads': 4,
          'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 128, 'feed_forward_proj': 'gated-gelu',
          'tie_word_embeddings': False, 'dropout_rate': 0.0, 'pad_token_id': 5, 'eos_token_id': 7, 'decoder_start_token_id': 1}


def vocabulary(folder: pathlib.Path, pieces: int = 64) -> str:
  """A vocabulary of so many pieces."""
  specials = ['<unk>', '<s>', '</s>', '\u2583', '<sep>', '<pad>', '<mask>', '<eod>', '\u2581', ',', '\u2582']
  letters = [chr(0x4E00 + number) for number in range(pieces - len(specials) - 20)]
  (folder / 'vocab.txt').write_text('\n'.join(specials + letters + [f'<s_{i}>' for i in range(20)]) + '\n', encoding='utf-8')
  return f'cpm2:{folder / "vocab.txt"}'


def merged(model: Any) -> dict[str, Any]:
  """The state dict of a CPM-2 that is not split, in 16 bits, from that of a T5."""
  import torch

  given = {name: value.detach().half() for name, value in model.state_dict().items()}
  state = {f'{prefix}word_embeds.weight': given['shared.weight'] for prefix in ('', 'encoder.', 'decoder.')}
  state['lm_head.weight'] = given['lm_head.weight']
  for stack, layers in (('encoder', model.config.num_layers), ('decoder', model.config.num_decoder_layers)):
    for n in range(layers):
      theirs, ours = f'{stack}.block.{n}.layer', f'{stack}.blocks.{n}'
      own = f'{theirs}.0.SelfAttention'
      state[f'{ours}.self_attn.self_attn.project.weight'] = torch.cat([given[f'{own}.{x}.weight'] for x in 'qkv'])
      state[f'{ours}.self_attn.self_attn.dense.weight'] = given[f'{own}.o.weight']
      state[f'{ours}.self_attn.layer_norm.weight'] = given[f'{theirs}.0.layer_norm.weight']
      if n == 0:
        bias = 'self_attn.relative_attention_bias.weight'
        state[f'{ours}.self_attn.{bias}'] = given[f'{own}.relative_attention_bias.weight']
      if stack == 'decoder':
        other = f'{theirs}.1.EncDecAttention'
        state[f'{ours}.cross_attn.cross_attn.project_q.weight'] = given[f'{other}.q.weight']
        state[f'{ours}.cross_attn.cross_attn.project_kv.weight'] = torch.cat([given[f'{other}.{x}.weight'] for x in 'kv'])
        state[f'{ours}.cross_attn.cross_attn.dense.weight'] = given[f'{other}.o.weight']
        state[f'{ours}.cross_attn.layer_norm.weight'] = given[f'{theirs}.1.layer_norm.weight']
      last = f'{theirs}.{2 if stack == "decoder" else 1}'
      for name in ('wi_0', 'wi_1', 'wo'):
        state[f'{ours}.ff.dense_relu_dense.{name}.weight'] = given[f'{last}.DenseReluDense.{name}.weight']
      state[f'{ours}.ff.layer_norm.weight'] = given[f'{last}.layer_norm.weight']
    state[f'{stack}.final_layernorm.weight'] = given[f'{stack}.final_layer_norm.weight']
  return state


def part(state: dict[str, Any], degree: int, rank: int) -> dict[str, Any]:
  """What model-parallel rank `rank` of `degree` holds."""
  import torch

  def cut(name: str, value: Any) -> Any:
    if 'layer_norm' in name or 'layernorm' in name or 'centroids' in name or 'prompt' in name:
      return value.clone()
    if any(key in name for key in ('.dense.', '.wo.', 'relative_attention_bias')):
      return value.chunk(degree, dim=1)[rank].clone()
    stride = 3 if '.project.' in name else 2 if '.project_kv.' in name else 1
    return torch.cat([piece.chunk(degree, dim=0)[rank] for piece in value.chunk(stride, dim=0)])

  return {name: cut(name, value) for name, value in state.items()}


def write_dense(folder: pathlib.Path, state: dict[str, Any], degree: int) -> pathlib.Path:
  """The files of DeepSpeed, with what it saves beside the tensors. Returns the folder of the iteration."""
  import torch

  where = folder / '36000'
  where.mkdir(parents=True)
  (folder / 'latest_checkpointed_iteration.txt').write_text('36000\n')
  for rank in range(degree):
    torch.save({
        'module': part(state, degree, rank), 'optimizer': None, 'lr_scheduler': {'start_lr': 1e-4, 'num_iters': 36000},
        'skipped_steps': 3, 'global_steps': 36000, 'dp_world_size': 96, 'mp_world_size': degree, 'iteration': 36000,
        'random_rng_state': random.getstate(),
        'np_rng_state': np.random.get_state(),  # noqa: NPY002
        'torch_rng_state': torch.get_rng_state()}, where / f'mp_rank_{rank:02d}_model_states.pt')
  return where


def as_experts(state: dict[str, Any], centroids: dict[str, Any]) -> dict[str, Any]:
  """The state dict of one expert: the feed-forward part renamed, and the centroids of each layer beside it."""
  return {name.replace('.ff.', '.ff.expert_network.'): value for name, value in state.items()} | centroids


def write_experts(folder: pathlib.Path, experts: list[dict[str, Any]], degree: int, start: bool = False) -> pathlib.Path:
  """The files of CPM-2-MoE; `start`: as its training began, with one expert for all."""
  import torch

  where = folder / '300000'
  where.mkdir(parents=True)
  for number, state in enumerate(experts):
    for rank in range(degree):
      name = f'mp_rank_{rank:02d}' if start else f'mp_rank_{number:02d}_{rank:02d}'
      torch.save({'iteration': 300000, 'model': part(state, degree, rank)}, where / f'{name}_model_states.pt')
  return where
