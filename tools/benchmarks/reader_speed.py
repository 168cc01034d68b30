"""How fast the reader makes batches from a warm cache on one core, and how soon it reaches any step.

    python tools/benchmarks/reader_speed.py [--documents=100000000]

Slots are those of the batch, encoder and decoder together, padding included; the ratio is to the 1 M slots/s that the project
promises. Documents are random tokens of random lengths; in the large cache only the lengths are real, and the tokens are a
sparse file of zeros. Every figure is one run of three seconds, in a process that has just started.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from t5x_cpm import vocabularies
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser, at_least
from t5x_cpm.config import Config, TaskConfig, TrainConfig
from t5x_cpm.data import cache, reader
from t5x_cpm.tasks import caches

PROMISED = 1e6
SPECIALS = ['<unk>', '<s>', '</s>', '\u2583', '<sep>', '<pad>', '<mask>', '<eod>', '\u2581', ',', '\u2582']


def make_config(folder: str, objective: str, batch_size: int, mean_span: float) -> Config:
  path = pathlib.Path(folder) / 'vocab.txt'
  if not path.is_file():
    letters = [chr(c) for c in range(0x4E00, 0x4E00 + 20_000)]
    path.write_text('\n'.join(SPECIALS + letters + [f'<s_{i}>' for i in range(190)]) + '\n', encoding='utf-8')
  return Config(task=TaskConfig(name='wiki_zh', vocabulary=f'cpm2:{path}', cache_dir=folder, objective=objective,
                                mean_span_length=mean_span), train=TrainConfig(batch_size=batch_size))


def fill(config: Config, lengths: np.ndarray, real: bool) -> None:
  """Writes a cache of documents of these lengths. If `real`, their tokens are random, otherwise they are a hole in the file."""
  path, total = caches.directory(config), int(lengths.sum())
  vocabulary = vocabularies.load(config.task.vocabulary)
  path.mkdir(parents=True, exist_ok=True)
  lengths.astype(np.uint32).tofile(path / 'train.targets.lengths')
  if real:
    np.random.default_rng(1).integers(11, 20_000, total, np.uint16).tofile(path / 'train.targets.tokens')
  else:
    with open(path / 'train.targets.tokens', 'wb') as f:
      f.truncate(2 * total)
  cache.finish(path, 'wiki_zh', vocabulary, {'train': {'documents': len(lengths), 'tokens': {'targets': total}}}, ['targets'])


def measure(arguments) -> None:
  """Prints one line of figures for the cache in a folder. Runs in a process of its own."""
  config = make_config(arguments.folder, arguments.objective, arguments.batch_size, arguments.mean_span)
  begin = time.perf_counter()
  read = reader.open_reader(caches.build(config), config, 'train')
  opened = time.perf_counter() - begin
  step = int(2.7 * read.rows_per_epoch) // arguments.batch_size  # in the third epoch
  read.batch(step)
  seek = time.perf_counter() - begin
  steps = [int(s) for s in np.random.default_rng(0).integers(0, 10**9, 200)]
  for warm in steps[:20]:
    read.batch(warm)
  begin, done = time.perf_counter(), 0
  while time.perf_counter() - begin < 3.0:
    read.batch(steps[done % 200])
    done += 1
  speed = done * arguments.batch_size * sum(read.room) / (time.perf_counter() - begin)
  statistics = read.statistics()
  print(json.dumps({'open_s': opened, 'seek_s': seek, 'slots_per_s': speed, 'pieces': statistics['pieces'],
                    'encoder': statistics['encoder_efficiency'], 'decoder': statistics['decoder_efficiency'],
                    'memory_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def run(folder: str, objective: str, batch_size: int, mean_span: float) -> dict:
  command = [sys.executable, __file__, f'--folder={folder}', f'--objective={objective}', f'--batch_size={batch_size}',
             f'--mean_span={mean_span}']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  if done.returncode:  # it has said why
    raise SystemExit(done.returncode)
  return json.loads(done.stdout)


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--documents', type=at_least(0), default=100_000_000,
                      help='documents of the simulated cache; 0 leaves it out')
  parser.add_argument('--batch_size', type=at_least(1), default=32)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  parser.add_argument('--objective', default='isolated', help=argparse.SUPPRESS)
  parser.add_argument('--mean_span', type=float, default=3.0, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.folder:
    measure(arguments)
    return
  rng = np.random.default_rng(0)
  texts = {'books of 50,000 tokens': rng.poisson(50_000, 400),
           'articles of about 500': rng.lognormal(6, 0.8, 40_000).astype(int) + 1,
           'sentences of about 50': np.maximum(rng.poisson(50, 400_000), 1)}
  print(f'{"documents":<24}{"objective":<10}{"span":>5}{"M slots/s":>11}{"ratio":>7}{"seek s":>8}{"encoder":>9}{"decoder":>9}')
  for name, lengths in texts.items():
    with tempfile.TemporaryDirectory() as folder:
      fill(make_config(folder, 'isolated', 32, 3.0), lengths, real=True)
      for objective, mean_span in (('isolated', 3.0), ('isolated', 10.0), ('t5', 3.0), ('cpm2', 3.0)):
        run(folder, objective, arguments.batch_size, mean_span)  # makes the index
        got = run(folder, objective, arguments.batch_size, mean_span)
        print(f'{name:<24}{objective:<10}{mean_span:>5.0f}{got["slots_per_s"] / 1e6:>11.2f}'
              f'{got["slots_per_s"] / PROMISED:>7.1f}{got["seek_s"]:>8.2f}{got["encoder"]:>9.3f}{got["decoder"]:>9.3f}',
              flush=True)
  if arguments.documents:
    with tempfile.TemporaryDirectory() as folder:
      lengths = np.concatenate([rng.lognormal(5, 1, min(10**7, arguments.documents - i)).astype(np.uint32) + 1
                                for i in range(0, arguments.documents, 10**7)])
      fill(make_config(folder, 'isolated', 32, 3.0), lengths, real=False)
      del lengths
      first, then = (run(folder, 'isolated', arguments.batch_size, 3.0) for _ in range(2))
      print(f'\nsimulated: {arguments.documents:,} documents, {first["pieces"]:,} pieces. The index takes '
            f'{first["open_s"]:.1f} s ({first["memory_mib"]:,.0f} MiB at most), once; afterwards a step of the third epoch is '
            f'reached in {then["seek_s"]:.2f} s ({then["memory_mib"]:,.0f} MiB), and others come at '
            f'{then["slots_per_s"] / 1e6:.2f} M slots/s.')


if __name__ == '__main__':
  run_script(main)
