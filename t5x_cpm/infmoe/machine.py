"""How fast a machine reads and computes: what a plan is made from."""

import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import stored
from t5x_cpm.config import Config
from t5x_cpm.infmoe.formats import FORMATS, Stored
from t5x_cpm.infmoe.loader import DEMAND, Load, Loader
from t5x_cpm.infmoe.memory import pages

FEW, MANY = 4, 256  # rows of a product that waits for its weights, and of one that waits for arithmetic
REPEATS = 5
READ_BYTES = 512 * 2**20  # that are read to measure a disk
_FORM = {'disk': float, 'weights': {str: float}, 'products': {str: float}, 'call': float}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Rates of a machine.

  Attributes:
    disk: bytes a second that are read past the system's cache.
    weights: by format, the bytes of stored weights a second that a product of few rows reads.
    products: by format, the multiplications with their additions, counted as two, a second of a product of many rows.
    call: seconds that the host takes for a layer beside its products.
    about: where the rates come from, in words.
  """

  disk: float
  weights: dict[str, float]
  products: dict[str, float]
  call: float
  about: str


ASSUMED = Machine(
    disk=1.5e9, weights=dict.fromkeys(FORMATS, 15e9), products=dict.fromkeys(FORMATS, 1e11), call=1e-3,
    about='a laptop is assumed: 1.5 GB/s of disk, 15 GB/s of memory, 0.1 TFLOP/s; --measure measures this machine')


def _file() -> pathlib.Path:
  return pathlib.Path(os.environ.get('T5X_CPM_CACHE', '~/.cache/t5x_cpm')).expanduser() / 'machine.json'


def known() -> Machine:
  """This machine as it was measured last, or a laptop."""
  try:
    told = stored.read(_file(), _FORM, '')
  except stored.DamagedError:
    return ASSUMED
  return Machine(**told, about=f'as it was measured ({_file()})')


def _median(run: Callable[[], Any]) -> float:
  """Seconds of a call: the median of several, after one that does not count."""
  run()
  seconds = []
  for _ in range(REPEATS):
    begin = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


def disk_rate(folder: pathlib.Path, piece: int, staging: int, readers: int) -> float:
  """Bytes a second in which pieces of a file in a folder are read, as experts are: `staging` of them at once, by `readers`."""
  piece = max(piece // 4096, 1) * 4096
  count = max(READ_BYTES // piece, staging)
  with tempfile.NamedTemporaryFile(dir=folder, prefix='.t5x_cpm-measure') as file:
    noise = np.random.default_rng(0).integers(0, 256, piece, np.uint8).tobytes()
    for _ in range(count):
      file.write(noise)
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loader, memory = Loader(readers), pages(staging * piece)
    try:
      going: list[Load] = []
      begin = time.perf_counter()
      for number in range(count):
        into = memory[number % staging * piece:][:piece]
        if number >= staging:
          going[number - staging].wait(60)
        going.append(Load('a piece', pathlib.Path(file.name), number * piece, into, lambda: None, lambda: None))
        loader.submit(going[-1], DEMAND)
      for load in going:
        load.wait(60)
      return count * piece / (time.perf_counter() - begin)
    finally:
      loader.close()


def product_rates(name: str, I: int, O: int, group: int) -> tuple[float, float]:
  """Bytes of weights a second with few rows, and operations a second with many, of products with matrices [I, O]."""
  form, rng = FORMATS[name], np.random.default_rng(0)
  parts = form.encode(rng.normal(size=(I, O)).astype(np.float32), group)
  # More than a cache of the processor holds: the weights of a token are seldom those of the last.
  size = sum(value.nbytes for value in parts.values())
  copies = [jax.device_put({part: value.copy() for part, value in parts.items()}) for _ in range(max(2, 2**28 // size))]
  run = jax.jit(lambda x, parts: Stored(parts, name).product(x))

  def seconds(rows: int, times: int) -> float:
    x = jnp.asarray(rng.normal(size=(rows, I)).astype(np.float32))
    return _median(lambda: jax.block_until_ready([run(x, copies[number % len(copies)]) for number in range(times)])) / times

  return size / seconds(FEW, len(copies)), 2 * MANY * I * O / seconds(MANY, 2)


def call_seconds() -> float:
  """Seconds that the host takes for a layer beside its products: a few small programs, and what it reads from them."""
  step = jax.jit(lambda x: x + 1)
  x = jnp.zeros((4, 4))
  return 4 * _median(lambda: np.asarray(step(x))) + 2e-4


def measure(config: Config, folder: pathlib.Path) -> Machine:
  """Measures this machine for a model, and remembers it.

  Args:
    config: of the model, with OffloadConfig.
    folder: on the disk that experts would be read from.
  """
  model, given = config.model, config.offload
  I, O = model.d_model, model.d_ff
  names = {given.format, given.dense_format, 'float32'}
  rates = {name: product_rates(name, I, O, given.group) for name in names}
  expert = 3 * sum(kind.nbytes for kind in FORMATS[given.format].kinds(I, O, given.group).values())
  found = Machine(
      disk=disk_rate(folder, expert, given.staging, given.readers),
      weights={name: rates[name][0] for name in names}, products={name: rates[name][1] for name in names},
      call=call_seconds(), about='as it was measured now')
  _file().parent.mkdir(parents=True, exist_ok=True)
  stored.write(_file(), {name: value for name, value in dataclasses.asdict(found).items() if name != 'about'})
  return found
