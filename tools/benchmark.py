"""Speed against transformers' T5 in PyTorch on this CPU: same shape, threads and float32, in one run.

    pip install -e .[torch]
    python tools/benchmark.py                    # all
    python tools/benchmark.py train [--repeats=9] [--threads=2] [--json=FILE]
    python tools/benchmark.py decode

Each side runs in a process of its own, as its users run it, and the two take turns, so that what else the machine does hits
both. Figures are medians of wall time; a ratio above 1 means that this project is faster. Seconds of CPU are printed beside
them: on a busy machine their ratio is the steadier one. Weights are random; PyTorch uses its fused AdamW and transformers its
default attention, which are the faster choices of each.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from t5x_cpm import backend
from t5x_cpm.config import Config, ModelConfig, OptimizerConfig, TaskConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=26_240, d_model=512, d_ff=1024, num_heads=8, head_dim=64, num_encoder_layers=8, num_decoder_layers=8)
ROWS, S, T = 8, 256, 64
NEW_TOKENS = 64
GEMM = 2048  # size of the square product whose rate is the yardstick
STREAM = 2**28  # bytes that are summed to learn how fast memory is read

Run = Callable[[], Any]  # does the work once and waits for it


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison.

  Attributes:
    title: for the table.
    target: ratio to reach.
    ours, theirs: prepare, and return what is timed.
    work: tokens of one run.
    flops: of the products of many rows in one run.
    bytes: of float32 weights and keys that one run reads again for every token.
  """

  title: str
  target: float
  ours: Callable[[], Run]
  theirs: Callable[[], Run]
  work: int
  flops: float
  bytes: float = 0.0


