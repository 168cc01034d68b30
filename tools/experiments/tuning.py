"""Compares ways of tuning on one small base: full tuning and deltas, lengths, initial values and places of prompts.

  python tools/experiments/tuning.py --lcqmc=DIR --texts='DIR/*.txt' --output=OUT

A base is pre-trained on the texts and on lines of arithmetic ("3 + 5 = 8") by span corruption, and once more by prefix_lm.
Then every arm is trained with each seed and evaluated on answers that it generates: on LCQMC (dev.txt trains, test.txt tests),
on sums whose operator is left out ("3 5 =" -> "8"), so that an arm must say which of four operations the base is to do, and on
two classes of lines ("3 + 5" -> "是", "3 大 5" -> "否").
Every arm keeps what it found in a file of its own, OUT/arms/ARM/results.json: the same command goes on where it was stopped. At
the end OUT/table.md and OUT/table.png show the means and the spread over seeds.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

from jobs import command, gin_flags, run_all, train, write_lines

from t5x_cpm import files, user_files
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser, at_least
from t5x_cpm.config import ConfigError

MODEL = '--gin_file=gin/models/cpm2_tiny.gin'
LABELS = {'0': '否', '1': '是'}
OPERATIONS = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '大': max, '小': min}
QUESTIONS = '“{sentence1}”和“{sentence2}”的意思一样？'
TEMPLATES = {'lcqmc': (QUESTIONS, '{label}'), 'sums': ('{a} {b} =', '{c}'), 'classes': ('{a} {name} {b}', '{label}')}
LEARNED = 0.9  # accuracy of tokens: a label and the end of the text, so that 8 of 10 labels are right
LENGTHS = {'lcqmc': 80, 'sums': 8, 'classes': 8}  # tokens of the longest inputs; what a prompt takes comes on top
POSITIONS = {  # of CPM-2: front, middle, back, and mixes
    'F': ('{p}{a}{b}', (20,)), 'M': ('{a}{p}{b}', (20,)), 'B': ('{a}{b}{p}', (20,)), 'F+M': ('{p}{a}{p}{b}', (10, 10)),
    'M+B': ('{a}{p}{b}{p}', (10, 10)), 'F+B': ('{p}{a}{b}{p}', (10, 10)), 'F+M+B': ('{p}{a}{p}{b}{p}', (7, 7, 6))}
METHODS = ('prompt', 'prefix', 'lora', 'ia3', 'adapter', 'bitfit')


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way of tuning.

  Attributes:
    table: the comparison that it is part of.
    name: in this comparison.
    task: 'lcqmc', 'sums' or 'classes'.
    gin: a file of gin/runs.
    flags: what it changes, as CLASS.FIELD -> value.
    base: 'adapted', or 'pretrained' by span corruption alone.
  """

  table: str
  name: str
  task: str
  gin: str
  flags: dict[str, object] = dataclasses.field(default_factory=dict)
  base: str = 'adapted'


def arms() -> Iterator[Arm]:
  """All arms; one that is part of two comparisons comes twice, and is trained once."""
  for task in ('lcqmc', 'sums'):
    yield Arm('method', 'full', task, 'finetune', {'OptimizerConfig.learning_rate': 0.0005})
    for method in METHODS:
      yield Arm('method', method, task, 'prompt_tune' if method == 'prompt' else method)
    yield Arm('method', 'prompt, not adapted', task, 'prompt_tune', base='pretrained')
    yield Arm('method', 'full, not adapted', task, 'finetune', {'OptimizerConfig.learning_rate': 0.0005}, base='pretrained')
  for task, length in itertools.product(('sums', 'classes'), (1, 5, 20, 100)):
    changed = {} if length == 100 else {'DeltaConfig.prompt_length': length}
    yield Arm('prompt length', str(length), task, 'prompt_tune', changed)
  yield Arm('prompt length', '20, not adapted', 'classes', 'prompt_tune', {'DeltaConfig.prompt_length': 20}, base='pretrained')
  for task, words in (('sums', tuple(OPERATIONS)), ('classes', tuple(LABELS.values()))):
    for name, flags in (('random', {'DeltaConfig.prompt_init': 'random'}), ('vocabulary', {}),
                        ('words', {'DeltaConfig.prompt_init': 'words', 'DeltaConfig.prompt_words': words})):
      yield Arm('initial values', name, task, 'prompt_tune', flags | {'DeltaConfig.prompt_length': 20})
  for name, (form, lengths) in POSITIONS.items():
    yield Arm('place', name, 'sums', 'prompt_tune', {
        'LocalTaskConfig.inputs_template': form.format(p='<prompt>', a='{a}', b=' {b} ='), 'DeltaConfig.lengths': lengths})


def lcqmc_lines(path: pathlib.Path) -> Iterator[str]:
  """Lines of LCQMC (tab-separated sentence, sentence, 0 or 1) as JSON, with a word of CPM-2 for the label."""
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    parts = line.split('\t')
    if len(parts) != 3 or parts[2] not in LABELS:
      raise ConfigError(f'{path}:{number}: expected two sentences and 0 or 1, with tabs between.')
    yield json.dumps({'sentence1': parts[0], 'sentence2': parts[1], 'label': LABELS[parts[2]]}, ensure_ascii=False)


