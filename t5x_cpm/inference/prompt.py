"""`infer` without a file: a prompt, or lines from a pipe, each answered as it comes."""

import codecs
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from t5x_cpm import vocabularies
from t5x_cpm.config import ConfigError
from t5x_cpm.inference.lines import Line, from_bytes

if TYPE_CHECKING:
  from t5x_cpm.inference.engine import Engine


HOW_TO_END = 'Ctrl-D ends.'


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
    yield from_bytes(number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)


def refuse(number: int, error: str, is_terminal: bool) -> None:
  """Says what is wrong with a line ('' for an empty one); a pipe gets an empty line, so that output and input lines match."""
  if error:
    print(f'error: line {number}: {error}', file=sys.stderr, flush=True)
  elif is_terminal:
    print(HOW_TO_END, file=sys.stderr, flush=True)
  if not is_terminal:
    print(flush=True)


def interact(engine: 'Engine', stdin: BinaryIO, is_terminal: bool) -> None:
  """Answers line by line, tokens as they come. A line with blanks is printed, filled in, once it is complete."""
  for line in prompts(stdin, is_terminal):
    if line.error or not line.text.strip():
      refuse(line.number, line.error, is_terminal)
      continue
    has_blanks = vocabularies.BLANK in line.text and not engine.codec.is_pairs
    try:
      pieces = engine.stream(line.text)
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
