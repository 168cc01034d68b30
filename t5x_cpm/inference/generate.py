"""`infer`: a file of inputs -> a file of answers, in order, written as they are made, continued after a kill; or a prompt.

Beside OUT.jsonl lies OUT.jsonl.run.json, which says what the answers are a function of: a file of answers is continued only
with the same input, checkpoint and decoding.
"""

import codecs
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

from t5x_cpm import config as config_lib
from t5x_cpm import files, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.inference import text
from t5x_cpm.progress import Progress
from t5x_cpm.tasks import text_files

if TYPE_CHECKING:
  from t5x_cpm.inference.engine import Engine

SUFFIXES = ('.txt', '.jsonl')
EMPTY = 'empty line'


class Line(NamedTuple):
  """A line of the input: its text, or what is wrong with it. An empty line has the text ''."""

  number: int  # from 1
  text: str
  error: str = ''


def read_lines(path: pathlib.Path, field: str) -> Iterator[Line]:
  """The inputs of a .txt file, one a line, or of a .jsonl file, in `field` of each object."""
  with path.open('rb') as file:
    for number, raw in enumerate(file, 1):
      if number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
      try:
        line = raw.decode().strip('\r\n')
      except UnicodeDecodeError as error:
        yield Line(number, '', f'byte {error.start} of the line, {raw[error.start]:#04x}, is not UTF-8')
        continue
      if path.suffix == '.jsonl' and line.strip():
        yield _from_json(number, line, field)
      else:
        yield Line(number, line if line.strip() else '')


def _from_json(number: int, line: str, field: str) -> Line:
  try:
    given, = text_files.json_texts(line, (field,), 'InferConfig.text_field names the field')
  except text_files.MalformedError as error:
    return Line(number, '', str(error))
  return Line(number, given if given.strip() else '')


def checked(lines: Iterator[Line], codec: text.Codec) -> Iterator[tuple[Line, text.Request | None]]:
  """Encodes every line that is good; a line that cannot be encoded gets its error."""
  for line in lines:
    request = None
    if line.text and not line.error:
      try:
        request = codec.request(line.text)
      except ConfigError as error:
        line = line._replace(error=str(error))
    yield line, request


def check_file(path: pathlib.Path, codec: text.Codec, config: Config) -> int:
  """Reads the whole input once, so that a bad line is found before hours of work. Returns the number of lines.

  Raises:
    ConfigError: the first bad line, with its number, unless InferConfig.skip_malformed.
  """
  count = 0
  for line, _ in checked(read_lines(path, config.infer.text_field), codec):
    count += 1
    if line.error and not config.infer.skip_malformed:
      raise ConfigError(f'{path}:{line.number}: {line.error}\nInferConfig.skip_malformed = True leaves such lines unanswered.')
  return count


def identity(path: pathlib.Path, run: run_directory.RunInfo, config: Config) -> dict[str, Any]:
  """What the answers are a function of."""
  with path.open('rb') as file:
    content = hashlib.file_digest(file, 'sha256').hexdigest()
  infer = dataclasses.asdict(config.infer)
  del infer['batch_size']  # changes speed alone
  about_run = json.dumps([config_lib.to_dict(run.config), run.info, run.metrics], sort_keys=True)
  return {
      'input': content, 'step': run.step, 'run': hashlib.sha256(about_run.encode()).hexdigest()[:16],
      'DecodeConfig': dataclasses.asdict(config.decode), 'InferConfig': infer}


def continue_or_start(output: pathlib.Path, wanted: dict[str, Any], total: int, batch_size: int) -> int:
  """Makes the output ready to be appended to.

  Whole batches are kept: with the same batches the answers are the same to the last bit as without the interruption.

  Args:
    output: the file of answers.
    wanted: from `identity`.
    total: lines of the input.
    batch_size: of the work that goes on.

  Returns:
    How many lines are answered already.

  Raises:
    ConfigError: the file is there and not made from the same (or nothing says from what), or cannot be written.
  """
  note = output.with_name(output.name + '.run.json')
  remedy = 'Remove it, or give another --output.'
  try:
    if output.exists() and output.stat().st_size:
      if not note.exists():
        raise ConfigError(f'--output={output} is there, but not from `infer` ({note.name} is missing). {remedy}')
      try:
        made_from = json.loads(note.read_text())
      except ValueError:
        raise ConfigError(f'--output={output} is there, but {note.name} beside it, which says what it was made from, is '
                          'damaged (no JSON). Remove both, or give another --output.') from None
      differences = run_directory.info_differences(made_from, wanted)
      if differences:
        lines = '\n  '.join(line.replace('in the checkpoint', 'in the file') for line in differences)
        raise ConfigError(f'--output={output} was made from something else:\n  {lines}\n{remedy}')
      offsets = [0]
      with output.open('rb') as file:
        for raw in file:
          if raw.endswith(b'\n'):
            offsets.append(offsets[-1] + len(raw))
      done = len(offsets) - 1
      if done < total:
        done -= done % batch_size
      os.truncate(output, offsets[done])
      return done
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(note, (json.dumps(wanted, ensure_ascii=False, indent=2) + '\n').encode())
    output.write_bytes(b'')
  except OSError as error:
    raise ConfigError(f'--output={output} cannot be written: {error.strerror}.') from None
  return 0


