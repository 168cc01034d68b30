"""Chips, and slices of them: TPU pods, hosts with GPUs. Their constants, and their devices as compilers describe them."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import numpy as np

from t5x_cpm import backend
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import did_you_mean

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip.

  TPUs: Austin et al. 2025, "How to Scale Your Model", part 2, and Google's data sheets; what a program may use of the memory
  is what the compiler enforces. GPUs: NVIDIA's data sheets, a network card of 400 Gbit/s for each (A100: 200), and nine tenths
  of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION). Between slices of TPUs: a chip's share of its host's network cards,
  of v5e and v6e by Google's data sheet (25 and 100 Gbit/s); of v4 and v5p it is an assumption (12.5 and 50 Gbit/s).
  """

  flops: float  # of dense bfloat16 products a second
  hbm: float  # bytes a program may use
  hbm_rate: float  # bytes a second
  link_rate: float  # bytes a second over one link in one direction; of a TPU each dimension has a link to either side
  host_rate: float  # bytes a second between a chip and its host, in one direction
  dimensions: int  # of a slice's shape; of GPUs hosts x GPUs
  wraps: int = 0  # a dimension of a torus is a ring when this divides it; of three, all are or none is
  options: tuple[tuple[str, Any], ...] = ()  # for the topology
  network_rate: float = 0.0  # bytes a second from a GPU to another host, from a TPU to another slice
  target: str = ''  # what XLA's compiler wants to know of a GPU

  @property
  def platform(self) -> str:
    return 'cuda' if self.target else 'tpu'


def _gpu(name: str, major: int, cores: int, lanes: int, shared: int, cache: int, clock: float, memory: int, rate: float) -> str:
  """XLA's GpuTargetConfigProto as text."""
  info = {
      'threads_per_block_limit': 1024, 'threads_per_warp': 32, 'shared_memory_per_block': 49152,
      'shared_memory_per_block_optin': shared - 1024, 'shared_memory_per_core': shared, 'threads_per_core_limit': 2048,
      'core_count': cores, 'fpus_per_core': lanes, 'block_dim_limit_x': 2**31 - 1, 'block_dim_limit_y': 65535,
      'block_dim_limit_z': 65535, 'memory_bandwidth': round(rate), 'l2_cache_size': cache, 'clock_rate_ghz': clock,
      'device_memory_size': memory, 'registers_per_core_limit': 65536, 'registers_per_block_limit': 65536}
  fields = ' '.join(f'{key}: {value}' for key, value in info.items())
  return (f'gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} }} }}\n'
          f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 8 }}\ndevice_description_str: "{name}"\n')


