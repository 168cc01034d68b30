"""The files that curves are drawn from, metrics.jsonl and TensorBoard's: appended to, and cut back to the step of a restart."""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5x_cpm.files import write_atomically


def read_jsonl(path: epath.Path) -> list[dict[str, Any]]:
  """The records of metrics.jsonl; a last line that a kill cut off is left out."""
  records = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      records.append(json.loads(line))
  return records


def cut_jsonl(path: epath.Path, step: int) -> None:
  """Removes the records of later steps, and a broken last line, in one atomic replacement."""
  if not path.exists():
    return
  kept = [record for record in read_jsonl(path) if record['step'] <= step]
  data = ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in kept).encode()
  if data != path.read_bytes():
    write_atomically(path, data)


def cut_events(path: epath.Path, step: int) -> None:
  """Cuts a TensorBoard event file before the first event of a later step, or the first broken record."""
  from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

  data = path.read_bytes()
  end = 0
  while end + 12 <= len(data):
    (length,) = struct.unpack_from('<Q', data, end)  # then its checksum, the event and a checksum of that
    if end + 16 + length > len(data):
      break
    if Event.FromString(data[end + 12:end + 12 + length]).step > step:
      break
    end += 16 + length
  if end < len(data):
    write_atomically(path, data[:end])


class EventFile:
  """Scalars for TensorBoard. Its own writers would import TensorFlow where that is installed; its record format does not."""

  def __init__(self, folder: epath.Path):
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary = Event, Summary
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names.
    name = f'events.out.tfevents.{time.time_ns() // 1000:017d}.{socket.gethostname()}.{os.getpid()}'
    self._file = (folder / name).open('wb')
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
