"""Progress: lines at intervals, or a bar on a terminal."""

import io
import sys

import pytest

from t5x_cpm import progress


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def test_lines_come_at_intervals_and_tell_the_time_left(clock, capsys):
  shown = progress.Progress('infer', 'line', 100, 20)
  for done in range(30, 101, 10):
    clock[0] += 10
    shown.show(done, f'{shown.rate(done - 20):.1f} lines/s')
  shown.close()
  out, err = capsys.readouterr()
  assert not out and err.splitlines() == [
      'infer: line 30/100  1.0 lines/s  0:01:10 left', 'infer: line 60/100  1.0 lines/s  0:00:40 left',
      'infer: line 90/100  1.0 lines/s  0:00:10 left', 'infer: line 100/100  1.0 lines/s']


def test_time_left_that_the_caller_knows_better(clock, capsys):
  shown = progress.Progress('', 'step', 10, lines=sys.stdout)
  shown.show(1, seconds_left=3661)
  assert capsys.readouterr().out == 'step 1/10  1:01:01 left\n'


def test_while_nothing_is_done_lines_have_no_time_left(clock, capsys):
  shown = progress.Progress('cache x', 'shard', 3)
  for seconds in (1, 29, 31):
    clock[0] = seconds
    shown.show(0, f'{seconds} documents')
  shown.show(1)
  assert capsys.readouterr().err == 'cache x: shard 0/3  31 documents\n'


def test_a_terminal_has_a_bar_that_moves_without_the_number(monkeypatch, capsys):
  terminal = io.StringIO()
  monkeypatch.setattr(terminal, 'isatty', lambda: True)
  monkeypatch.setattr(sys, 'stderr', terminal)
  shown = progress.Progress('cache x', 'shard', 4, 1)
  shown.bar.mininterval = 0
  shown.show(1, 'first')
  shown.show(1, 'second')
  shown.note('a remark')
  shown.show(2, 'for lines', bar_detail='third')
  shown.close()
  text = terminal.getvalue()
  assert 'cache x:  25%' in text and '2/4' in text and 'shard' in text and 'first' in text and 'second' in text
  assert 'third' in text and 'for lines' not in text and capsys.readouterr().out == 'a remark\n'
