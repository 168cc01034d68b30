"""`infer`: a file of inputs -> a file of answers, in order, written as they are made, continued after a kill; or a prompt.

An answer is a line. In .jsonl it is an object with `input`, `output`, `blanks`, `score`, `finished` or, for a line that is
empty or refused, `note`, and with the other fields of a .jsonl input, which give way to these names. An answer has a `note` too
where its input has a mark that was probably meant as a blank. In .txt it is the output alone, with a line feed in it written as
the two characters \\n (a carriage return as \\r); an empty or refused line gives an empty one.

Beside the file OUT lies OUT.run.json, which says what the answers are a function of: a file of answers is continued only with
the same input, checkpoint and decoding. OUT.crc holds the CRC-32 of each line: from the first that was changed on, lines are
answered again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import struct
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from t5x_cpm import config as config_lib
from t5x_cpm import files, stored, user_files, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.config.fields import shown
from t5x_cpm.inference import lines as lines_lib
from t5x_cpm.inference import prompt, text
from t5x_cpm.inference.lines import Line
from t5x_cpm.infmoe import about as bundle_about
from t5x_cpm.progress import Progress

if TYPE_CHECKING:
  from t5x_cpm.inference.engine import Engine

EMPTY = 'empty line'
_NOTE = {'input': str, 'step': stored.COUNT, 'run': str, 'DecodeConfig': dict, 'InferConfig': dict, 'form?': str,
         'deltas?': {str: str}}
STDIN = {'-': '.txt', '-.jsonl': '.jsonl'}  # values of --input, with the ending of the file that each is read as


def as_json(record: dict[str, Any]) -> str:
  """A line of .jsonl. Half of a surrogate pair, which UTF-8 cannot write, stays escaped as it came."""
  line = json.dumps(record, ensure_ascii=False)
  return json.dumps(record) if any('\ud800' <= character <= '\udfff' for character in line) else line


def as_text(record: dict[str, Any]) -> str:
  """A line of .txt."""
  return record['output'].replace('\r', '\\r').replace('\n', '\\n')


def identity(path: pathlib.Path, run: run_directory.RunInfo, config: Config) -> dict[str, Any]:
  """What the answers are a function of."""
  with path.open('rb') as file:
    content = hashlib.file_digest(file, 'sha256').hexdigest()
  infer = dataclasses.asdict(config.infer)
  del infer['batch_size']  # changes only the speed
  about_run = json.dumps([config_lib.to_dict(run.config), run.info, run.metrics], sort_keys=True)
  return {
      'input': content, 'step': run.step, 'run': hashlib.sha256(about_run.encode()).hexdigest()[:16],
      'DecodeConfig': dataclasses.asdict(config.decode), 'InferConfig': infer}


def _sums_file(output: pathlib.Path) -> pathlib.Path:
  return output.with_name(output.name + '.crc')


def _as_bytes(sums: list[int]) -> bytes:
  return struct.pack(f'<{len(sums)}I', *sums)


def _intact_lines(output: pathlib.Path) -> tuple[list[int], list[int]]:
  """Bytes and CRC-32 of each line of a file of answers, up to the first that is not as it was written, which is told.

  A file of an earlier version has no sums to compare with.
  """
  wanted = None
  with contextlib.suppress(FileNotFoundError):
    content = files.read_bytes(_sums_file(output))
    wanted = struct.unpack(f'<{len(content) // 4}I', content[:len(content) // 4 * 4])
  sizes: list[int] = []
  sums: list[int] = []
  with output.open('rb') as file:
    for raw in file:
      if not raw.endswith(b'\n') or (wanted is not None and len(sums) == len(wanted)):
        break  # a kill came between the line and its sum
      found = zlib.crc32(raw)
      if wanted is not None and found != wanted[len(sums)]:
        print(f'{output}: line {len(sums) + 1} is not as it was written: answered again, and all after it', file=sys.stderr,
              flush=True)
        break
      sizes.append(len(raw))
      sums.append(found)
  return sizes, sums


class _Summed:
  """A file of answers that is written together with the sums of its lines."""

  def __init__(self, output: pathlib.Path):
    self._file, self._sums_file, self._sums = open(output, 'ab'), open(_sums_file(output), 'ab'), b''  # noqa: SIM115

  def __enter__(self) -> '_Summed':
    return self

  def __exit__(self, *exception: Any) -> None:
    self._file.close()
    self._sums_file.close()

  def write(self, line: str) -> None:
    raw = line.encode()
    self._file.write(raw)
    self._sums += _as_bytes([zlib.crc32(raw)])

  def flush(self) -> None:
    self._file.flush()
    self._sums_file.write(self._sums)
    self._sums_file.flush()
    self._sums = b''


def continue_or_start(output: pathlib.Path, wanted: dict[str, Any], total: int, batch_size: int) -> int:
  """Makes the output ready to be appended to.

  Whole batches are kept: with the same batches the answers are the same to the last bit as without the interruption.

  Args:
    output: the file of answers.
    wanted: from `identity`.
    total: lines of the input.
    batch_size: of the run that continues.

  Returns:
    How many lines are answered already.

  Raises:
    ConfigError: the file was made from something else (or nothing says from what), or it cannot be written.
  """
  note = output.with_name(output.name + '.run.json')
  remedy = 'Remove it, or give another --output.'
  try:
    if output.exists() and not output.is_file():
      raise ConfigError(f'--output={output} is not a regular file. {remedy}')
    if output.exists() and output.stat().st_size:
      if not os.path.lexists(note):
        raise ConfigError(f'--output={output} is there, but not from `infer` ({note.name} is missing). {remedy}')
      try:
        made_from = stored.read(note, _NOTE, '')
      except stored.DamagedError as error:
        raise ConfigError(f'--output={output} is there, but {note.name} beside it, which says what it was made from, is '
                          f'damaged ({error.what}). Remove both, or give another --output.') from None
      differences = run_directory.info_differences(made_from, wanted)
      if differences:
        lines = '\n  '.join(line.replace('in the checkpoint', 'in the file') for line in differences)
        raise ConfigError(f'--output={output} was made from something else:\n  {lines}\n{remedy}')
      sizes, sums = _intact_lines(output)
      done = len(sizes)
      if done < total:
        done -= done % batch_size
      os.truncate(output, sum(sizes[:done]))
      files.write_atomically(_sums_file(output), _as_bytes(sums[:done]))
      return done
    output.parent.mkdir(parents=True, exist_ok=True)
    stored.write(note, wanted)
    output.write_bytes(b'')
    files.write_atomically(_sums_file(output), b'')
  except OSError as error:
    raise ConfigError(f'--output={output} cannot be written: {error.strerror}.') from None
  return 0


def answer_file(engine: 'Engine', lines: Iterator[tuple[Line, text.Request | None]], first: int, total: int,
                out: 'TextIO | _Summed', form: Callable[[dict[str, Any]], str]) -> dict[str, int]:
  """Answers lines from index `first` on, and writes a record for each, as `form` puts it, batch by batch."""
  counts, tokens = {'answered': 0, 'empty': 0, 'refused': 0}, 0
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
        tokens += answer.tokens
        record |= {'output': answer.output, 'blanks': answer.blanks, 'score': answer.score, 'finished': answer.finished}
        record |= {'note': request.note} if request.note else {}
        counts['answered'] += 1
      else:
        record['note'] = line.error or EMPTY
        counts['refused' if line.error else 'empty'] += 1
      out.write(form({**line.others, **record}) + '\n')
    out.flush()
    batch = []
    detail = '  '.join(filter(None, (f'{progress.rate(tokens):.3g} tokens/s', engine.program.told())))
    progress.show(index + 1, f'{progress.rate(index + 1 - first):.1f} lines/s  {detail}', bar_detail=detail)
  progress.close()
  return counts


def read_deltas(given: Mapping[str, str], model_dir: str, about: run_directory.RunInfo, vocabulary: vocabularies.Vocabulary,
                config: Config) -> tuple[dict[str, text.Codec], lines_lib.Templates, dict[str, str]]:
  """By the names of deltas: how texts become their inputs, fields their texts, and what tells them apart. Reads no model."""
  if not given:
    return {}, {}, {}
  from t5x_cpm.inference import deltas

  reader = deltas.Reader(model_dir, about.step, vocabulary, config)
  found = {name: reader.read(name, path) for name, path in given.items()}
  digests = {name: stored.digest(one.saved.about) for name, one in found.items()}
  return ({name: one.codec for name, one in found.items()}, {name: one.template for name, one in found.items()}, digests)


def run_file(config: Config, model_dir: str, path: pathlib.Path, name: str, output_path: str,
             step: int | None, deltas: Mapping[str, str]) -> dict[str, int]:
  """Answers a file, which errors call `name`. Arguments and errors as in `run`.

  Returns:
    How many lines were answered, empty and refused.
  """
  # What needs no JAX comes first, so that a mistake is reported at once.
  about = bundle_about.read_run(model_dir, step)
  vocabulary = vocabularies.load_saved(run_directory.resolve(model_dir) / 'vocabulary', about.info.get('vocabulary'))
  own = text.of_model(config, about.config)
  codec, (codecs, templates, digests) = text.Codec(vocabulary, own), read_deltas(deltas, model_dir, about, vocabulary, own)
  templates = {'': lines_lib.template_of(about.config), **templates}
  total = lines_lib.check_file(path, name, codec, config, codecs, templates)
  output = pathlib.Path(output_path) if output_path else None
  is_text = output is not None and output.suffix == '.txt'
  made_from = identity(path, about, config) | ({'form': 'text'} if is_text else {}) | (
      {'deltas': digests} if digests else {})
  first = continue_or_start(output, made_from, total, config.infer.batch_size) if output else 0
  if first:
    print(f'{output} has {first:,} of {total:,} lines: going on from there' if first < total else
          f'{output} has all {total:,} lines: nothing to do', file=sys.stderr, flush=True)
  if not total:
    print(f'{name} is empty: there is nothing to answer.', file=sys.stderr, flush=True)
  if first >= total:
    return {'answered': 0, 'empty': 0, 'refused': 0}

  from t5x_cpm import inference

  engine = inference.load(model_dir, step=about.step, config=config, deltas=deltas)
  started = time.monotonic()
  read = lines_lib.read_lines(path, name, config.infer.text_field, templates)
  lines = lines_lib.checked(read, codec, codecs)
  with _Summed(output) if output else open(1, 'w', encoding='utf-8', closefd=False) as out:
    counts = answer_file(engine, lines, first, total, out, as_text if is_text else as_json)
  if line := engine.program.compared(config):
    print(line, file=sys.stderr, flush=True)
  engine.close()
  told = ''.join(f', {count} {what}' for what, count in counts.items() if count and what != 'answered')
  print(f'{counts["answered"]} answered{told} in {time.monotonic() - started:.1f} s' + (f': {output}' if output else ''),
        file=sys.stderr, flush=True)
  return counts


@contextlib.contextmanager
def input_file(given: str) -> Iterator[tuple[pathlib.Path, str]]:
  """The file of an --input, and its name in errors. Standard input is copied first, so that it is checked whole like a file."""
  if given in STDIN:
    with tempfile.TemporaryDirectory() as folder:
      copy = pathlib.Path(folder) / f'input{STDIN[given]}'
      with copy.open('wb') as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
      yield copy, 'standard input'
    return
  path = pathlib.Path(given)
  user_files.check(path, f'--input={shown(given)}')
  if path.suffix not in lines_lib.SUFFIXES:
    raise ConfigError(f'--input={path}: expected a file that ends in {" or ".join(lines_lib.SUFFIXES)}, or '
                      f'{" or ".join(STDIN)} for standard input.')
  yield path, str(path)


def run(config: Config, model_dir: str, input_path: str = '', output_path: str = '', *, step: int | None = None,
        deltas: Mapping[str, str] = types.MappingProxyType({})) -> None:
  """Answers a file, or what is typed.

  Args:
    config: the run's configuration, with the decoding and lengths to use.
    model_dir: the run's directory.
    input_path: .txt with one input a line, or .jsonl; '-' is standard input, read to its end as a .txt, '-.jsonl' as a
      .jsonl; '' answers what is typed, or each line of a pipe as it comes.
    output_path: .jsonl to write, or .txt for the answers alone; '' prints the records.
    step: the step of the checkpoint; by default the last.
    deltas: by name, the model_dir of each delta that a line of a .jsonl may name in its field `delta`.

  Raises:
    ConfigError: no checkpoint, a bad delta, a bad input line (with its number), or an output that belongs to something else.
  """
  config.decode.validate()
  config.infer.validate()
  if deltas and not input_path.endswith('.jsonl'):
    raise ConfigError(f'--delta with --input={shown(input_path)}: expected a .jsonl, whose lines name their delta in the field '
                      f'{lines_lib.DELTA!r}. A delta alone answers any input where it is the --model_dir.')
  if input_path:
    with input_file(input_path) as (path, name):
      run_file(config, model_dir, path, name, output_path, step, deltas)
    return
  if output_path:
    raise ConfigError('--output needs --input: without it answers are printed as they are made.')
  from t5x_cpm import inference

  engine = inference.load(model_dir, step=step, config=config)
  is_terminal = sys.stdin.isatty()
  if is_terminal:
    blanks = f'Write a blank as {vocabularies.BLANK}; a line without one is continued. '
    print(f'{model_dir} at step {engine.step}. {"" if engine.codec.is_pairs else blanks}{prompt.HOW_TO_END}',
          file=sys.stderr, flush=True)
  prompt.interact(engine, sys.stdin.buffer, is_terminal)
