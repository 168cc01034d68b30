"""What is known about each kind of chip: how fast it computes, what it holds, how fast it sends. The only table of chips.

MFU reads the peak rate of a run's device; `compile` reads the rest, for slices of chips that need not be there.
"""

import dataclasses
from typing import Any

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip. If `dimensions` is 0, only its peak is known, and `compile` cannot plan for it.

  Peaks are from the makers' data sheets. For TPUs the rates of memory, links and network are those that Google publishes
  (cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, in November 2026), but for v4's network, for which 12.5 Gbit/s a chip is an
  assumption; host rates are from Austin et al. 2025, "How to Scale Your Model", part 2; the memory that a program may use is
  what the compiler enforces. The other figures for GPUs are from NVIDIA's data sheets, and assume a network card of 400 Gbit/s
  for each GPU (A100: 200) and nine tenths of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
  """

  flops: float  # per second, of dense bfloat16 products
  device_kinds: tuple[str, ...]  # JAX's device_kind contains one of these
  hbm: float = 0.0  # bytes of its memory that a program may use
  hbm_rate: float = 0.0  # bytes per second
  link_rate: float = 0.0  # bytes per second over one link in one direction; a TPU has two in each dimension, one on each side
  host_rate: float = 0.0  # bytes per second between a chip and its host, in one direction
  dimensions: int = 0  # how many a slice's shape has; two for GPUs: hosts x GPUs
  ring_multiple: int = 0  # a dimension of a TPU slice closes to a ring when this divides its size
  options: tuple[tuple[str, Any], ...] = ()  # what libtpu needs to describe the chip
  network_rate: float = 0.0  # bytes per second from a GPU to another host, or from a TPU to another slice
  target: str = ''  # XLA's description of a GPU; empty for a TPU

  @property
  def platform(self) -> str:
    return 'cuda' if self.target else 'tpu'


def _gpu_target(
    name: str, major: int, cores: int, lanes: int, shared: int, cache: int, clock: float, memory: int, rate: float) -> str:
  """XLA's GpuTargetConfigProto as text: what its compiler must know about a GPU that is not there."""
  info = {
      'threads_per_block_limit': 1024, 'threads_per_warp': 32, 'shared_memory_per_block': 49152,
      'shared_memory_per_block_optin': shared - 1024, 'shared_memory_per_core': shared, 'threads_per_core_limit': 2048,
      'core_count': cores, 'fpus_per_core': lanes, 'block_dim_limit_x': 2**31 - 1, 'block_dim_limit_y': 65535,
      'block_dim_limit_z': 65535, 'memory_bandwidth': round(rate), 'l2_cache_size': cache, 'clock_rate_ghz': clock,
      'device_memory_size': memory, 'registers_per_core_limit': 65536, 'registers_per_block_limit': 65536}
  fields = ' '.join(f'{key}: {value}' for key, value in info.items())
  return (f'gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} }} }}\n'
          f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 8 }}\ndevice_description_str: "{name}"\n')


A100_MEMORY, A100_RATE = 85_094_825_984, 2039e9
H100_MEMORY, H100_RATE = 84_978_434_048, 3352e9
A100 = _gpu_target('NVIDIA A100-SXM4-80GB', 8, 108, 64, 167936, 41943040, 1.41, A100_MEMORY, A100_RATE)
H100 = _gpu_target('NVIDIA H100 80GB HBM3', 9, 132, 128, 233472, 52428800, 1.98, H100_MEMORY, H100_RATE)

CHIPS = {
    'v4': Chip(275e12, ('TPU v4',), 30.75 * GiB, 1.228e12, 4.5e10, 1.5e10, 3, 4, (('chip_config_name', 'megacore'),), 1.6e9),
    'v5e': Chip(197e12, ('TPU v5 lite', 'TPU v5e'), 15.75 * GiB, 8.19e11, 5e10, 1.5e10, 2, 16, network_rate=3.125e9),
    'v5p': Chip(459e12, ('TPU v5p', 'TPU v5'), 95.74 * GiB, 2.765e12, 1e11, 1.5e10, 3, 4, network_rate=6.25e9),
    'v6e': Chip(918e12, ('TPU v6',), 31.25 * GiB, 1.64e12, 1e11, 3.2e10, 2, 16, network_rate=1.25e10),
    'a100': Chip(312e12, ('A100',), 0.9 * A100_MEMORY, A100_RATE, 3e11, 2.5e10, 2, network_rate=2.5e10, target=A100),
    'h100': Chip(989e12, ('H100',), 0.9 * H100_MEMORY, H100_RATE, 4.5e11, 5e10, 2, network_rate=5e10, target=H100),
    # Of these only the peak is known.
    'v2': Chip(46e12, ('TPU v2',)),
    'v3': Chip(123e12, ('TPU v3',)),
    'v100': Chip(125e12, ('V100',)),
    'a10g': Chip(70e12, ('A10G',)),
    'l4': Chip(121e12, ('L4',)),
    'l40s': Chip(362e12, ('L40S',)),
    'h100_pcie': Chip(756e12, ('H100 PCIe',)),
    'h200': Chip(989e12, ('H200',)),
    'b200': Chip(2250e12, ('B200',)),
}


def of_device_kind(kind: str) -> Chip | None:
  """The chip whose name JAX's `device_kind` contains, the longest where several match ('TPU v5 lite' is no 'TPU v5')."""
  found = [(len(name), chip) for chip in CHIPS.values() for name in chip.device_kinds if name.lower() in kind.lower()]
  return max(found, key=lambda pair: pair[0])[1] if found else None
