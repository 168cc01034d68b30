"""Which mesh, sharding, rematerialisation and microbatches suit a model on a slice: estimates rank, the compiler decides."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from t5x_cpm.chips import GiB
from t5x_cpm.compile import estimate, plan, slices
from t5x_cpm.compile.estimate import Estimate
from t5x_cpm.compile.slices import Slice
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.training import guidance, teachers

TRIED = 4  # meshes that are compiled: those with the best estimates
# What a search chooses: the gin class and its fields, and the part of Config that they lie in.
FIELDS = {'MeshConfig': ('mesh', ('data', 'model', 'expert', 'slices', 'sharding', 'host_gib')),
          'ModelConfig': ('model', ('remat',)), 'TrainConfig': ('train', ('microbatches',))}

Found = tuple[Config, plan.Plan]


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def candidates(config: Config, slice_: Slice, step: str) -> Iterator[Config]:
  """Every configuration whose mesh divides the model, the batch and the slice."""
  chips, model = slice_.count, config.model
  width = math.gcd(model.num_heads, model.d_ff, model.vocab_size)
  batch = config.train.batch_size if step == 'train' else config.infer.batch_size
  experts = _divisors(model.moe.num_experts) if model.moe.num_experts else [1]
  for m, e in itertools.product(_divisors(width), experts):
    if chips % (m * e * slice_.slices) or batch % (chips // m):
      continue
    choices: list[tuple[str, str, int]] = [('none', 'none', 1)]
    if step == 'train':
      powers = [count for count in _divisors(batch // (chips // m)) if count & (count - 1) == 0]
      choices = list(itertools.product(('none', 'optimizer', 'full'), ('dots', 'full'), powers))
    for sharding, remat, microbatches in choices:
      yield dataclasses.replace(
          config, mesh=dataclasses.replace(config.mesh, data=chips // (m * e), model=m, expert=e, sharding=sharding),
          model=dataclasses.replace(model, remat=remat), train=dataclasses.replace(config.train, microbatches=microbatches))


def ranked(config: Config, slice_: Slice, step: str) -> list[Estimate]:
  """Candidates that fit by their estimate, the fastest first; where none does, all of them, the smallest first.

  Raises:
    ConfigError: nothing divides the slice.
  """
  sizes = estimate.sizes(config.model)
  teacher = teachers.model_of(config) if step == 'train' else None
  guides = [estimate.Guide(one, estimate.sizes(one)) for one in guidance.models(teacher)]
  found = [estimate.estimate(one, slice_, step, sizes, guides) for one in candidates(config, slice_, step)]
  if not found:
    batch = 'TrainConfig.batch_size' if step == 'train' else 'InferConfig.batch_size'
    raise ConfigError(f'no mesh of the {slice_.count} chips of {slice_.name} divides the model and the batch: change {batch}.')
  fitting = [one for one in found if one.bytes <= estimate.ROOM * slice_.chip.hbm]
  # Of equally fast ones the smallest comes first: it leaves the most room for what the estimate does not see.
  return sorted(fitting, key=lambda one: (one.seconds, one.bytes)) or sorted(found, key=lambda one: one.bytes)


def as_gin(config: Config) -> str:
  """What a search has chosen, as a gin file; MeshConfig.slices only where there are several."""
  return ''.join(f'{cls}.{field} = {getattr(getattr(config, part), field)!r}\n'
                 for cls, (part, fields) in FIELDS.items() for field in fields if field != 'slices' or config.mesh.slices > 1)


def _line(config: Config) -> str:
  mesh = config.mesh
  host = f', {mesh.host_gib:g} GiB in host memory' if mesh.host_gib else ''
  return (f'{mesh.data} x {mesh.model} x {mesh.expert} {mesh.sharding}, remat {config.model.remat}, '
          f'{config.train.microbatches} microbatches{host}')


def _attempt(config: Config, slice_: Slice, step: str, estimated: str = '') -> list[Found]:
  """Compiles a candidate and prints a line about it; an empty list if the mesh cannot split it."""
  try:
    made = plan.make(config, slice_, step)
  except ConfigError as error:
    print(f'  {_line(config)}: {re.sub(r"[.] .*", "", str(error))}', flush=True)
    return []
  verdict = f'{made.step_seconds:.3g} s, {made.bound}' if made.fits else f'{made.missing_bytes / GiB:.1f} GiB too much'
  print(f'  {_line(config)}: {verdict}{estimated}', flush=True)
  return [(config, made)]


def _winner(plans: list[Found]) -> Found:
  """The fastest plan that fits, or the one that comes closest to fitting."""
  return min(plans, key=lambda pair: (not pair[1].fits, pair[1].missing_bytes, pair[1].step_seconds))


def _different_meshes(order: list[Estimate], slice_: Slice, step: str) -> list[Found]:
  """Compiles the first estimates that differ in their mesh; how many microbatches are best is decided later."""
  plans: list[Found] = []
  seen: set[Any] = set()
  for one in order:
    mesh = one.config.mesh
    key = (mesh.data, mesh.model, mesh.expert, mesh.sharding if mesh.data * mesh.expert > 1 else 'none')
    if key not in seen and len(plans) < TRIED:
      seen.add(key)
      plans += _attempt(one.config, slice_, step, f' (estimate {one.seconds:.3g} s, {one.bytes / GiB:.1f} GiB)')
  return plans


def _fewer_microbatches(plans: list[Found], slice_: Slice) -> Found:
  """Halves the microbatches of a training step as long as that helps: estimates ask for too many."""
  config, made = _winner(plans)
  while made.fits and made.bound != 'compute' and config.train.microbatches % 2 == 0:
    half = dataclasses.replace(config.train, microbatches=config.train.microbatches // 2)
    plans = plans + _attempt(dataclasses.replace(config, train=half), slice_, 'train')
    before, (config, made) = config, _winner(plans)
    if config is before:
      break
  return config, made


def best(config: Config, slice_: Slice, step: str) -> Found:
  """Compiles the most promising candidates and returns the fastest that fits, or the one that comes closest.

  Args:
    config: model, task lengths and batch sizes.
    slice_: the chips to compile for.
    step: 'train', 'encode' or 'decode'.

  Returns:
    The configuration with what the search has chosen (FIELDS), and its plan.

  Raises:
    ConfigError: the slice is unknown, the compiler is missing, or nothing divides the model, the batch and the slice.
  """
  slices.devices(slice_)  # an unknown slice or a missing compiler is reported before the search
  order = ranked(config, slice_, step)
  print(f'{len(order)} candidates; compiling the best {min(TRIED, len(order))} by their estimates', flush=True)
  plans = _different_meshes(order, slice_, step)
  if not plans:
    raise ConfigError(f'no mesh of {slice_.name} can split this model and batch.')
  return _fewer_microbatches(plans, slice_) if step == 'train' else _winner(plans)