A100 = _gpu('NVIDIA A100-SXM4-80GB', 8, 108, 64, 167936, 41943040, 1.41, 85094825984, 2039e9)
H100 = _gpu('NVIDIA H100 80GB HBM3', 9, 132, 128, 233472, 52428800, 1.98, 84978434048, 3352e9)
CHIPS = {
    'v4': Chip(275e12, 30.75 * GiB, 1.2e12, 4.5e10, 1.5e10, 3, 4, (('chip_config_name', 'megacore'),), 1.6e9),
    'v5e': Chip(197e12, 15.75 * GiB, 8.1e11, 5e10, 1.5e10, 2, 16, network_rate=3.1e9),
    'v5p': Chip(459e12, 95.74 * GiB, 2.8e12, 1e11, 1.5e10, 3, 4, network_rate=6.2e9),
    'v6e': Chip(918e12, 31.25 * GiB, 1.6e12, 1e11, 3.2e10, 2, 16, network_rate=1.25e10),
    'a100': Chip(312e12, 0.9 * 85094825984, 2039e9, 3e11, 2.5e10, 2, network_rate=2.5e10, target=A100),
    'h100': Chip(989e12, 0.9 * 84978434048, 3352e9, 4.5e11, 5e10, 2, network_rate=5e10, target=H100),
}
EXAMPLES = 'v4:2x2x2, v4:4x4x4, v5e:4x8, v5e:16x16, v5p:2x2x2, v5p:4x4x4, v6e:4x8, v6e:16x16; hosts x GPUs, as in h100:4x8'


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips that a program runs on: one slice of TPUs or several alike, or hosts with GPUs."""

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def count(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def title(self) -> str:
    return self.name if self.slices == 1 else f'{self.slices} x {self.name}'

  @property
  def rings(self) -> tuple[bool, ...]:
    """Which dimensions of a slice of TPUs have links from their last chip to their first."""
    rings = tuple(size % self.chip.wraps == 0 for size in self.shape)
    return (all(rings),) * 3 if len(rings) == 3 else rings  # three dimensions are made of cubes, whose sides have the switches

  def _spans(self, coordinates: Any) -> list[tuple[int, int]]:
    """Of each dimension that a group spans: its chips, and the links that a chip can use to send to them."""
    extents = [len(set(coordinates[:, dimension])) for dimension in range(len(self.shape))]
    return [(extent, 2 if ring and extent == size else 1)
            for extent, size, ring in zip(extents, self.shape, self.rings, strict=True) if extent > 1]

  def rate(self, coordinates: Any) -> float:
    """Bytes a second that a chip can send to a group of chips of its slice, which lie at these coordinates [n, dimensions].

    A ring over one dimension uses its links in both directions; a line has no way back, so only one of them helps.
    """
    if self.chip.platform == 'cuda':
      return self.chip.link_rate if len(set(coordinates[:, 0])) == 1 else self.chip.network_rate
    return self.chip.link_rate * max(sum(links for _, links in self._spans(coordinates)), 1)

  def exchange_seconds(self, coordinates: Any) -> float:
    """Seconds for each byte that a chip divides evenly among a group of chips at these coordinates [n, dimensions].

    In each dimension half of what one half of n chips holds goes to the other half: n / 4 over one link of a line, or two of
    a ring. The dimensions work at the same time.
    """
    if self.chip.platform == 'cuda':
      return (len(coordinates) - 1) / len(coordinates) / self.rate(coordinates)
    return max((extent / 4 / links for extent, links in self._spans(coordinates)), default=0.0) / self.chip.link_rate

  def coordinates(self, devices: list[Any]) -> Any:
    """Where devices are in the slice: [n, dimensions]."""
    if self.chip.platform == 'cuda':
      return np.array([divmod(device.id, self.shape[1]) for device in devices])
    return np.array([device.coords[:self.chip.dimensions] for device in devices])


def parse(name: str, slices: int = 1) -> Slice:
  """'v5p:4x4x4' -> the slice, or several (of hosts with GPUs the name says how many). Raises ConfigError with what is known."""
  kind, _, shape = name.partition(':')
  if kind not in CHIPS:
    raise ConfigError(f'--topology={name}: unknown chip {kind!r}.{did_you_mean(kind, CHIPS)} Known are {", ".join(CHIPS)}, '
                      f'with the shape of the slice in chips, as in {EXAMPLES}.')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or len(shape.split('x')) != CHIPS[kind].dimensions:
    raise ConfigError(f'--topology={name}: a slice of {kind} has {CHIPS[kind].dimensions} dimensions, of at least 1, as in '
                      f'{EXAMPLES}.')
  return Slice(name, CHIPS[kind], tuple(map(int, shape.split('x'))), slices if CHIPS[kind].platform == 'tpu' else 1)


def devices(slice_: Slice) -> list[Any]:
  """The devices of a slice, to compile for. Needs no TPU.

  Raises:
    ConfigError: libtpu is not installed, or its compiler refuses the shape.
  """
  if slice_.chip.platform == 'cuda' and importlib.util.find_spec('jax_cuda12_plugin') is None:
    raise ConfigError("compiling for GPUs needs JAX's CUDA plugin, no GPU: run pip install -e '.[gpu]'.")
  if slice_.chip.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
    raise ConfigError("compiling for a TPU needs its compiler, libtpu: run pip install -e '.[pod]' (or pip install libtpu).")
  # Without these libtpu asks for a TPU, complains that there is none, and locks out other processes that compile.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
                 'TPU_ACCELERATOR_TYPE': 'v5p-8'}
  from jax.experimental import topologies

  chip, options = slice_.chip, dict(slice_.chip.options)
  name = slice_.name
  if slice_.slices > 1:
    options['num_slices'] = slice_.slices
  if chip.target:  # processes of a host each, with its GPUs
    name, options = '', {'target_config': chip.target, 'topology': f'1x{slice_.shape[0]}x{slice_.shape[1]}'}
  try:
    with backend.quiet():
      return list(topologies.get_topology_desc(platform=chip.platform, topology_name=name, **options).devices)
  except Exception as error:
    raise ConfigError(f'--topology={slice_.name}: the compiler knows no such slice ({str(error).splitlines()[0]}). Known are, '
                      f'for example, {EXAMPLES}.') from error
