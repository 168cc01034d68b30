"""What an engine gives for an input, whole or as it grows."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer to one input.

  Attributes:
    output: the input with its blanks filled, or for an input without blanks what the model wrote.
    blanks: the texts of the blanks.
    score: the sum of the log-probabilities of the generated tokens; with beams divided by length ** length_penalty.
    tokens: how many were generated.
    finished: False where max_new_tokens cut the answer off.
    ids: the generated tokens.
  """

  output: str
  blanks: list[str]
  score: float
  tokens: int
  finished: bool
  ids: list[int] = dataclasses.field(repr=False)


def new_text(shown: Iterator[str]) -> Iterator[str]:
  """What is new in each of some growing texts. The pieces add up to the last of them.

  A text that ends with a replacement character is held back, because the last character is not complete yet, unless nothing
  follows.
  """
  given = written = ''
  for written in shown:
    if written != given and written.startswith(given) and not written.endswith('\ufffd'):
      yield written[len(given):]
      given = written
  if written != given:
    yield written[len(given):]
