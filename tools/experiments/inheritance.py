"""Measures what is gained by inheriting: from a teacher, an older stage, a dense model, shared layers.

  python tools/experiments/inheritance.py --zh='DIR/*.txt' --en='DIR/*.txt' --output=OUT

Each experiment has a few arms, and each arm is a chain of stages, of which a later one begins with an earlier one or learns
from it; a stage that several arms begin with is trained once for each seed. Models and what all runs share are in
gin/experiments/inheritance/. Every arm keeps what it found in a file of its own, OUT/EXPERIMENT/SEED/ARM.json: the same command
goes on where it was stopped. OUT/EXPERIMENT.md and OUT/EXPERIMENT.png show means and spreads over seeds.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import threading
from collections.abc import Iterator
from typing import Any

from jobs import command, gin_flags, run_all, train, write_lines

from t5x_cpm import files, user_files
from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser, at_least
from t5x_cpm.config import ConfigError
from t5x_cpm.vocabularies import texts

GIN = 'gin/experiments/inheritance'
HELD_OUT = 50  # one document of so many is for validation
LANGUAGES = ('zh', 'en')


@dataclasses.dataclass(frozen=True)
class Stage:
  """A run of `train`.

  Attributes:
    name: of its folder.
    steps: at its end.
    mixture: shares of the rows by language.
    model: a file of the experiments; '' for a stage that has the model of its source.
    flags: what else is set, as CLASS.FIELD -> value.
    source: the stage that it goes on with.
    growth: between the two, a file of gin/runs and what it is given beside.
    teacher: the stage that it learns from.
  """

  name: str
  steps: int
  mixture: dict[str, float]
  model: str = ''
  flags: dict[str, object] = dataclasses.field(default_factory=dict)
  source: 'Stage | None' = None
  growth: tuple[str, dict[str, object]] | None = None
  teacher: 'Stage | None' = None

  @property
  def languages(self) -> set[str]:
    """Those of its vocabulary."""
    of_source = set() if self.source is None else self.source.languages
    return set(self.mixture) | of_source


ZH, BOTH, EN = {'zh': 1.0}, {'zh': 2.0, 'en': 1.0}, {'en': 1.0}


def teachers() -> Iterator[Stage]:
  """A larger student of a smaller teacher (Qin et al. 2022), against the same model alone."""
  teacher = Stage('teacher', 600, ZH, 'small')
  student = Stage('alone', 400, ZH, 'medium')
  yield student
  for name, flags in (('linear', {}), ('constant', {'schedule': 'constant', 'alpha': 0.5, 'steps': 0}),
                      ('step', {'schedule': 'step'}), ('cosine', {'schedule': 'cosine'}),
                      ('linear, top 50', {'top_k': 50}), ('linear, top 10', {'top_k': 10})):
    yield dataclasses.replace(student, name=name, teacher=teacher, flags={
        f'TeacherConfig.{field}': value for field, value in ({'steps': 200} | flags).items()})


def bilingual() -> Iterator[Stage]:
  """A second language, inherited from a Chinese model against from scratch, and what is forgotten (Zhang et al. 2021)."""
  chinese = Stage('chinese', 300, ZH, 'medium')
  grow = 'inherit_vocabulary', {'TaskConfig.vocabulary': 'cpm2:{zh_en}'}
  yield Stage('from scratch, as many steps', 300, BOTH, 'medium')
  yield Stage('from scratch, all steps', 600, BOTH, 'medium')
  yield Stage('inherited, English : Chinese 1 : 2', 600, BOTH, source=chinese, growth=grow)
  yield Stage('inherited, English alone', 600, EN, source=chinese, growth=grow)


def experts() -> Iterator[Stage]:
  """Experts from a dense model, the dense model continued, and experts from scratch, at equal tokens (methods of CPM-2)."""
  dense = Stage('dense', 300, ZH, 'small')
  moe = {'MoEConfig.num_experts': 8, 'MoEConfig.router': 'random_projection'}
  switch = {'MoEConfig.num_experts': 8, 'MoEConfig.router': 'top_k', 'MoEConfig.top_k': 2, 'MoEConfig.renormalise': True}
  yield Stage('dense, continued', 600, ZH, source=dense)
  yield Stage('random projection, from dense', 600, ZH, source=dense, growth=('inherit_experts', moe))
  yield Stage('top 2, from dense', 600, ZH, source=dense, growth=('inherit_experts', switch))
  yield Stage('random projection, from scratch', 600, ZH, 'small', moe)
  yield Stage('top 2, from scratch', 600, ZH, 'small', switch)


def pseudo_to_real() -> Iterator[Stage]:
  """Layers that share parameters and become real at three points (Lin et al. 2021), against real ones from the start."""
  yield Stage('real from the start', 450, ZH, 'deep')
  yield Stage('pseudo to the end', 450, ZH, 'deep', {'ModelConfig.share_layers': True})
  for steps in (75, 150, 300):
    pseudo = Stage(f'pseudo {steps}', steps, ZH, 'deep', {'ModelConfig.share_layers': True})
    yield Stage(f'real after {steps}', 450, ZH, source=pseudo, growth=('inherit_unshare_layers', {}))


def prototypes() -> Iterator[Stage]:
  """k prototypes of which each chooses one expert, against the k best of all (Yang et al. 2021)."""
  for name, router, k in (('top 1', 'top_k', 1), ('top 2', 'top_k', 2), ('2 prototypes, top 1', 'prototypes', 2),
                          ('top 4', 'top_k', 4), ('4 prototypes, top 1', 'prototypes', 4)):
    yield Stage(name, 400, ZH, 'small', {'MoEConfig.num_experts': 8, 'MoEConfig.router': router, 'MoEConfig.top_k': k})


EXPERIMENTS = {'teachers': teachers, 'bilingual': bilingual, 'experts': experts, 'pseudo_to_real': pseudo_to_real,
               'prototypes': prototypes}
LOCKS: dict[pathlib.Path, threading.Lock] = collections.defaultdict(threading.Lock)  # by folder of a stage


def prepare(given: dict[str, str], output: pathlib.Path) -> None:
  """Writes texts of both languages, in two parts each, and two vocabularies, of which the second extends the first."""
  output.mkdir(parents=True, exist_ok=True)
  for language, pattern in given.items():
    if not (output / f'{language}.train.txt').exists():
      documents = [' '.join(text.split()) for text in texts.read([pattern], 'text')]
      write_lines(output / f'{language}.validation.txt', documents[::HELD_OUT])
      write_lines(output / f'{language}.train.txt', (text for number, text in enumerate(documents) if number % HELD_OUT))
  options = ['--sentinels=50', '--byte_fallback']
  for name, language, size, more in (('zh', 'zh', 4000, []), ('zh_en', 'en', 6000, [f'--extends={output}/zh.vocab.txt'])):
    if not (output / f'{name}.vocab.txt').exists():
      command(output / 'log', 'vocabulary', f'--input={output}/{language}.train.txt', f'--size={size}', *options, *more,
              f'--output={output}/{name}.vocab.txt')


def filled(flags: dict[str, object], output: pathlib.Path) -> list[str]:
  """Flags, in which {zh} and {zh_en} stand for the vocabularies."""
  paths = {name: f'{output}/{name}.vocab.txt' for name in ('zh', 'zh_en')}
  return gin_flags({name: value.format(**paths) if isinstance(value, str) else value for name, value in flags.items()})


def data_flags(mixture: dict[str, float], output: pathlib.Path) -> list[str]:
  return gin_flags({
      'LocalTaskConfig.files': {name: f'{output}/{name}.train.txt' for name in mixture},
      'LocalTaskConfig.validation_files': {name: f'{output}/{name}.validation.txt' for name in mixture},
      'LocalTaskConfig.rates': mixture, 'TaskConfig.cache_dir': f'{output}/cache'})


def shortened(stage: Stage, by: int) -> Stage:
  """A stage and all that it needs, with so many times fewer steps."""
  def of(other: Stage | None) -> Stage | None:
    return None if other is None else shortened(other, by)

  return dataclasses.replace(stage, steps=max(stage.steps // by, 1), source=of(stage.source), teacher=of(stage.teacher))


def made(stage: Stage, seed: int, folder: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
  """The model_dir of a stage, which is trained with all that it needs, unless that was done."""
  path = folder / stage.name.replace(' ', '_').replace(':', '').replace(',', '')
  with LOCKS[path]:
    done = path / 'done'
    if done.exists():
      return path
    more, log = [], folder / f'{path.name}.log'
    if stage.source is not None:
      source = made(stage.source, seed, folder, output)
      if stage.growth is not None:
        name, flags = stage.growth
        grown = folder / f'{path.name}.grown'
        if not grown.exists():
          command(log, 'inherit', f'--source={source}', f'--gin_file=gin/runs/{name}.gin', *filled(flags, output),
                  f'--gin.InheritConfig.seed={seed}', f'--model_dir={grown}')
        source = grown
      more += [f'--init_from={source}', '--gin.TrainConfig.go_on=True']
    else:
      vocabulary = '{zh_en}' if 'en' in stage.languages else '{zh}'
      more += [f'--gin_file={GIN}/{stage.model}.gin', *filled({'TaskConfig.vocabulary': f'cpm2:{vocabulary}'}, output)]
    if stage.teacher is not None:
      more += [f'--teacher={made(stage.teacher, seed, folder, output)}']
    train(log, path, stage.steps, *more, f'--gin_file={GIN}/run.gin', *data_flags(stage.mixture, output),
          *filled(stage.flags, output), f'--gin.TrainConfig.seed={seed}')
    files.write_atomically(done, b'')
    return path


def curve_of(path: pathlib.Path) -> list[tuple[int, float, float]]:
  """(step, seconds of training, loss) of each evaluation of a run and those that it went on with."""
  records = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  pace = [(one['step'], one['steps_per_second']) for one in records if 'steps_per_second' in one]
  curve = []
  for one in records:
    if one['split'] == 'eval':
      seconds, before = 0.0, 0
      for step, rate in pace:
        if before < one['step']:
          seconds, before = seconds + (min(step, one['step']) - before) / rate, step
      curve.append((one['step'], seconds, one['loss']))
  return curve


def run_arm(stage: Stage, seed: int, folder: pathlib.Path, output: pathlib.Path) -> dict:
  """Trains the chain of an arm and evaluates it on each language that it knows, unless its results are there."""
  results = folder / f'{stage.name}.json'
  if results.exists():
    return user_files.json_file(results, str(results))
  folder.mkdir(parents=True, exist_ok=True)
  path = made(stage, seed, folder, output)
  by_language = {}
  for language in LANGUAGES if len(stage.languages) > 1 else ():
    command(folder / f'{path.name}.log', 'eval', f'--model_dir={path}', '--tasks=local', *data_flags({language: 1.0}, output),
            '--gin.EvalConfig.max_examples=2000')
    newest = max((path / 'eval').iterdir(), key=lambda place: int(place.name))
    by_language[language] = user_files.json_file(newest / 'metrics.json', str(newest))['local']['metrics']['loss']
    shutil.rmtree(path / 'eval')
  found = {'arm': stage.name, 'seed': seed, 'curve': curve_of(path), 'loss': curve_of(path)[-1][2], 'by_language': by_language}
  files.write_atomically(results, (json.dumps(found, ensure_ascii=False, indent=1) + '\n').encode())
  return found


def reached(curve: list[Any], loss: float) -> tuple[int, float] | None:
  """Steps and seconds to a loss; None: never."""
  return next(((step, seconds) for step, seconds, value in curve if value <= loss), None)


def told(values: list[float], form: str = '.3f') -> str:
  spread = f' ± {(max(values) - min(values)) / 2:{form}}' if len(values) > 1 else ''
  return f'{statistics.mean(values):{form}}{spread}'


def report(experiment: str, output: pathlib.Path, done: dict[str, dict]) -> str:
  """Writes the table and the plot of an experiment, and returns the table. The first arm is what the others are held to."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot

  stages = {stage.name: stage for stage in EXPERIMENTS[experiment]()}
  arms = {name: [one for one in done.values() if one['arm'] == name] for name in stages}
  mixture = next(iter(stages.values())).mixture  # losses on other texts are not compared
  first = {one['seed']: one['loss'] for one in next(iter(arms.values()))}
  lines = ['| arm | seeds | loss | Chinese | English | steps to the loss of the first arm | seconds |',
           '|---|--:|--:|--:|--:|--:|--:|']
  figure, axis = pyplot.subplots(figsize=(8, 5), layout='constrained')
  for name, several in arms.items():
    if not several:
      continue
    times = [reached(one['curve'], first[one['seed']]) for one in several
             if one['seed'] in first and stages[name].mixture == mixture]
    came = [one for one in times if one]
    to_first = [told([one[place] for one in came], '.0f') if came else '' for place in (0, 1)]
    never = f' ({len(times) - len(came)} never)' if len(came) < len(times) else ''
    languages = [told([one['by_language'][language] for one in several]) if several[0]['by_language'] else ''
                 for language in LANGUAGES]
    lines.append(f'| {name} | {len(several)} | {told([one["loss"] for one in several])} | {languages[0]} | {languages[1]} | '
                 f'{to_first[0]}{never} | {to_first[1]} |')
    curves = list(zip(*(one['curve'] for one in several)))
    axis.plot([points[0][0] for points in curves], [statistics.mean(point[2] for point in points) for points in curves],
              marker='.', label=name)
  axis.set(title=experiment.replace('_', ' '), xlabel='step', ylabel='evaluation loss (nats per target token)')
  axis.grid(alpha=0.3)
  axis.legend()
  figure.savefig(output / f'{experiment}.png', dpi=120)
  pyplot.close(figure)
  table = '\n'.join(lines)
  files.write_atomically(output / f'{experiment}.md', f'{table}\n'.encode())
  return table


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--zh', required=True, help='glob of Chinese text files')
  parser.add_argument('--en', required=True, help='glob of English text files')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='where everything is written')
  parser.add_argument('--seeds', type=at_least(1), default=3)
  parser.add_argument('--parallel', type=at_least(1), default=2, help='arms that are trained at a time')
  parser.add_argument('--shorten', type=at_least(1), default=1, help='how many times fewer steps, to try an experiment')
  parser.add_argument('--only', default='', help=f'experiments, joined by commas, of {", ".join(EXPERIMENTS)}; all by default')
  args = parser.parse_args()
  wanted = args.only.split(',') if args.only else list(EXPERIMENTS)
  if unknown := set(wanted) - EXPERIMENTS.keys():
    raise ConfigError(f'--only={args.only!r} names {", ".join(sorted(unknown))}: expected some of {", ".join(EXPERIMENTS)}.')
  output = args.output.resolve()
  prepare({'zh': args.zh, 'en': args.en}, output)
  for experiment in wanted:
    jobs = {f'{experiment}, {stage.name}, seed {seed}': functools.partial(
        run_arm, shortened(stage, args.shorten), seed, output / experiment / str(seed), output)
        for seed in range(args.seeds) for stage in EXPERIMENTS[experiment]()}
    run_all(jobs, args.parallel, lambda found: f'loss {found["loss"]:.3f}', functools.partial(report, experiment, output))


if __name__ == '__main__':
  run_script(main)