def answer_file(engine: 'Engine', lines: Iterator[tuple[Line, text.Request | None]], first: int, total: int,
                out: TextIO) -> dict[str, int]:
  """Answers lines from number `first` (from 0) on, and writes one record for each, batch by batch."""
  counts = {'answered': 0, 'empty': 0, 'refused': 0}
  progress = Progress('infer', 'line', total, first)
  batch: list[tuple[Line, text.Request | None]] = []
  for index, pair in enumerate(lines):
    if index >= first:
      batch.append(pair)
    if not batch or (len(batch) < engine.config.infer.batch_size and index + 1 < total):
      continue
    good = [(line.number - 1, request) for line, request in batch if request is not None]
    answers = iter(engine.answer_requests([request for _, request in good], engine.config.decode, [row for row, _ in good]))
    for line, request in batch:
      record: dict[str, Any] = {'input': line.text, 'output': '', 'blanks': [], 'score': None}
      if request is not None:
        answer = next(answers)
        record |= {'output': answer.output, 'blanks': answer.blanks, 'score': answer.score, 'finished': answer.finished}
        counts['answered'] += 1
      else:
        record['note'] = line.error or EMPTY
        counts['refused' if line.error else 'empty'] += 1
      out.write(json.dumps(record, ensure_ascii=False) + '\n')
    out.flush()
    batch = []
    progress.show(index + 1, f'{progress.rate(index + 1 - first):.1f} lines/s', bar_detail='')
  progress.close()
  return counts


def run_file(config: Config, model_dir: str, input_path: str, output_path: str, step: int | None) -> dict[str, int]:
  """Answers a file. Arguments and errors as in `run`; returns how many lines were answered, empty and refused."""
  path = pathlib.Path(input_path)
  if path.suffix not in SUFFIXES:
    raise ConfigError(f'--input={path}: expected a file that ends in {" or ".join(SUFFIXES)}.')
  if not path.is_file():
    raise ConfigError(f'--input={path}: no such file.')
  # What needs no JAX comes first, so that a mistake is told at once.
  about = run_directory.read_run(model_dir, step)
  vocabulary = vocabularies.load_saved(run_directory.resolve(model_dir) / 'vocabulary')
  codec = text.Codec(vocabulary, config)
  total = check_file(path, codec, config)
  output = pathlib.Path(output_path) if output_path else None
  first = continue_or_start(output, identity(path, about, config), total, config.infer.batch_size) if output else 0
  if first:
    print(f'{output} has {first:,} of {total:,} lines: going on from there' if first < total else
          f'{output} has all {total:,} lines: nothing to do', file=sys.stderr, flush=True)
  if first >= total:
    return {'answered': 0, 'empty': 0, 'refused': 0}

  from t5x_cpm import inference

  engine = inference.load(model_dir, step=about.step, config=config)
  started = time.monotonic()
  lines = checked(read_lines(path, config.infer.text_field), codec)
  with open(output, 'a', encoding='utf-8') if output else open(1, 'w', encoding='utf-8', closefd=False) as out:
    counts = answer_file(engine, lines, first, total, out)
  told = ''.join(f', {count} {what}' for what, count in counts.items() if count and what != 'answered')
  print(f'{counts["answered"]} answered{told} in {time.monotonic() - started:.1f} s' + (f': {output}' if output else ''),
        file=sys.stderr, flush=True)
  return counts


def prompts(stdin: BinaryIO, is_terminal: bool) -> Iterator[Line]:
  """Lines that a user types or pipes in, until the end of input (Ctrl-D)."""
  number = 0
  while True:
    number += 1
    if is_terminal:
      try:
        yield Line(number, input('> '))
      except EOFError:
        print()
        return
      continue
    raw = stdin.readline()
    if not raw:
      return
    try:
      yield Line(number, raw.decode().strip('\r\n'))
    except UnicodeDecodeError as error:
      yield Line(number, '', f'byte {error.start} of the line is not UTF-8')


def interact(engine: 'Engine', stdin: BinaryIO, is_terminal: bool) -> None:
  """Answers line by line, tokens as they come. A line with blanks is printed filled when it is complete."""
  for line in prompts(stdin, is_terminal):
    if line.error or not line.text.strip():
      refuse(line.number, line.error, is_terminal)
      continue
    has_blanks = vocabularies.BLANK in line.text
    pieces = engine.stream(line.text)
    try:
      while True:
        piece = next(pieces)
        if is_terminal or not has_blanks:
          print(piece, end='', flush=True)
    except StopIteration as end:
      if has_blanks:
        print(('\n' if is_terminal else '') + end.value.output, flush=True)
      else:
        print(flush=True)
    except ConfigError as error:
      refuse(line.number, str(error), is_terminal)


def refuse(number: int, error: str, is_terminal: bool) -> None:
  """Tells what is wrong with a line ('' for an empty one); a pipe gets an empty line, so that lines out match lines in."""
  if error:
    print(f'error: line {number}: {error}', file=sys.stderr, flush=True)
  if not is_terminal:
    print(flush=True)


def run(config: Config, model_dir: str, input_path: str = '', output_path: str = '', *, step: int | None = None) -> None:
  """Answers a file, or what is typed.

  Args:
    config: of the run, with the decoding and lengths to use.
    model_dir: of the run.
    input_path: .txt with one input a line, or .jsonl; '' reads standard input line by line.
    output_path: .jsonl to write; '' prints the records.
    step: of the checkpoint; default the last.

  Raises:
    ConfigError: no checkpoint, a bad input line (with its number), or an output that belongs to something else.
  """
  config.decode.validate()
  config.infer.validate()
  if input_path:
    run_file(config, model_dir, input_path, output_path, step)
    return
  if output_path:
    raise ConfigError('--output needs --input: without it answers are printed as they are made.')
  from t5x_cpm import inference

  engine = inference.load(model_dir, step=step, config=config)
  is_terminal = sys.stdin.isatty()
  if is_terminal:
    blank = vocabularies.BLANK
    print(f'{model_dir} at step {engine.step}. Write a blank as {blank}; a line without one is continued. Ctrl-D ends.',
          file=sys.stderr, flush=True)
  interact(engine, sys.stdin.buffer, is_terminal)