def prepare(lcqmc: pathlib.Path, texts: str, output: pathlib.Path) -> None:
  """Writes the data of all arms: arithmetic to pre-train on, sums, and LCQMC."""
  rng = random.Random(0)
  output.mkdir(parents=True, exist_ok=True)
  numbers = list(itertools.product(range(20), range(20)))
  write_lines(output / 'arithmetic.txt', (
      f'{a} {name} {b} = {operation(a, b)}' for _ in range(40) for a, b in rng.sample(numbers, 400)
      for name, operation in OPERATIONS.items()))
  rng.shuffle(numbers)
  for name, some in (('train', numbers[:300]), ('test', numbers[300:])):
    write_lines(output / f'sums.{name}.jsonl', (json.dumps({'a': a, 'b': b, 'c': a + b}) for a, b in some))
    write_lines(output / f'classes.{name}.jsonl', (
        json.dumps({'a': a, 'name': operation, 'b': b, 'label': label}, ensure_ascii=False)
        for a, b in some for operation, label in zip('+大', LABELS.values())))
  for name, file in (('train', 'dev.txt'), ('test', 'test.txt')):
    write_lines(output / f'lcqmc.{name}.jsonl', lcqmc_lines(lcqmc / file))
  user_files.find(texts, '--texts')


def bases(texts: str, output: pathlib.Path, steps: int) -> None:
  """Trains the vocabulary and both bases, unless they are there."""
  log, vocabulary = output / 'bases.log', output / 'vocab.txt'
  inputs = [texts, f'{output}/arithmetic.txt']
  if not vocabulary.exists():
    command(log, 'vocabulary', *(f'--input={path}' for path in inputs), '--size=3200', '--sentinels=50', '--byte_fallback',
            f'--output={vocabulary}')
  common = [MODEL, *gin_flags({
      'TaskConfig.name': 'local', 'TaskConfig.vocabulary': f'cpm2:{vocabulary}', 'TaskConfig.encoder_length': 256,
      'TaskConfig.decoder_length': 64, 'TaskConfig.cache_dir': str(output / 'cache'), 'TrainConfig.batch_size': 16,
      'LocalTaskConfig.files': {'texts': texts, 'arithmetic': inputs[1]}, 'CheckpointConfig.keep': 1,
      'LocalTaskConfig.rates': {'texts': 2, 'arithmetic': 1}})]
  for name, run, first, count in (('pretrained', 'pretrain', '', steps),
                                  ('adapted', 'adapt_prefix_lm', f'{output}/pretrained', steps // 2)):
    if not (output / f'{name}.done').exists():
      started = time.monotonic()
      source = [f'--init_from={first}'] if first else []
      train(log, output / name, count, f'--gin_file=gin/runs/{run}.gin', *common, *source,
            *gin_flags({'TrainConfig.eval_every': max(count // 5, 1)}))
      files.write_atomically(output / f'{name}.done', f'{time.monotonic() - started:.0f} s\n'.encode())


def prompt_of(arm: Arm) -> int:
  """How many vectors an arm's prompt has."""
  lengths: Any = arm.flags.get('DeltaConfig.lengths', (arm.flags.get('DeltaConfig.prompt_length', 100),))
  return sum(lengths)


def label_of(arm: Arm, seed: int) -> str:
  """The name of the folder of an arm, the same in each comparison that it is part of."""
  changed = ''.join(f'-{value}' for value in arm.flags.values())
  return ''.join(c if c.isalnum() or c in '-_' else '_' for c in f'{arm.task}-{arm.gin}-{arm.base}{changed}-{seed}')


def run_arm(arm: Arm, seed: int, steps: int, output: pathlib.Path) -> dict:
  """Trains and evaluates an arm with a seed, unless its results are there."""
  folder = output / 'arms' / label_of(arm, seed)
  results = folder / 'results.json'
  if results.exists():
    return user_files.json_file(results, str(results))
  folder.mkdir(parents=True, exist_ok=True)
  started = time.monotonic()
  flags = {
      'TaskConfig.vocabulary': f'cpm2:{output}/vocab.txt', 'TaskConfig.cache_dir': str(output / 'cache'),
      'TaskConfig.encoder_length': LENGTHS[arm.task] + (prompt_of(arm) if arm.gin == 'prompt_tune' else 0),
      'TaskConfig.decoder_length': 8, 'TrainConfig.batch_size': 16, 'TrainConfig.seed': seed,
      'TrainConfig.eval_every': steps // 20 or 1, 'TrainConfig.eval_batches': 4, 'CheckpointConfig.every': steps,
      'LocalTaskConfig.files': f'{output}/{arm.task}.train.jsonl',
      'LocalTaskConfig.validation_files': f'{output}/{arm.task}.test.jsonl',
      'LocalTaskConfig.inputs_template': TEMPLATES[arm.task][0],
      'LocalTaskConfig.targets_template': TEMPLATES[arm.task][1]} | arm.flags
  base = [f'--{"init_from" if arm.gin == "finetune" else "base"}={output}/{arm.base}']
  train(folder / 'log', folder / 'model', steps, *base, f'--gin_file=gin/runs/{arm.gin}.gin', *gin_flags(flags))
  trained = time.monotonic() - started
  command(folder / 'log', 'eval', f'--model_dir={folder}/model', '--tasks=local', *gin_flags({
      'EvalConfig.max_examples': 1000, 'EvalConfig.batch_size': 64, 'DecodeConfig.max_new_tokens': 8}))
  newest = max((folder / 'model' / 'eval').iterdir(), key=lambda path: int(path.name))
  metrics = user_files.json_file(newest / 'metrics.json', str(newest))['local']['metrics']
  lines = map(json.loads, (folder / 'model' / 'metrics.jsonl').read_text().splitlines())
  curve = [(line['step'], line['accuracy']) for line in lines if line['split'] == 'eval']
  found = {'arm': dataclasses.asdict(arm), 'seed': seed, 'steps': steps, 'accuracy': metrics['exact_match'], 'seconds': trained,
           'curve': curve, 'learned': next((step for step, value in curve if value >= LEARNED), None),
           'command': 'python -m t5x_cpm train ' + ' '.join([*base, *gin_flags(flags)])}
  shutil.rmtree(folder / 'model')
  files.write_atomically(results, (json.dumps(found, ensure_ascii=False, indent=1) + '\n').encode())
  return found


def show(found: dict[tuple[str, str], dict[str, list[dict]]], output: pathlib.Path) -> str:
  """Writes the table and the plot of (comparison, task) -> arm -> results, and returns the table."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot

  lines = [f'| comparison | task | arm | seeds | accuracy | spread | steps to {LEARNED:.0%} of tokens |',
           '|---|---|---|---:|---:|---:|---:|']
  figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 4), squeeze=False)
  for axis, ((comparison, task), results) in zip(axes[0], found.items()):
    accuracies = {name: [one['accuracy'] for one in several] for name, several in results.items()}
    means = [100 * statistics.mean(values) for values in accuracies.values()]
    spreads = [100 * (max(values) - min(values)) / 2 for values in accuracies.values()]
    axis.barh(list(accuracies), means, xerr=spreads, color='#4c72b0')
    axis.invert_yaxis()
    axis.set(title=f'{comparison}, {task}', xlabel='accuracy of answers, %', xlim=(0, 100))
    for (name, values), mean, spread in zip(accuracies.items(), means, spreads):
      learned = [one['learned'] for one in results[name]]
      steps = f'{statistics.mean(learned):.0f}' if None not in learned else f'{learned.count(None)} of {len(learned)} never'
      lines.append(f'| {comparison} | {task} | {name} | {len(values)} | {mean:.1f} % | {spread:.1f} | {steps} |')
  figure.tight_layout()
  figure.savefig(output / 'table.png', dpi=120)
  pyplot.close(figure)
  table = '\n'.join(lines)
  files.write_atomically(output / 'table.md', f'{table}\n'.encode())
  return table


def report(wanted: list[Arm], seeds: int, output: pathlib.Path, done: dict[str, dict]) -> str:
  """Brings the table and the plot up to date with what is done, by label."""
  found: dict[tuple[str, str], dict[str, list[dict]]] = {}
  for arm in wanted:
    if results := [done[label] for seed in range(seeds) if (label := label_of(arm, seed)) in done]:
      found.setdefault((arm.table, arm.task), {})[arm.name] = results
  return show(found, output)


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--lcqmc', type=pathlib.Path, required=True, help='folder with dev.txt and test.txt of LCQMC')
  parser.add_argument('--texts', required=True, help='glob of the text files that the base is pre-trained on')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='where everything is written')
  parser.add_argument('--seeds', type=at_least(1), default=3)
  parser.add_argument('--base_steps', type=at_least(1), default=4000, help='steps of pre-training; half as many adapt the base')
  parser.add_argument('--steps', type=at_least(1), default=500, help='steps of each arm')
  parser.add_argument('--parallel', type=at_least(1), default=2, help='arms that are trained at a time')
  parser.add_argument('--only', default='', help='comparisons, joined by commas; all by default')
  args = parser.parse_args()
  output = args.output.resolve()
  prepare(args.lcqmc, args.texts, output)
  bases(args.texts, output, args.base_steps)
  wanted = [arm for arm in arms() if not args.only or arm.table in args.only.split(',')]
  if not wanted:
    raise ConfigError(f'--only={args.only!r}: expected some of {", ".join(dict.fromkeys(arm.table for arm in arms()))}.')
  jobs = {label_of(arm, seed): functools.partial(run_arm, arm, seed, args.steps, output)
          for seed in range(args.seeds) for arm in wanted}
  run_all(jobs, args.parallel, lambda found: f'{found["accuracy"]:.1%}', functools.partial(report, wanted, args.seeds, output))


if __name__ == '__main__':
  run_script(main)
