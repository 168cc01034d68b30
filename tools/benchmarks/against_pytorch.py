"""Speed against transformers' T5 in PyTorch on this CPU: same shape, same threads, float32 on both sides.

    pip install -e .[torch]
    python tools/benchmarks/against_pytorch.py                    # all
    python tools/benchmarks/against_pytorch.py train [--repeats=9] [--threads=2] [--json=FILE]
    python tools/benchmarks/against_pytorch.py decode
    python tools/benchmarks/against_pytorch.py moe                # loss and gradients with experts, against a dense twin and
                                                                  # SwitchTransformers; one layer by its parts

Each side runs in a process of its own, as its users run it, and the two take turns, so that other load on the machine hits
both. Figures are medians of wall time; a ratio above 1 means that this project is faster. Seconds of CPU are printed beside
them: on a busy machine their ratio is the steadier one. The table names the versions of both sides, the attention that
transformers chose, and the instructions of the processor, because a ratio holds only for these. *target* is the ratio that
the project aims at. Two columns say how far a ratio could go: *limit*, if all products ran at the rate of one large product and
all weights were read at the full rate of the memory; *products*, if everything but XLA's own products in this work were free.
Weights are random. PyTorch uses its fused AdamW and transformers its default attention, the faster choices of each;
torch.compile is not used.
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import expert_layer
import numpy as np
import products_alone
import side_by_side
from side_by_side import Case, Run

from t5x_cpm import backend
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser
from t5x_cpm.config import Config, ModelConfig, MoEConfig, OptimizerConfig, TaskConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=26_240, d_model=512, d_ff=1024, num_heads=8, head_dim=64, num_encoder_layers=8, num_decoder_layers=8)
EXPERTS = 8
ROWS, S, T = 8, 256, 64
NEW_TOKENS = 64


def random_batch(rows: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  batch = {name: rng.integers(2, MODEL.vocab_size, (rows, length)).astype(np.int32) for name, length in (
      ('encoder_input_tokens', S), ('decoder_input_tokens', T), ('decoder_target_tokens', T))}
  for side, length in (('encoder', S), ('decoder', T)):
    batch[f'{side}_segment_ids'] = np.ones((rows, length), np.int32)
    batch[f'{side}_positions'] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return batch | {'decoder_loss_weights': np.ones((rows, T), np.float32)}


# This project.


def training() -> tuple[Any, Any, Any]:
  """A step, its state and a batch."""
  import jax

  from t5x_cpm import mesh as mesh_lib
  from t5x_cpm.training import step as step_lib

  config = Config(
      model=MODEL, train=TrainConfig(batch_size=ROWS), task=TaskConfig(encoder_length=S, decoder_length=T),
      optimizer=OptimizerConfig(name='adamw', learning_rate=1e-4, schedule='constant', clip_norm=0.0))
  step = step_lib.build(config, mesh_lib.make_mesh(config.mesh))
  batch = jax.device_put(random_batch(ROWS))
  return step, step.init(jax.random.key(0)), batch


def our_training() -> Run:
  import jax

  step, state, batch = training()

  def run() -> Any:
    nonlocal state
    state, metrics = step.fn(state, {}, batch)
    return jax.block_until_ready(metrics)

  return run


def products_of_training() -> Run:
  step, state, batch = training()
  return products_alone.alone(step.fn, state, {}, batch)


def gradients(model_config: ModelConfig) -> tuple[Any, ...]:
  """The function of loss and gradients, without an optimizer, and its arguments."""
  import jax

  from t5x_cpm import trees
  from t5x_cpm.models import encoder_decoder
  from t5x_cpm.training import losses

  backend.keep_memory()
  model = encoder_decoder.build(model_config)
  batch, key = jax.device_put(random_batch(ROWS)), jax.random.key(1)
  trained, rest = trees.split(jax.jit(model.init)(jax.random.key(0)), model.leaves(), lambda leaf: leaf.has_gradient)

  def loss(trained: Any, rest: Any, batch: Any) -> Any:
    logits, auxiliary, _, _ = model.apply(trees.merged(trained, rest), batch, key=key, train=True)
    total, _ = losses.cross_entropy(logits, batch['decoder_target_tokens'], batch['decoder_loss_weights'])
    return total / (ROWS * T) + sum(auxiliary.values())

  return jax.jit(jax.value_and_grad(loss)), trained, rest, batch


def our_gradients(model_config: ModelConfig) -> Run:
  import jax

  fn, *arguments = gradients(model_config)
  return lambda: jax.block_until_ready(fn(*arguments))


def products_of_gradients(model_config: ModelConfig) -> Run:
  return products_alone.alone(*gradients(model_config))


def decoding(rows: int) -> tuple[Any, Any, Any]:
  """The functions of a model, its parameters and a batch of inputs."""
  import jax

  from t5x_cpm import mesh as mesh_lib
  from t5x_cpm.inference import programs

  config = Config(model=MODEL)
  functions = programs.build(config, mesh_lib.make_mesh(config.mesh))
  params = functions.prepare(jax.jit(functions.model.init)(jax.random.key(0)))
  batch = {name: value for name, value in random_batch(rows).items() if name in ('encoder_input_tokens', 'encoder_segment_ids')}
  return functions, params, batch


def our_decoding(rows: int) -> Run:
  import jax

  from t5x_cpm.inference import decode, programs

  functions, params, batch = decoding(rows)
  program = programs.Resident(functions, params)
  rule = decode.Greedy(max_new_tokens=NEW_TOKENS)
  start, never = np.ones((rows, 1), np.int32), np.full((rows, 1), -1, np.int32)

  def run() -> Any:
    out = jax.block_until_ready(program.generate(rule, batch, start, never))
    assert out.tokens.shape == (rows, NEW_TOKENS)
    return out

  return run


def products_of_decoding(rows: int) -> Run:
  import jax
  import jax.numpy as jnp

  functions, params, batch = decoding(rows)
  model = functions.model  # not compiled, so that its products can be found
  start = functools.partial(model.start, max_len=NEW_TOKENS)
  cache = jax.eval_shape(start, params, batch)
  token = jnp.zeros((rows, 1), jnp.int32)
  begin, step = products_alone.alone(start, params, batch), products_alone.alone(model.step, params, cache, token, token)

  def run() -> Any:
    begin()
    for _ in range(NEW_TOKENS):
      step()

  return run


# transformers.


def their_model() -> Any:
  import torch
  import transformers

  config = transformers.T5Config(
      vocab_size=MODEL.vocab_size, d_model=MODEL.d_model, d_ff=MODEL.d_ff, d_kv=MODEL.head_dim, num_heads=MODEL.num_heads,
      num_layers=MODEL.num_encoder_layers, num_decoder_layers=MODEL.num_decoder_layers, feed_forward_proj='gated-gelu',
      tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None)
  model = transformers.T5ForConditionalGeneration(config)
  # Version 5 of transformers ties the tables whatever the configuration says.
  model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  return model


def attention_of(model: Any) -> str:
  """Which attention implementation a model of transformers uses, as it names it."""
  return str(model.config._attn_implementation)


def their_training() -> tuple[Run, str]:
  import torch

  model = their_model().train()
  model.config.use_cache = False
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
  batch = random_batch(ROWS)
  inputs, labels = (torch.from_numpy(batch[name]).long() for name in ('encoder_input_tokens', 'decoder_target_tokens'))

  def run() -> Any:
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.item()

  return run, attention_of(model)


def their_experts() -> tuple[Run, str]:
  """Loss and gradients of SwitchTransformers with experts in every other layer (it has no setting for all of them)."""
  import torch
  import transformers

  config = transformers.SwitchTransformersConfig(
      vocab_size=MODEL.vocab_size, d_model=MODEL.d_model, d_ff=MODEL.d_ff, d_kv=MODEL.head_dim, num_heads=MODEL.num_heads,
      num_layers=MODEL.num_encoder_layers, num_decoder_layers=MODEL.num_decoder_layers, num_experts=EXPERTS,
      num_sparse_encoder_layers=MODEL.num_encoder_layers // 2, num_sparse_decoder_layers=MODEL.num_decoder_layers // 2,
      expert_capacity=round(1.25 * S / EXPERTS), router_jitter_noise=0.0, dropout_rate=0.0, decoder_start_token_id=0)
  model = transformers.SwitchTransformersForConditionalGeneration(config).train()
  model.config.use_cache = False
  batch = random_batch(ROWS)
  inputs, labels = (torch.from_numpy(batch[name]).long() for name in ('encoder_input_tokens', 'decoder_target_tokens'))

  def run() -> Any:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=inputs, labels=labels, output_router_logits=True).loss
    loss.backward()
    return loss.item()

  return run, attention_of(model)


def their_decoding(rows: int) -> tuple[Run, str]:
  import torch

  model = their_model().eval()
  inputs = torch.from_numpy(random_batch(rows)['encoder_input_tokens']).long()

  def run() -> Any:
    with torch.inference_mode():
      out = model.generate(input_ids=inputs, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, use_cache=True)
    assert out.shape == (rows, NEW_TOKENS + 1), out.shape
    return out

  return run, attention_of(model)


def decoding_bytes(rows: int) -> float:
  """Bytes read to generate the tokens of one run: the decoder's weights, the head, and the keys and values so far."""
  D, HK, L = MODEL.d_model, MODEL.num_heads * MODEL.head_dim, MODEL.num_decoder_layers
  weights = L * (6 * D * HK + 3 * D * MODEL.d_ff) + D * MODEL.vocab_size
  return 4.0 * NEW_TOKENS * (weights + L * rows * 2 * HK * (S + NEW_TOKENS / 2))


