"""What it costs to answer each row of a batch with a delta of its own, on a model at random.

    python tools/benchmarks/many_deltas.py --gin_file=gin/models/cpm2_small.gin

Prints tokens a second with greedy decoding: without a delta, with one, and with one for each row, drawn from --deltas of them.
Each figure is the best of several rounds, in which the arms take turns.
"""

import dataclasses
import json
import pathlib
import tempfile
import time

import jax
import numpy as np

from t5x_cpm import backend, inference, trees, tuning, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser, at_least
from t5x_cpm.config import Config, DeltaConfig, MeshConfig, gin
from t5x_cpm.inference.engine import Engine
from t5x_cpm.models import encoder_decoder

METHODS = {'prompt': DeltaConfig(method='prompt'), 'lora': DeltaConfig(method='lora')}


def write_base(folder: pathlib.Path, config: Config) -> pathlib.Path:
  """A run with parameters at random."""
  vocabulary = vocabularies.load(config.task.vocabulary)
  model = encoder_decoder.build(config.model)
  with Manager(folder, config, info={'vocabulary': vocabulary.fingerprint}) as manager:
    manager.save(0, {'step': np.int32(0), 'params': jax.jit(model.init)(jax.random.key(0))})
  vocabulary.save(folder / 'vocabulary')
  return folder


def write_deltas(folder: pathlib.Path, config: Config, delta: DeltaConfig, count: int) -> dict[str, str]:
  """Deltas at random, by name."""
  config, run = dataclasses.replace(config, delta=delta), run_directory.read_run(folder)
  leaves, rng = trees.named(tuning.build_model(config).leaves()['delta']), np.random.default_rng(0)
  found, base = {}, tuning.find(folder)
  for number in range(count):
    path = folder.parent / f'{delta.method}{number}'
    tensors = {name: rng.normal(0, 0.02, [size for size, axis in zip(leaf.shape, leaf.axes) if axis != 'slot'])
               for name, leaf in leaves.items()}
    tuning.write(path, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, config, base, step=1,
                 vocabulary=run.info['vocabulary'], metrics={})
    found[f'{delta.method}{number}'] = str(path)
  return found


def measure(engine: Engine, names: list[list[str | None]], rounds: int) -> list[float]:
  """Tokens a second of each arm, whose deltas are given for each text."""
  texts, best = ['他走进房间，'] * len(names[0]), [0.0] * len(names)
  config = engine.decode_config()
  for number in range(rounds + 1):
    for arm, mine in enumerate(names):
      requests = engine.requests(texts, [name or '' for name in mine])
      started = time.perf_counter()
      tokens = sum(answer.tokens for answer in engine.answer_requests(requests, config))
      if number:  # the first round compiles
        best[arm] = max(best[arm], tokens / (time.perf_counter() - started))
  return best


def main() -> None:
  parser = Parser(prog='many_deltas.py', description=__doc__)
  parser.add_argument('--gin_file', action='append', default=[], help='of a model')
  parser.add_argument('--vocabulary', default='cpm2:tasks/corpus/vocab.txt', help='as in TaskConfig.vocabulary')
  parser.add_argument('--deltas', type=at_least(1), default=100, help='how many there are')
  parser.add_argument('--slots', type=at_least(1), default=0, help='DeltaConfig.slots; by default for all of them')
  parser.add_argument('--rows', type=at_least(1), default=32, help='of a batch')
  parser.add_argument('--rounds', type=at_least(1), default=5, help='of which the best counts')
  arguments = parser.parse_args()
  slots = arguments.slots or arguments.deltas
  overrides = [f'InferConfig.batch_size={arguments.rows}', f'DeltaConfig.slots={slots}', 'DecodeConfig.max_new_tokens=32',
               "TaskConfig.objective='pairs'", f'TaskConfig.vocabulary={arguments.vocabulary!r}']
  config = dataclasses.replace(gin.load(arguments.gin_file, overrides), mesh=MeshConfig())
  config = dataclasses.replace(config, model=dataclasses.replace(
      config.model, vocab_size=config.model.vocab_size or vocabularies.load(config.task.vocabulary).size))
  with tempfile.TemporaryDirectory() as folder:
    base = write_base(pathlib.Path(folder) / 'base', config)
    for method, delta in METHODS.items():
      engine = inference.load(base, config=config, deltas=write_deltas(base, config, delta, arguments.deltas))
      names = list(engine.deltas.names)
      draw = np.random.default_rng(1).choice(names, 4 * arguments.rows)
      none, one, many = measure(engine, [[None] * len(draw), names[:1] * len(draw), list(map(str, draw))], arguments.rounds)
      print(json.dumps({
          'method': method, 'device': backend.devices()[0].device_kind, 'deltas': arguments.deltas, 'slots': slots,
          'rows': arguments.rows,
          'tokens/s without': round(none), 'with one': round(one), 'with many': round(many),
          'many against one': round(many / one, 3), 'one against none': round(one / none, 3)}), flush=True)


if __name__ == '__main__':
  run_script(main)
