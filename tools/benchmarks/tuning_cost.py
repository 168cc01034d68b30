"""What a step of tuning costs, by method: full tuning and deltas here, and in PyTorch full tuning and peft's.

    pip install -e .[torch]
    python tools/benchmarks/tuning_cost.py [--repeats=9] [--threads=2] [--json=FILE]

The same model, batch and float32 on both sides. Each case runs in a process of its own, and they take turns, so that other
load on the machine hits all of them. `step` is the median of wall time, `CPU` of the processor's, `of full` compares a case
with full tuning on its side. `memory` is what the process holds at its peak beyond what it held before the model was made;
`program` is what XLA says that the arguments and temporaries of a step take. `saved` is the size of a checkpoint: of what is
trained, and of the optimizer's state.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time
from typing import Any

import numpy as np
import side_by_side
from against_pytorch import MODEL, ROWS, S, T, random_batch, their_model
from side_by_side import Run, Worker

from t5x_cpm import backend
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser
from t5x_cpm.config import Config, DeltaConfig, OptimizerConfig, TaskConfig, TrainConfig

P = 100  # vectors of a prompt
DELTAS = {
    'full': DeltaConfig(), 'prompt': DeltaConfig(method='prompt', base='base', prompt_length=P),
    'prefix': DeltaConfig(method='prefix', base='base', prefix_length=P),
    'lora': DeltaConfig(method='lora', base='base', sites=('query', 'value'), rank=8)}  # each takes 2 to 4 GB, all at once
CASES = [('ours', name) for name in DELTAS] + [('theirs', name) for name in ('full', 'prompt', 'lora')]


def _size(tree: Any) -> int:
  import jax

  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def ours(name: str) -> tuple[Run, dict[str, float]]:
  """A step of ours, and what is known of it without running it."""
  import jax

  from t5x_cpm import mesh as mesh_lib
  from t5x_cpm.training import step as step_lib

  delta = DELTAS[name]
  config = Config(
      model=MODEL, train=TrainConfig(batch_size=ROWS), task=TaskConfig(encoder_length=S + delta.prompts, decoder_length=T,
                                                                       objective='pairs'), delta=delta,
      optimizer=OptimizerConfig(name='adamw', learning_rate=1e-4, schedule='constant', clip_norm=0.0))
  config.validate()
  step = step_lib.build(config, mesh_lib.make_mesh(config.mesh))
  frozen: Any = {}
  if delta.method:
    shapes = step.abstract_frozen['base']
    rng = np.random.default_rng(0)
    frozen = {'base': jax.tree.map(lambda leaf: jax.device_put(0.05 * rng.standard_normal(leaf.shape, np.float32)), shapes)}
  batch = random_batch(ROWS)
  if delta.prompts:
    vectors = np.tile(MODEL.vocab_size + np.arange(P, dtype=np.int32), (ROWS, 1))
    wide = {'encoder_input_tokens': np.concatenate([vectors, batch['encoder_input_tokens']], 1),
            'encoder_segment_ids': np.ones((ROWS, S + P), np.int32),
            'encoder_positions': np.tile(np.arange(S + P, dtype=np.int32), (ROWS, 1))}
    batch |= wide
  state, on_device = step.init(jax.random.key(0), frozen), jax.device_put(batch)
  compiled = step.fn.lower(state, frozen, on_device).compile()
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  about = {'trained': sum(leaf.size for leaf in jax.tree.leaves(state['params'])), 'saved': _size(state),
           'program': memory.argument_size_in_bytes + memory.temp_size_in_bytes, 'flops': cost['flops']}

  def run() -> Any:
    nonlocal state
    state, metrics = compiled(state, frozen, on_device)
    return jax.block_until_ready(metrics)

  return run, about


def theirs(name: str) -> tuple[Run, dict[str, float]]:
  """A step of peft's method on transformers' T5."""
  import peft
  import torch

  model: Any = their_model().train()
  model.config.use_cache = False
  kind = peft.TaskType.SEQ_2_SEQ_LM
  if name == 'prompt':
    model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=P))
  elif name == 'lora':
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, r=8, lora_alpha=16, target_modules=['q', 'v']))
  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
  batch = random_batch(ROWS)
  inputs, labels = (torch.from_numpy(batch[side]).long() for side in ('encoder_input_tokens', 'decoder_target_tokens'))

  def run() -> Any:
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.item()

  count = sum(parameter.numel() for parameter in trained)
  return run, {'trained': count, 'saved': 12 * count}


def peak_bytes() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def work(side: str, name: str, threads: int) -> None:
  """Runs one case as a worker; `side_by_side.Worker` says how it is asked."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print must not come between the answers
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  if side == 'ours':
    import jax
    jax.devices()
    backend.keep_memory()
  else:
    import peft  # noqa: F401
    import torch
    torch.set_num_threads(threads)
  before = peak_bytes()
  run, about = ours(name) if side == 'ours' else theirs(name)
  for _ in range(3):
    run()
  print(json.dumps(about | {'memory': peak_bytes() - before}), file=answers, flush=True)
  for _ in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), file=answers, flush=True)


def show(rows: list[dict[str, Any]]) -> None:
  """Prints the table."""
  full = {row['side']: row for row in rows if row['name'] == 'full'}
  print(f'{"":14} {"step s":>7} {"of full":>7} {"CPU s":>7} {"memory MiB":>10} {"of full":>7} {"program MiB":>11} '
        f'{"of full":>7} {"GFLOPs":>7} {"of full":>7} {"trained":>11} {"saved MiB":>9}')
  for row in rows:
    first = full[row['side']]

    def figure(name: str, scale: float, width: int, digits: int = 0, row: dict = row, first: dict = first) -> str:
      if name not in row:
        return ' ' * (width + 8)
      return f'{row[name] / scale:{width}.{digits}f} {row[name] / first[name]:7.2f}'

    print(f'{row["side"]:>6} {row["name"]:7} {figure("step", 1, 7, 3)} {row["cpu"]:7.2f} {figure("memory", 2**20, 10)} '
          f'{figure("program", 2**20, 11)} {figure("flops", 1e9, 7)} {row["trained"]:11,} {row["saved"] / 2**20:9.2f}')


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('command', nargs='?', default='', help=argparse.SUPPRESS)
  given = side_by_side.arguments(parser)
  if given.worker:
    work(*CASES[given.index], given.threads)
    return
  workers = []
  for index, (side, name) in enumerate(CASES):
    print(f'{side} {name} ...', file=sys.stderr, flush=True)
    workers.append(Worker(side, __file__, name, index, given.threads))
  for _ in range(given.repeats):
    for worker in workers:
      worker.ask('run')
  rows = [{'side': side, 'name': name, 'step': worker.median('run'), 'cpu': worker.median('run', cpu=True), **worker.about}
          for (side, name), worker in zip(CASES, workers, strict=True)]
  for worker in workers:
    worker.close()
  figures = {'machine': side_by_side.machine(given.threads, given.repeats), 'rows': rows}
  show(rows)
  if given.json:
    pathlib.Path(given.json).write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
  run_script(main)
