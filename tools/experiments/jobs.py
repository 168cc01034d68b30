"""What experiments share: commands that run side by side, each of which keeps what it found in a file of its own."""

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from t5x_cpm import files
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RUNNING: set[subprocess.Popen] = set()  # what is to end with this program


def gin_flags(values: Mapping[str, object]) -> list[str]:
  """CLASS.FIELD -> value, as flags."""
  return [f'--gin.{name}={value!r}' for name, value in values.items()]


def command(log: pathlib.Path, *arguments: str) -> None:
  """Runs t5x_cpm; what it prints goes to a log.

  Raises:
    ConfigError: it failed.
  """
  with log.open('a', encoding='utf-8') as file:
    file.write(f'$ {" ".join(arguments)}\n')
    file.flush()
    child = subprocess.Popen([sys.executable, '-m', 't5x_cpm', *arguments], cwd=ROOT, stdout=file, stderr=file)
    RUNNING.add(child)
    code = child.wait()
    RUNNING.remove(child)
  if code:
    raise ConfigError(f'`t5x_cpm {arguments[0]}` ended with {code}: see {log}.')


def train(log: pathlib.Path, model_dir: pathlib.Path, steps: int, *arguments: str) -> None:
  """Trains a run to its last step.

  Raises:
    ConfigError: it failed; or something stopped it before, which is no failure: the same call goes on with it.
  """
  command(log, 'train', *arguments, f'--gin.TrainConfig.steps={steps}', f'--model_dir={model_dir}')
  done, _ = run_directory.scan(run_directory.resolve(model_dir))
  if done[-1] < steps:
    raise ConfigError(f'{model_dir} was stopped at step {done[-1]} of {steps}: start this program again.')


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
  files.write_atomically(path, ''.join(f'{line}\n' for line in lines).encode())


def run_all(jobs: Mapping[str, Callable[[], dict]], parallel: int, tell: Callable[[dict], str],
            report: Callable[[dict[str, dict]], str]) -> None:
  """Runs jobs side by side, says how each ended and how long the others will take, and keeps a report up to date.

  Args:
    jobs: by name; each returns what it found, at once if it was found before.
    parallel: how many run at a time.
    tell: what was found, in a few words.
    report: writes the table and the plot of all that is found, and returns the table.
  """
  done: dict[str, dict] = {}
  started = time.monotonic()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  with ThreadPoolExecutor(parallel) as pool:
    futures = {pool.submit(job): name for name, job in jobs.items()}
    try:
      for future in as_completed(futures):
        name = futures[future]
        done[name] = future.result()
        left = (time.monotonic() - started) / len(done) * (len(jobs) - len(done))
        print(f'{len(done)}/{len(jobs)}  {name}: {tell(done[name])} (about {left / 60:.0f} min left)', flush=True)
        table = report(done)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
      for child in list(RUNNING):
        child.terminate()
  print(table)
