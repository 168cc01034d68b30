"""TPU chips and slices: their constants, and their devices as the compiler of libtpu describes them on any machine."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from t5x_cpm.config import ConfigError
from t5x_cpm.gin_utils import did_you_mean

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU chip.

  Rates: Austin et al. 2025, "How to Scale Your Model", part 2, and Google's data sheets; what a program may use of the memory
  is what the compiler enforces.
  """

  device_kind: str
  flops: float  # of dense bfloat16 products a second
  hbm: float  # bytes a program may use
  hbm_rate: float  # bytes a second
  link_rate: float  # bytes a second over one link in one direction; each dimension of the slice has a link to either side
  host_rate: float  # bytes a second between a chip and its host, in one direction
  dimensions: int  # of the torus
  wraps: int  # a dimension of the slice is a ring when this divides it
  options: tuple[tuple[str, Any], ...] = ()  # for the topology


CHIPS = {
    'v4': Chip('TPU v4', 275e12, 30.75 * GiB, 1.2e12, 4.5e10, 1.5e10, 3, 4, (('chip_config_name', 'megacore'),)),
    'v5e': Chip('TPU v5 lite', 197e12, 15.75 * GiB, 8.1e11, 5e10, 1.5e10, 2, 16),
    'v5p': Chip('TPU v5', 459e12, 95.74 * GiB, 2.8e12, 1e11, 1.5e10, 3, 4),
    'v6e': Chip('TPU v6 lite', 918e12, 31.25 * GiB, 1.6e12, 1e11, 3.2e10, 2, 16),
}
EXAMPLES = 'v4:2x2x2, v4:4x4x4, v5e:4x8, v5e:16x16, v5p:2x2x2, v5p:4x4x4, v6e:4x8, v6e:16x16'


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice."""

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def count(self) -> int:
    return math.prod(self.shape)

  def rate(self, coordinates: Any) -> float:
    """Bytes a second that a chip can send to a group of chips, all of which lie at these coordinates [n, dimensions].

    A ring over one dimension uses its links in both directions; a line has no way back, so only one of them helps.
    """
    rate = 0.0
    for dimension, size in enumerate(self.shape):
      extent = len(set(coordinates[:, dimension]))
      if extent > 1:
        ring = extent == size and size % self.chip.wraps == 0
        rate += (2 if ring else 1) * self.chip.link_rate
    return rate or self.chip.link_rate


def parse(name: str) -> Slice:
  """'v5p:4x4x4' -> the slice. Raises ConfigError with what is known."""
  kind, _, shape = name.partition(':')
  if kind not in CHIPS:
    raise ConfigError(f'--topology={name}: unknown chip {kind!r}.{did_you_mean(kind, CHIPS)} Known are {", ".join(CHIPS)}, '
                      f'with the shape of the slice in chips, as in {EXAMPLES}.')
  if not re.fullmatch(r'\d+(x\d+)*', shape) or len(shape.split('x')) != CHIPS[kind].dimensions:
    raise ConfigError(f'--topology={name}: a slice of {kind} has {CHIPS[kind].dimensions} dimensions, as in {EXAMPLES}.')
  return Slice(name, CHIPS[kind], tuple(map(int, shape.split('x'))))


def devices(slice_: Slice) -> list[Any]:
  """The devices of a slice, to compile for. Needs no TPU.

  Raises:
    ConfigError: libtpu is not installed, or its compiler refuses the shape.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError("compiling for a TPU needs its compiler, libtpu: run pip install -e '.[pod]' (or pip install libtpu).")
  # Without these libtpu asks for a TPU, complains that there is none, and locks out other processes that compile.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
                 'TPU_ACCELERATOR_TYPE': 'v5p-8'}
  from jax.experimental import topologies

  try:
    with quiet():
      return list(topologies.get_topology_desc(
          platform='tpu', topology_name=slice_.name, **dict(slice_.chip.options)).devices)
  except Exception as error:
    raise ConfigError(f'--topology={slice_.name}: the compiler knows no such slice ({str(error).splitlines()[0]}). Known are, '
                      f'for example, {EXAMPLES}.') from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps what C++ writes to the terminal out of it: libtpu logs that it runs without a TPU."""
  saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)
