"""How much memory `inherit` needs: a model of any size is to pass through a host in slices.

    python tools/benchmarks/inherit_memory.py --gin_file=gin/models/cpm2_large.gin --vocabulary=cpm2:FILE --folder=DIR \\
        --grow=--gin_file=gin/runs/inherit_experts.gin --grow=--gin.MoEConfig.num_experts=4

Writes a source with weights at random to DIR/source and grows it into DIR/grown. Prints the anonymous memory of the command
above that of the same command with --dry_run, in MiB and as a ratio to the largest slice (one layer of one tensor, one expert)
that it reads or writes, and the seconds. The files stay in the page cache, which the system takes back as it needs it.
"""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from t5x_cpm import vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.tensors import Index, TensorWriter
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser
from t5x_cpm.config import Config, ConfigError, gin
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf


def leaves_of(config: Config) -> list[Leaf]:
  return jax.tree.leaves(encoder_decoder.build(config.model).leaves())


def write_source(folder: pathlib.Path, config: Config) -> None:
  words = vocabularies.load(config.task.vocabulary)

  def draw(leaf: Leaf, index: Index) -> np.ndarray:
    return 0.02 * np.random.default_rng(index or 0).standard_normal(leaf.shape[len(index):], np.float32)

  with TensorWriter(folder, config, {'vocabulary': words.fingerprint}, leaves_of(config)) as writer:
    words.save(writer.partial / 'vocabulary')
    writer.fill(draw, 'source')


def peak_of(command: list[str]) -> tuple[float, float]:
  """Runs a command: the greatest anonymous memory of its process, in MiB, and seconds."""
  started, peak = time.monotonic(), 0.0
  child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  status = pathlib.Path(f'/proc/{child.pid}/status')
  while child.poll() is None:
    lines = status.read_text().splitlines() if status.exists() else []
    peak = max([peak, *(int(line.split()[1]) / 1024 for line in lines if line.startswith('RssAnon'))])
    time.sleep(0.005)
  if child.returncode:
    raise ConfigError(f'`{" ".join(command)}` ended with {child.returncode}.')
  return peak, time.monotonic() - started


def largest_slice(config: Config) -> float:
  """MiB."""
  return max(leaf.size * np.dtype(leaf.dtype).itemsize / math.prod(leaf.shape[:len(leaf.stacked)])
             for leaf in leaves_of(config)) / 2**20


def main() -> None:
  parser = Parser(prog='inherit_memory.py', description=__doc__)
  parser.add_argument('--gin_file', action='append', default=[], help='of the source')
  parser.add_argument('--vocabulary', default='cpm2:tasks/corpus/vocab.txt', help='as in TaskConfig.vocabulary')
  parser.add_argument('--grow', action='append', default=[], help='a flag of `inherit`; given once for each')
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='for the models')
  args = parser.parse_args()
  config = gin.load(args.gin_file, ['ModelConfig.vocab_size=0', f'TaskConfig.vocabulary={args.vocabulary!r}'])
  size = vocabularies.load(config.task.vocabulary).size
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
  source, grown = args.folder / 'source', args.folder / 'grown'
  if not source.exists():
    write_source(source, config)
  command = [sys.executable, '-m', 't5x_cpm', 'inherit', f'--source={source}', f'--model_dir={grown}', *args.grow]
  start, _ = peak_of([*command, '--dry_run'])
  peak, seconds = peak_of(command)
  result = run_directory.read_run(grown).config
  slice_mib = max(map(largest_slice, (config, result)))
  gib = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves_of(result)) / 2**30
  print(json.dumps({'GiB written': round(gib, 2), 'largest slice MiB': round(slice_mib), 'start-up MiB': round(start),
                    'above it MiB': round(peak - start), 'of the largest slice': round((peak - start) / slice_mib, 2),
                    'seconds': round(seconds), 'GiB/s': round(gib / seconds, 3)}))


if __name__ == '__main__':
  run_script(main)
