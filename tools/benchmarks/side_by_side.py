"""Times two processes that take turns at the same work, and prints a table. Not a program of its own.

`against_pytorch.py` says what the work is. Each figure is the median of runs that alternate between the two sides, so that
other load on the machine hits both; the table names everything that a figure depends on.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from t5x_cpm import backend
from t5x_cpm.cli.parse import Parser, at_least
from t5x_cpm.config import ConfigError

GEMM = 2048  # size of the square product whose rate is the yardstick
STREAM = 2**28  # bytes that are summed to measure how fast memory is read
PACKAGES = ('jax', 'jaxlib', 'torch', 'transformers')
# Instructions that products of matrices use, as /proc/cpuinfo names them (x86, then Arm).
INSTRUCTIONS = ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_tile', 'amx_bf16',
                'asimd', 'sve', 'sve2', 'bf16', 'svebf16')

Run = Callable[[], Any]  # does the work once and waits for it


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison.

  Attributes:
    title: its name in the table.
    target: the ratio to reach.
    ours: prepares our side and returns what is timed.
    theirs: likewise for the peer, and says which attention implementation it has chosen ('' if it is not of transformers).
    tokens: how many tokens one run computes.
    flops: FLOPs of the products of many rows in one run.
    bytes: bytes of float32 weights and keys that one run reads anew for every token, in all.
    products: prepares the matrix products of our side alone.
  """

  title: str
  target: float
  ours: Callable[[], Run]
  theirs: Callable[[], tuple[Run, str]]
  tokens: int
  flops: float
  bytes: float = 0.0
  products: Callable[[], Run] | None = None


def arguments(parser: Parser) -> argparse.Namespace:
  """The arguments of a program that compares, which add to its own how often, with how many threads, and where to write.

  Raises:
    ConfigError: --json names a file in a folder that is not there.
  """
  parser.add_argument('--repeats', type=at_least(1), default=9, help='runs of each case')
  parser.add_argument('--threads', type=at_least(1), default=len(os.sched_getaffinity(0)), help='threads of each case')
  parser.add_argument('--json', help='file to write the figures to as well')
  parser.add_argument('--worker', choices=['ours', 'theirs'], help=argparse.SUPPRESS)
  parser.add_argument('--index', type=int, default=0, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.json and not pathlib.Path(given.json).absolute().parent.is_dir():
    raise ConfigError(f'--json={given.json}: there is no such folder.')
  return given


def machine(threads: int, repeats: int) -> dict[str, Any]:
  """What all figures of a table depend on."""
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  about = {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in lines)}
  flags = (about.get('flags') or about.get('Features') or '').split()
  return {
      'versions': {name: importlib.metadata.version(name) for name in PACKAGES}, 'python': platform.python_version(),
      'processor': about.get('model name') or platform.processor() or platform.machine(),
      'instructions': [name for name in INSTRUCTIONS if name in flags], 'threads': threads, 'repeats': repeats}


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
  """Runs as a worker: describes its side, then does what each line of its input names and answers with the seconds taken.

  Answers are lines of JSON: first a dict, then pairs of wall and CPU seconds.
  """
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print must not come between the answers
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  about = {}
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
    run, attention = case.theirs()
    about = {'attention': attention, 'torch instructions': torch.backends.cpu.get_cpu_capability()}
    runs = {'run': run, 'gemm': their_gemm(), 'stream': their_stream()}
  for run in 5 * (*runs.values(),):  # compiles, fills caches, and lets the heap grow to what it needs
    run()
  print(json.dumps(about), file=answers, flush=True)
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
    self.about: dict[str, str] = self._answer()

  def _answer(self) -> Any:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'error: the process of {self.side} ended with status {self.process.wait()}.')
    return json.loads(line)

  def ask(self, what: str) -> None:
    assert self.process.stdin is not None
    self.process.stdin.write(what + '\n')
    self.process.stdin.flush()
    wall, cpu = self._answer()
    self.seconds[what].append((wall, cpu))

  def median(self, what: str, cpu: bool = False) -> float:
    return statistics.median(pair[cpu] for pair in self.seconds[what])

  def close(self) -> None:
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()


def compare(script: str, command: str, index: int, case: Case, repeats: int, threads: int) -> dict[str, Any]:
  """Times one case, `repeats` runs of each side in turn.

  Args:
    script: the file that starts a worker when it is given --worker.
    command, index: name the case to the workers.
    case: the same case.
    repeats: runs of each side.
    threads: threads of each side.

  Returns:
    The figures of its row of the table.
  """
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
      'case': case.title, 'attention': theirs.about['attention'], 'torch instructions': theirs.about['torch instructions'],
      'ours': mine, 'peer': their, 'ratio': their / mine, 'target': case.target,
      'ours cpu': ours.median('run', cpu=True), 'peer cpu': theirs.median('run', cpu=True),
      'cpu ratio': theirs.median('run', cpu=True) / ours.median('run', cpu=True),
      'tokens/s': case.tokens / mine, 'gemm GFLOP/s': gemm / 1e9, 'stream GB/s': stream / 1e9,
      'limit': their / (case.flops / gemm + case.bytes / stream),
      'products': their / ours.median('products') if case.products else None,
      'share': None if case.bytes else case.flops / mine / gemm,
      'peer share': None if case.bytes else case.flops / their / gemm}


def show(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
  """Prints the table: first what all of its figures depend on (`machine`), then a line for each case."""
  versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
  print(f'{versions}, Python {about["python"]}; medians of {about["repeats"]} interleaved runs')
  torch_uses = {row['torch instructions'] for row in rows}
  print(f'{about["processor"]}, {about["threads"]} threads, instructions {" ".join(about["instructions"]) or "unknown"}; '
        f'PyTorch uses {", ".join(sorted(torch_uses))}')
  head = f'{"":46} {"attention":>9} {"ours s":>8} {"peer s":>9} {"ratio":>6} {"target":>6} {"limit":>6} {"products":>8}'
  print(head, f'{"CPU s":>14} {"ratio":>6} {"tokens/s":>9}')
  for row in rows:
    cpu = f'{row["ours cpu"]:.2f} / {row["peer cpu"]:.2f}'
    seconds = f'{row["case"]:46} {row["attention"] or "ours":>9} {row["ours"]:8.3f} {row["peer"]:9.3f}'
    products = f'{row["products"]:8.2f}' if row['products'] else ' ' * 8
    print(seconds, f'{row["ratio"]:6.2f} {row["target"]:6.1f} {row["limit"]:6.2f} {products} {cpu:>14} {row["cpu ratio"]:6.2f} '
          f'{row["tokens/s"]:9.0f}')
  for row in rows:
    print(f'{row["case"]}: in this run products at {row["gemm GFLOP/s"]:.0f} GFLOP/s, memory at {row["stream GB/s"]:.0f} GB/s')
    if row['share']:
      print(f'  share of that rate of products: ours {row["share"]:.0%}, peer {row["peer share"]:.0%}')
