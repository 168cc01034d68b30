"""The files that curves are drawn from, metrics.jsonl and TensorBoard's: appended to, and cut back to the step of a restart."""

import itertools
import json
import os
import re
import socket
import struct
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5x_cpm import files

JOINT = 'joint'  # the split of a record of metrics.jsonl that says where a run began to go on with another


def _numbers(value: Any) -> bool:
  """Whether a value is what metrics are: a number or null, or lists of them."""
  if isinstance(value, list):
    return bool(value) and all(map(_numbers, value))
  return value is None or isinstance(value, (int, float)) and not isinstance(value, bool)


def _record(line: str) -> dict[str, Any] | None:
  """The record of a line of metrics.jsonl; None where it is none."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not (isinstance(record, dict) and type(record.get('step')) is int and isinstance(record.get('split'), str)):
    return None
  return record if all(_numbers(value) for name, value in record.items() if name != 'split') else None


def read_jsonl(path: epath.Path) -> list[dict[str, Any]]:
  """The records of metrics.jsonl; a last line that a kill cut off, and any other that is no record, is left out."""
  lines = files.read_bytes(path).decode(errors='replace').split('\n')
  return [record for line in lines if (record := _record(line))]


def set_aside(path: epath.Path, why: str) -> None:
  """Renames what cannot be read, a file, folder or link, so that the run can go on without it, and says so."""
  # TensorBoard reads all files with 'tfevents' in their names.
  free = (path.with_name(f'{path.name.replace("tfevents", "events")}.damaged{n or ""}') for n in itertools.count())
  name = next(other for other in free if not os.path.lexists(other))
  path.rename(name)
  print(f'{path} {why}: set aside as {name.name}; the run goes on.', file=sys.stderr, flush=True)


def _bytes(path: epath.Path) -> bytes | None:
  """The content of a file; None where there is none, or where what stands in its place cannot be read and is set aside."""
  if not os.path.lexists(path) and not path.exists():  # of buckets, only the latter knows
    return None
  try:
    return files.read_bytes(path)
  except OSError as error:
    set_aside(path, f'cannot be read ({error.strerror or error})')
    return None


def cut_jsonl(path: epath.Path, step: int, expected: Mapping[str, int] = types.MappingProxyType({})) -> None:
  """Removes the records of later steps, and a last line that a kill cut off, in one atomic replacement.

  Where another line is no record, the file as it was is kept under another name.

  Args:
    path: metrics.jsonl, which may not be there.
    step: updates done.
    expected: for splits, the last step of which there should be a record; says so if there is none.
  """
  data = _bytes(path) or b''
  lines = data.decode(errors='replace').split('\n')
  records = [_record(line) for line in lines]
  bad = [number + 1 for number, (line, record) in enumerate(zip(lines[:-1], records)) if not record and line.strip()]
  kept = ''.join(
      json.dumps(record, ensure_ascii=False) + '\n' for record in records if record and record['step'] <= step).encode()
  if bad:
    numbers = ', '.join(map(str, bad[:5])) + (', ...' if len(bad) > 5 else '')
    set_aside(path, f'holds what is no record in line {numbers}')
  if bad or data != kept:
    files.write_atomically(path, kept)
  last = {record['split']: record['step'] for record in records if record and record['step'] <= step}
  missing = [split for split, wanted in expected.items() if last.get(split, 0) < wanted]
  if missing and not bad:
    print(f'{path} has no records of {missing[0]} of steps {last.get(missing[0], 0) + 1} to {step}: it was cut short or '
          'removed, and the curves have a gap there.', file=sys.stderr, flush=True)


def cut_events(path: epath.Path, step: int) -> None:
  """Cuts a TensorBoard event file before the first event of a later step, or a last record that a kill cut off.

  A file that is damaged is kept under another name, and what comes before the damage in its place.
  """
  from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
  from tensorboard.summary.writer.record_writer import masked_crc32c

  data = _bytes(path)
  if data is None:
    return
  end, bad = 0, False
  while end + 12 <= len(data):
    length, checksum = struct.unpack_from('<QI', data, end)  # then the event and its checksum
    if masked_crc32c(data[end:end + 8]) != checksum:
      bad = True
      break
    if end + 16 + length > len(data):
      break
    try:  # the checksum of the event itself would cost 0.4 s a MB, and TensorBoard checks it
      event = Event.FromString(data[end + 12:end + 12 + length])
    except Exception:  # protobuf's own, whose package is no dependency of this one
      bad = True
    if bad or event.step > step:
      break
    end += 16 + length
  if bad:
    set_aside(path, f'is damaged after {end:,} bytes')
  if end < len(data):
    files.write_atomically(path, data[:end])


def cut_all_events(folder: epath.Path, step: int) -> None:
  """Cuts the event files of a run, each in a folder of its split, back to a step; whatever cannot be read is set aside."""
  for path in (folder, folder / 'train', folder / 'eval'):
    if os.path.lexists(path) and not path.is_dir():
      set_aside(path, 'is no folder')
    elif path != folder:
      for file in sorted(path.glob('events.out.tfevents.*')):
        cut_events(file, step)


class EventFile:
  """Scalars for TensorBoard. Its own writers would import TensorFlow where that is installed; its record format does not."""

  def __init__(self, folder: epath.Path):
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary = Event, Summary
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names, and a clock may have been set back.
    names = [re.match(r'events\.out\.(?:tf)?events\.(\d+)\.', path.name) for path in folder.iterdir()]
    number = max(time.time_ns() // 1000, *(int(name[1]) + 1 for name in names if name), 0)
    self.path = folder / f'events.out.tfevents.{number:017d}.{socket.gethostname()}.{os.getpid()}'
    self._file = self.path.open('wb')
    self._records = RecordWriter(self._file)
    self._write(self._event(wall_time=time.time(), file_version='brain.Event:2'))

  def _write(self, event: Any) -> None:
    self._records.write(event.SerializeToString())
    self._file.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

  def close(self) -> None:
    self._records.close()
