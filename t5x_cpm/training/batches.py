"""Batches on the devices of the mesh, made in a thread that runs ahead of the loop."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from t5x_cpm.training.step import Step

AHEAD = 2  # batches that wait for the loop


def own_rows(step: Step) -> np.ndarray:
  """The rows of a batch that the devices of this process hold, ascending."""
  leaf = next(iter(step.abstract_batch.values()))
  held = {index[0].indices(leaf.shape[0]) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
  return np.unique(np.concatenate([np.arange(*rows) for rows in held]))


def put(step: Step, batch: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, jax.Array]:
  """Puts a batch, of which this process has `rows`, on the devices of the mesh."""

  def put_feature(name: str) -> jax.Array:
    leaf, mine = step.abstract_batch[name], batch[name]

    def of_device(index: Any) -> np.ndarray:
      return mine[np.searchsorted(rows, np.arange(*index[0].indices(leaf.shape[0])))]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, of_device)

  return {name: put_feature(name) for name in batch}


@contextlib.contextmanager
def prefetch(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Iterator[Any]]:
  """make(start), ..., make(stop - 1), computed in a thread that runs at most AHEAD items ahead of its reader."""
  items: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
  closed = threading.Event()

  def offer(item: Any) -> None:
    while not closed.is_set():
      with contextlib.suppress(queue.Full):
        items.put(item, timeout=0.1)
        return

  def work() -> None:
    try:
      for index in range(start, stop):
        if closed.is_set():
          return
        offer(make(index))
    except BaseException as error:  # the loop raises it where it asks for the batch
      offer(error)

  def read() -> Iterator[Any]:
    for _ in range(start, stop):
      item = items.get()
      if isinstance(item, BaseException):
        raise item
      yield item

  thread = threading.Thread(target=work, name='input', daemon=True)
  thread.start()
  try:
    yield read()
  finally:
    closed.set()
    thread.join()


class MakesBatches(Protocol):
  """A Reader, or what adds to its batches."""

  def batch(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """These rows of the batch that follows `step` updates."""
    ...


def training_batches(step_of: Callable[[int], Step], reader: MakesBatches, start: int, stop: int) -> (
    contextlib.AbstractContextManager[Iterator[Any]]):
  """A context with an iterator over the batches of the steps that follow `start`, ..., `stop - 1` updates.

  Args:
    step_of: from the number of a step, counted from 1, to its program.
    reader: makes the batches.
    start, stop: how many updates are done before the first step, and after the last one.
  """
  rows = own_rows(step_of(start + 1))
  return prefetch(lambda index: put(step_of(index + 1), reader.batch(index, rows), rows), start, stop)
