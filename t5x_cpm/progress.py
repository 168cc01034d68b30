"""Shows how far some work has got: a bar on a terminal, and a line from time to time elsewhere."""

import math
import sys
import time
from typing import Any, TextIO


def clock(seconds: float) -> str:
  """A duration as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


class Progress:
  """Shows how much of some work is done and how long the rest will take.

  A terminal gets a bar on standard error, with the rate and the time left. Elsewhere a line is printed at the first progress,
  then at intervals, and when everything is done.
  """

  def __init__(self, name: str, unit: str, total: int, done: int = 0, *, interval: float = 30.0, lines: TextIO | None = None):
    """Starts the clock.

    Args:
      name: of the work, such as 'infer'; may be ''.
      unit: what is counted, in the singular, such as 'line'.
      total: how many there are.
      done: how many were done before.
      interval: seconds between two lines where there is no terminal.
      lines: where these lines go; None is standard error.
    """
    self.label = f'{name}: {unit}' if name else unit
    self.total, self.before = total, done
    self.interval, self.lines = interval, lines
    self.begin = time.monotonic()
    self.shown: float | None = None  # when the last line was printed
    self.bar: Any = None
    if sys.stderr.isatty():
      import tqdm

      # miniters=0, because the text beside the number may change while the number does not.
      self.bar = tqdm.tqdm(total=total, initial=done, desc=name or None, unit=unit, dynamic_ncols=True, smoothing=0.1,
                           miniters=0)

  def rate(self, count: float) -> float:
    """The rate per second at which `count` units were done since the clock was started."""
    return count / max(time.monotonic() - self.begin, 1e-6)

  def show(self, done: int, detail: str = '', *, bar_detail: str | None = None, seconds_left: float | None = None) -> None:
    """Says that `done` of the total are done, if it is time to say something.

    Args:
      done: how many, including those that were done before.
      detail: what else a line says.
      bar_detail: what else the bar says; None is the same as `detail`.
      seconds_left: the time left; None derives it from the rate so far. The bar has an estimate of its own.
    """
    if self.bar is not None:
      self.bar.set_postfix_str(detail if bar_detail is None else bar_detail, refresh=False)
      self.bar.update(done - self.bar.n)
      return
    now = time.monotonic()
    last = self.shown if self.shown is not None else (self.begin if done == self.before else -math.inf)
    if done < self.total and now - last < self.interval:
      return
    self.shown = now
    if seconds_left is None and done > self.before:
      seconds_left = (self.total - done) * (now - self.begin) / (done - self.before)
    left = f'{clock(seconds_left)} left' if seconds_left is not None and done < self.total else ''
    self.note('  '.join(text for text in (f'{self.label} {done}/{self.total}', detail, left) if text))

  def note(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self.bar is not None:
      self.bar.write(text)
    else:
      print(text, file=self.lines or sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar, which stays on the screen as it is."""
    if self.bar is not None:
      self.bar.close()