def cases() -> dict[str, list[Case]]:
  """What each command compares."""
  from t5x_cpm.training import flops

  def needed(model: ModelConfig) -> float:
    return flops.model_flops(model, ROWS * S, ROWS * T, S, T)

  def with_experts(every: int = 1, **options: Any) -> ModelConfig:
    moe = MoEConfig(num_experts=EXPERTS, encoder_every=every, decoder_every=every, **options)
    return dataclasses.replace(MODEL, moe=moe, **({'mlp_activation': 'relu', 'tie_embeddings': True} if every == 2 else {}))

  def twin(name: str, **options: Any) -> Case:
    """Compares with our dense model of equal active parameters, in place of PyTorch."""
    model = with_experts(**options)
    return Case(f'{EXPERTS} experts, {name} (dense twin)', 1 / 1.35, functools.partial(our_gradients, model),
                lambda: (our_gradients(MODEL), ''), ROWS * (S + T), needed(model))

  switch = with_experts(every=2, group_size=256)
  return {
      'moe': [
          twin('einsum in 256', group_size=256), twin('dropless', group_size=256, dispatch='dropless'),
          twin('CPM-2, einsum in 512', group_size=512, router='random_projection'),
          Case(f'{EXPERTS} experts, Switch, every other layer', 2.0, functools.partial(our_gradients, switch), their_experts,
               ROWS * (S + T), needed(switch), products=functools.partial(products_of_gradients, switch))],
      'train': [Case(f'training step, {ROWS} x ({S} + {T})', 1.3, our_training, their_training, ROWS * (S + T),
                     needed(MODEL), products=products_of_training)],
      'decode': [
          Case(f'greedy, {NEW_TOKENS} tokens, batch {rows}', target, functools.partial(our_decoding, rows),
               functools.partial(their_decoding, rows), rows * NEW_TOKENS,
               flops.model_flops(MODEL, rows * S, 0, S, 0) / 3, decoding_bytes(rows),
               functools.partial(products_of_decoding, rows))
          for rows, target in ((1, 2.0), (8, 3.0))],
  }


def main() -> None:
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('command', nargs='?', default='all', choices=['all', *cases()])
  given = side_by_side.arguments(parser)
  if given.worker:
    side_by_side.work(cases()[given.command][given.index], given.worker, given.threads)
    return
  rows = []
  for command, group in cases().items():
    for index, case in enumerate(group):
      if given.command in ('all', command):
        print(f'{case.title} ...', file=sys.stderr, flush=True)
        rows.append(side_by_side.compare(__file__, command, index, case, given.repeats, given.threads))
  figures: dict[str, Any] = {'machine': side_by_side.machine(given.threads, given.repeats), 'rows': rows}
  side_by_side.show(figures['machine'], rows)
  if given.command in ('all', 'moe'):
    figures['layer'] = expert_layer.report(MODEL, given.repeats, given.threads)
  if given.json:
    with open(given.json, 'w', encoding='utf-8') as file:
      json.dump(figures, file, indent=2)


if __name__ == '__main__':
  run_script(main)
