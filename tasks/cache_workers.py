"""Writes the units of a cache in several processes. Each runs this module and is given one unit after another.

A worker reads lines of JSON from its standard input: first the job, then the units. It writes messages, lines of JSON too, to
a pipe of its own, because a user's task may print. It ends when its input ends, or when its parent is gone.
"""

import collections
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from t5x_cpm import config as config_lib
from t5x_cpm import tasks
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data.cache import DataError
from t5x_cpm.tasks import cache_units
from t5x_cpm.tasks.cache_units import Unit

_ERRORS = {'DataError': DataError, 'ConfigError': ConfigError}  # errors of a worker that are raised here with their own type
_SILENT = {'kind': 'RuntimeError', 'error': 'a cache worker ended without a message; was it killed for memory? Set '
           'TaskConfig.cache_processes to a smaller number.'}
_Messages = queue.Queue[tuple[subprocess.Popen, dict[str, Any]]]


def _listen(process: subprocess.Popen, read_end: int, messages: _Messages) -> None:
  with os.fdopen(read_end) as lines:
    for line in lines:
      messages.put((process, json.loads(line)))
  if process.stdin and not process.stdin.closed:
    messages.put((process, _SILENT))


def _start(job: str, messages: _Messages) -> subprocess.Popen:
  """Starts a worker, and a thread that puts its messages into the queue."""
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p), 'CUDA_VISIBLE_DEVICES': '',
                 'TF_CPP_MIN_LOG_LEVEL': '3'}
  read_end, write_end = os.pipe()
  process = subprocess.Popen([sys.executable, '-m', __name__, str(write_end)], stdin=subprocess.PIPE, env=environment,
                             stdout=subprocess.DEVNULL, pass_fds=(write_end,), text=True)
  os.close(write_end)
  threading.Thread(target=_listen, args=(process, read_end, messages), daemon=True).start()
  assert process.stdin
  process.stdin.write(job + '\n')
  return process


def _assign(process: subprocess.Popen, waiting: collections.deque[Unit]) -> None:
  """Gives a worker the next unit, or lets it end."""
  assert process.stdin
  if waiting:
    process.stdin.write(json.dumps(dataclasses.asdict(waiting.popleft())) + '\n')
    process.stdin.flush()
  else:
    process.stdin.close()


def run(config: Config, path: pathlib.Path, units: list[Unit], processes: int, report: Callable[[int, bool], None]) -> None:
  """Writes units of the cache of `config.task` in several processes.

  Args:
    config: the configuration of the run.
    path: the folder of the cache.
    units: what to write.
    processes: how many workers to start.
    report: called with the number of documents just written, and whether that finished a unit.

  Raises:
    DataError, ConfigError: as in the worker.
    RuntimeError: any other error of a worker, usually with its traceback, or its sudden end.
  """
  job = json.dumps({'config': config_lib.to_dict(config), 'path': str(path.resolve()), 'imports': tasks.imported()})
  waiting = collections.deque(units)
  messages: _Messages = queue.Queue()
  running = []
  try:
    for _ in range(processes):
      running.append(_start(job, messages))
      _assign(running[-1], waiting)
    unfinished = len(units)
    while unfinished:
      process, message = messages.get()
      if 'error' in message:
        raise _ERRORS.get(message['kind'], RuntimeError)(message['error'])
      report(message['documents'], message['finished'])
      if message['finished']:
        unfinished -= 1
        _assign(process, waiting)
  finally:
    for process in running:
      process.kill()
      process.wait()


def _work(messages: TextIO) -> None:
  """What a worker does."""
  job = json.loads(sys.stdin.readline())
  config = config_lib.from_dict(job['config'])
  parent = os.getppid()

  def send(**message) -> None:
    if os.getppid() != parent:
      sys.exit(1)
    messages.write(json.dumps(message) + '\n')
    messages.flush()

  try:
    tasks.import_modules(job['imports'])
    source, vocabulary = tasks.tokens(config), tasks.vocabulary(config)
    for line in sys.stdin:
      cache_units.write(source, Unit(**json.loads(line)), pathlib.Path(job['path']), vocabulary,
                        lambda documents: send(documents=documents, finished=False))
      send(documents=0, finished=True)
  except (ValueError, OSError) as error:
    send(error=str(error), kind=type(error).__name__)
  except Exception:  # such as one of a user's own task
    send(error=traceback.format_exc(), kind='RuntimeError')


if __name__ == '__main__':
  with os.fdopen(int(sys.argv[1]), 'w') as pipe:
    _work(pipe)
