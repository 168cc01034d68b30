"""Runs the main job on data that ships with the project: vocabulary, cache, pre-training (stopped and resumed), answers.

It is run by tools/quickstart.sh, which sets up the environment. Every step is a command that a user would type in that
environment; it is printed before it runs.
"""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser, at_least
from t5x_cpm.config import ConfigError
from t5x_cpm.tasks import stories

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / 'tasks' / 'corpus'
GIN = ('--gin_file=gin/models/cpm2_tiny.gin', '--gin_file=gin/runs/quickstart.gin')
# Sentences with one blank each, from the validation split, so that neither model has read them.
BLANKS = CORPUS / 'blanks.txt'
VOCABULARY = (*(f'--input={CORPUS}/{name}' for name in ('zh.txt', 'en.txt', 'parallel.tsv')), '--size=3200', '--sentinels=50',
              '--byte_fallback')


def write_stories(path: pathlib.Path) -> None:
  """Writes stories of the training split, one a line: those that the shipped vocabulary was trained on."""
  texts = [stories.story(index, language).text for index in range(2000) for language in stories.LANGUAGES]
  path.write_text('\n'.join(texts) + '\n', encoding='utf-8')


def show(command: list[str]) -> list[str]:
  """Prints a command as a user would type it and returns what to execute."""
  print('\n$ ' + shlex.join(['python', *command]), flush=True)
  return [sys.executable, *command]


def run(*command: str) -> None:
  code = subprocess.run(show(list(command)), cwd=ROOT).returncode
  if code:  # it has said why
    raise SystemExit(code)


def train_until_stopped(command: list[str], metrics: pathlib.Path, at_step: int) -> None:
  """Starts a training command and sends it SIGTERM once it has reported a step."""
  process = subprocess.Popen(show(command), cwd=ROOT)
  while process.poll() is None:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    if lines and json.loads(lines[-1])['step'] >= at_step:
      process.send_signal(signal.SIGTERM)
      break
    time.sleep(0.2)
  if process.wait() != 0:
    raise SystemExit(process.returncode)


def answers(path: pathlib.Path) -> list[str]:
  return [json.loads(line)['output'] for line in path.read_text(encoding='utf-8').splitlines()]


def next_commands(model_dir: pathlib.Path) -> list[str]:
  """Commands to type after this one. They name the interpreter by its path, so that the environment need not be active."""
  program = [sys.executable, '-m', 't5x_cpm']
  return [shlex.join([*program, 'infer', f'--model_dir={model_dir}']), shlex.join([*program, '--help'])]


def accuracy(model_dir: pathlib.Path) -> float:
  """Accuracy on the masked tokens of the validation split, without sentinels, as `eval` wrote it."""
  newest = max((model_dir / 'eval').iterdir(), key=lambda folder: int(folder.name))
  return json.loads((newest / 'metrics.json').read_text())['quickstart']['metrics']['text_accuracy']


def main() -> None:
  parser = Parser(description=__doc__)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'runs' / 'quickstart', help='where everything is written')
  parser.add_argument('--steps', type=at_least(0), default=0, help='training steps; 0 is what gin/runs/quickstart.gin says')
  args = parser.parse_args()
  started = time.monotonic()
  output = args.output.resolve()
  trained, untrained = output / 'model', output / 'untrained'
  if trained.exists():
    raise ConfigError(f'{trained} exists: remove {output}, or give another --output.')
  output.mkdir(parents=True, exist_ok=True)

  print('1. A vocabulary from the shipped corpus and some generated stories. The result is the file that ships.')
  write_stories(output / 'stories.txt')
  run('-m', 't5x_cpm', 'vocabulary', *VOCABULARY, f'--input={output}/stories.txt', f'--output={output}/vocab.txt')
  if (output / 'vocab.txt').read_bytes() != (CORPUS / 'vocab.txt').read_bytes():
    print('Another version of SentencePiece made another vocabulary; the shipped one is used.')

  print('\n2. Every text of the task becomes tokens, once.')
  run('-m', 't5x_cpm', 'cache', *GIN)

  print('\n3. An untrained model, to compare with.')
  run('-m', 't5x_cpm', 'train', *GIN, f'--model_dir={untrained}', '--gin.TrainConfig.steps=0')

  print('\n4. Pre-training; stopped on the way by SIGTERM, as a scheduler does, and started again by the same command.')
  steps = [f'--gin.TrainConfig.steps={args.steps}'] if args.steps else []
  command = ['-m', 't5x_cpm', 'train', *GIN, f'--model_dir={trained}', *steps]
  train_until_stopped(command, trained / 'metrics.jsonl', at_step=40)
  run(*command)

  print('\n5. Evaluation, and blanks in sentences that the model has not read.')
  for model_dir in (untrained, trained):
    run('-m', 't5x_cpm', 'eval', f'--model_dir={model_dir}', '--tasks=quickstart')
    run('-m', 't5x_cpm', 'infer', f'--model_dir={model_dir}', f'--input={BLANKS}', f'--output={model_dir}/answers.jsonl')
  print('\n{:<12}{}'.format('', 'accuracy on masked tokens of held-out text'))
  for name, model_dir in (('untrained', untrained), ('trained', trained)):
    print(f'{name:<12}{accuracy(model_dir):.1%}')
  questions = BLANKS.read_text(encoding='utf-8').splitlines()
  for question, before, after in zip(questions, answers(untrained / 'answers.jsonl'), answers(trained / 'answers.jsonl')):
    print(f'\n  sentence   {question}\n  untrained  {before}\n  trained    {after}')

  print(f"""
Done in {time.monotonic() - started:.0f} s.
  metrics      {trained}/metrics.jsonl (also TensorBoard: {trained}/tensorboard)
  loss curve   {trained}/loss.png
  checkpoint   {trained}/checkpoints
What to do next: ask it something (a blank is <span>), see what there is, train on your own text
(README.md, "Ten minutes on your own text"), or tune a small delta on it ("Tuning a small delta").""")
  for line in next_commands(trained):
    print(f'  {line}')


if __name__ == '__main__':
  run_script(main)
