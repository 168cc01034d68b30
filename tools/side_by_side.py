"""Two processes that take turns at the same work, and the table of their times: what tools/benchmark.py is made of."""

import dataclasses
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
    products: the matrix products of ours alone.
  """

  title: str
  target: float
  ours: Callable[[], Run]
  theirs: Callable[[], Run]
  work: int
  flops: float
  bytes: float = 0.0
  products: Callable[[], Run] | None = None


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


def their_gemm() -> Run:
  import torch

  x = torch.from_numpy(np.random.default_rng(0).standard_normal((GEMM, GEMM), np.float32))
  return lambda: x @ x


def their_stream() -> Run:
  import torch

  x = torch.ones(STREAM // 4)
  return lambda: x.sum()


def work(case: Case, side: str, threads: int) -> None:
  """A worker: does what each line of its input names, and answers with wall and CPU seconds."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print does not go between the answers
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  if side == 'ours':
    backend.keep_memory()
    runs = {'run': case.ours(), 'gemm': our_gemm(), 'stream': our_stream()}
    if case.products:
      runs['products'] = case.products()
  else:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    runs = {'run': case.theirs(), 'gemm': their_gemm(), 'stream': their_stream()}
  for run in 5 * (*runs.values(),):  # compiles, fills caches, and lets the heap grow to what it needs
    run()
  print('ready', file=answers, flush=True)
  for line in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    runs[line.strip()]()
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), file=answers, flush=True)


class Worker:
  """A process that runs one side of a case when asked to."""

  def __init__(self, side: str, script: str, command: str, index: int, threads: int):
    arguments = [sys.executable, os.path.abspath(script), command]
    arguments += [f'--worker={side}', f'--index={index}', f'--threads={threads}']
    self.side = side
    self.process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    self.seconds: dict[str, list[tuple[float, float]]] = {'run': [], 'gemm': [], 'stream': [], 'products': []}
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


def compare(script: str, command: str, index: int, case: Case, repeats: int, threads: int) -> dict[str, Any]:
  """Times one case; returns the figures of its row."""
  ours = Worker('ours', script, command, index, threads)
  theirs = Worker('theirs', script, command, index, threads)
  for _ in range(repeats):
    for worker in (ours, theirs):
      for what in ('gemm', 'stream', 'run'):
        worker.ask(what)
    if case.products:
      ours.ask('products')
  ours.close()
  theirs.close()
  mine, their = ours.median('run'), theirs.median('run')
  gemm = 2.0 * GEMM**3 / min(ours.median('gemm'), theirs.median('gemm'))
  stream = STREAM / min(ours.median('stream'), theirs.median('stream'))
  return {
      'case': case.title, 'ours': mine, 'peer': their, 'ratio': their / mine, 'target': case.target,
      'ours cpu': ours.median('run', cpu=True), 'peer cpu': theirs.median('run', cpu=True),
      'cpu ratio': theirs.median('run', cpu=True) / ours.median('run', cpu=True),
      'tokens/s': case.work / mine, 'gemm GFLOP/s': gemm / 1e9, 'stream GB/s': stream / 1e9,
      'limit': their / (case.flops / gemm + case.bytes / stream),
      'products': their / ours.median('products') if case.products else None,
      'share': None if case.bytes else case.flops / mine / gemm,
      'peer share': None if case.bytes else case.flops / their / gemm}


def show(rows: list[dict[str, Any]]) -> None:
  head = f'{"":46} {"ours s":>8} {"peer s":>9} {"ratio":>6} {"target":>6} {"limit":>6} {"products":>8}'
  print(head, f'{"CPU s":>14} {"ratio":>6} {"tokens/s":>9}')
  for row in rows:
    cpu = f'{row["ours cpu"]:.2f} / {row["peer cpu"]:.2f}'
    seconds = f'{row["case"]:46} {row["ours"]:8.3f} {row["peer"]:9.3f}'
    products = f'{row["products"]:8.2f}' if row['products'] else ' ' * 8
    print(seconds, f'{row["ratio"]:6.2f} {row["target"]:6.1f} {row["limit"]:6.2f} {products} {cpu:>14} {row["cpu ratio"]:6.2f} '
          f'{row["tokens/s"]:9.0f}')
  for row in rows:
    print(f'{row["case"]}: in this run products at {row["gemm GFLOP/s"]:.0f} GFLOP/s, memory at {row["stream GB/s"]:.0f} GB/s')
    if row['share']:
      print(f'  share of that rate of products: ours {row["share"]:.0%}, peer {row["peer share"]:.0%}')