def random_batch(rows: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  batch = {name: rng.integers(2, MODEL.vocab_size, (rows, length)).astype(np.int32) for name, length in (
      ('encoder_input_tokens', S), ('decoder_input_tokens', T), ('decoder_target_tokens', T))}
  for side, length in (('encoder', S), ('decoder', T)):
    batch[f'{side}_segment_ids'] = np.ones((rows, length), np.int32)
    batch[f'{side}_positions'] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return batch | {'decoder_loss_weights': np.ones((rows, T), np.float32)}


# This project.


def our_training() -> Run:
  import jax

  from t5x_cpm import mesh as mesh_lib
  from t5x_cpm.training import step as step_lib

  config = Config(
      model=MODEL, train=TrainConfig(batch_size=ROWS), task=TaskConfig(encoder_length=S, decoder_length=T),
      optimizer=OptimizerConfig(name='adamw', learning_rate=1e-4, schedule='constant', clip_norm=0.0))
  step = step_lib.build(config, mesh_lib.make_mesh(config.mesh))
  batch = jax.device_put(random_batch(ROWS))
  state = step.init(jax.random.key(0))

  def run() -> Any:
    nonlocal state
    state, metrics = step.fn(state, {}, batch)
    return jax.block_until_ready(metrics)

  return run


def our_decoding(rows: int) -> Run:
  import jax
  import jax.numpy as jnp

  from t5x_cpm.inference import decode
  from t5x_cpm.models import encoder_decoder

  model = encoder_decoder.build(MODEL)
  params = jax.jit(lambda key: model.prepare(model.init(key)))(jax.random.key(0))
  batch = {name: value for name, value in random_batch(rows).items() if name in ('encoder_input_tokens', 'encoder_segment_ids')}
  rule = decode.Greedy(max_new_tokens=NEW_TOKENS)
  start, never = jnp.ones((rows, 1), jnp.int32), jnp.full((rows, 1), -1)

  @jax.jit
  def generate(params: Any, batch: Any) -> Any:
    cache, _ = model.start(params, batch, NEW_TOKENS)
    return decode.while_loop(functools.partial(model.step, params), cache, rule, start, never)

  def run() -> Any:
    out = jax.block_until_ready(generate(params, batch))
    assert out.tokens.shape == (rows, NEW_TOKENS)
    return out

  return run


def our_gemm() -> Run:
  import jax
  import jax.numpy as jnp

  x = jnp.asarray(np.random.default_rng(0).standard_normal((GEMM, GEMM), np.float32))
  product = jax.jit(lambda x: x @ x)
  return lambda: product(x).block_until_ready()


def our_stream() -> Run:
  import jax
  import jax.numpy as jnp

  x = jnp.ones(STREAM // 4, jnp.float32)
  total = jax.jit(jnp.sum)
  return lambda: total(x).block_until_ready()


# transformers.


def their_model() -> Any:
  import torch
  import transformers

  config = transformers.T5Config(
      vocab_size=MODEL.vocab_size, d_model=MODEL.d_model, d_ff=MODEL.d_ff, d_kv=MODEL.head_dim, num_heads=MODEL.num_heads,
      num_layers=MODEL.num_encoder_layers, num_decoder_layers=MODEL.num_decoder_layers, feed_forward_proj='gated-gelu',
      tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None)
  model = transformers.T5ForConditionalGeneration(config)
  # Version 5 ties the tables whatever the configuration says.
  model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  return model


def their_training() -> Run:
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

  return run


def their_decoding(rows: int) -> Run:
  import torch

  model = their_model().eval()
  inputs = torch.from_numpy(random_batch(rows)['encoder_input_tokens']).long()

  def run() -> Any:
    with torch.inference_mode():
      out = model.generate(input_ids=inputs, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, use_cache=True)
    assert out.shape == (rows, NEW_TOKENS + 1), out.shape
    return out

  return run


def their_gemm() -> Run:
  import torch

  x = torch.from_numpy(np.random.default_rng(0).standard_normal((GEMM, GEMM), np.float32))
  return lambda: x @ x


def their_stream() -> Run:
  import torch

  x = torch.ones(STREAM // 4)
  return lambda: x.sum()


def decoding_bytes(rows: int) -> float:
  """What the tokens of one run read: the decoder's weights, the head, and the keys and values that are there."""
  D, HK, L = MODEL.d_model, MODEL.num_heads * MODEL.head_dim, MODEL.num_decoder_layers
  weights = L * (6 * D * HK + 3 * D * MODEL.d_ff) + D * MODEL.vocab_size
  return 4.0 * NEW_TOKENS * (weights + L * rows * 2 * HK * (S + NEW_TOKENS / 2))


def cases() -> dict[str, list[Case]]:
  """What each subcommand compares."""
  from t5x_cpm.training import flops

  needed = flops.model_flops(MODEL, ROWS * S, ROWS * T, S, T)
  return {
      'train': [Case(f'training step, {ROWS} x ({S} + {T})', 1.3, our_training, their_training, ROWS * (S + T), needed)],
      'decode': [
          Case(f'greedy, {NEW_TOKENS} tokens, batch {rows}', target, functools.partial(our_decoding, rows),
               functools.partial(their_decoding, rows), rows * NEW_TOKENS,
               flops.model_flops(MODEL, rows * S, 0, S, 0) / 3, decoding_bytes(rows))
          for rows, target in ((1, 2.0), (8, 3.0))],
  }


# The two processes of a case, and the table.


def work(side: str, command: str, index: int, threads: int) -> None:
  """A worker: does what each line of its input names, and answers with wall and CPU seconds."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print does not go between the answers
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  case = cases()[command][index]
  if side == 'ours':
    backend.keep_memory()
    runs = {'run': case.ours(), 'gemm': our_gemm(), 'stream': our_stream()}
  else:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    runs = {'run': case.theirs(), 'gemm': their_gemm(), 'stream': their_stream()}
  for run in (*runs.values(), *runs.values()):  # compiles, and fills caches
    run()
  print('ready', file=answers, flush=True)
  for line in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    runs[line.strip()]()
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), file=answers, flush=True)


class Worker:
  """A process that runs one side of a case when asked to."""

  def __init__(self, side: str, command: str, index: int, threads: int):
    arguments = [sys.executable, os.path.abspath(__file__), command]
    arguments += [f'--worker={side}', f'--index={index}', f'--threads={threads}']
    self.side = side
    self.process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    self.seconds: dict[str, list[tuple[float, float]]] = {'run': [], 'gemm': [], 'stream': []}
    self._answer()

  def _answer(self) -> str:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'error: the process of {self.side} ended with status {self.process.wait()}.')
    return line

  def ask(self, what: str) -> None:
    assert self.process.stdin is not None
    self.process.stdin.write(what + '\n')
    self.process.stdin.flush()
    wall, cpu = json.loads(self._answer())
    self.seconds[what].append((wall, cpu))

  def median(self, what: str, cpu: bool = False) -> float:
    return statistics.median(pair[cpu] for pair in self.seconds[what])

  def close(self) -> None:
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()


def compare(command: str, index: int, case: Case, repeats: int, threads: int) -> dict[str, Any]:
  """Times one case; returns the figures of its row."""
  ours = Worker('ours', command, index, threads)
  theirs = Worker('theirs', command, index, threads)
  for _ in range(repeats):
    for worker in (ours, theirs):
      for what in ('gemm', 'stream', 'run'):
        worker.ask(what)
  ours.close()
  theirs.close()
  mine, their = ours.median('run'), theirs.median('run')
  gemm = 2.0 * GEMM**3 / min(ours.median('gemm'), theirs.median('gemm'))
  stream = STREAM / min(ours.median('stream'), theirs.median('stream'))
  return {
      'case': case.title, 'ours': mine, 'pytorch': their, 'ratio': their / mine, 'target': case.target,
      'ours cpu': ours.median('run', cpu=True), 'pytorch cpu': theirs.median('run', cpu=True),
      'cpu ratio': theirs.median('run', cpu=True) / ours.median('run', cpu=True),
      'tokens/s': case.work / mine, 'gemm GFLOP/s': gemm / 1e9, 'stream GB/s': stream / 1e9,
      'limit': their / (case.flops / gemm + case.bytes / stream),
      'share': None if case.bytes else case.flops / mine / gemm,
      'pytorch share': None if case.bytes else case.flops / their / gemm}


def show(rows: list[dict[str, Any]]) -> None:
  head = f'{"":36} {"ours s":>8} {"PyTorch s":>9} {"ratio":>6} {"target":>6} {"limit":>6}'
  print(head, f'{"CPU s":>14} {"ratio":>6} {"tokens/s":>9}')
  for row in rows:
    cpu = f'{row["ours cpu"]:.2f} / {row["pytorch cpu"]:.2f}'
    seconds = f'{row["case"]:36} {row["ours"]:8.3f} {row["pytorch"]:9.3f}'
    print(seconds, f'{row["ratio"]:6.2f} {row["target"]:6.1f} {row["limit"]:6.2f} {cpu:>14} {row["cpu ratio"]:6.2f} '
          f'{row["tokens/s"]:9.0f}')
  for row in rows:
    print(f'{row["case"]}: in this run products at {row["gemm GFLOP/s"]:.0f} GFLOP/s, memory at {row["stream GB/s"]:.0f} GB/s')
    if row['share']:
      print(f'  share of that rate of products: ours {row["share"]:.0%}, PyTorch {row["pytorch share"]:.0%}')


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('command', nargs='?', default='all', choices=['all', *cases()])
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument('--json', help='file to write the figures to as well')
  parser.add_argument('--worker', choices=['ours', 'theirs'], help=argparse.SUPPRESS)
  parser.add_argument('--index', type=int, default=0, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.worker:
    work(given.worker, given.command, given.index, given.threads)
    return
  rows = []
  for command, group in cases().items():
    for index, case in enumerate(group):
      if given.command in ('all', command):
        print(f'{case.title} ...', file=sys.stderr, flush=True)
        rows.append(compare(command, index, case, given.repeats, given.threads))
  show(rows)
  if given.json:
    with open(given.json, 'w', encoding='utf-8') as file:
      json.dump({'threads': given.threads, 'rows': rows}, file, indent=2)


if __name__ == '__main__':
  main()
