"""Which mesh, sharding, rematerialisation and microbatches suit a model on a slice: an estimate ranks, the compiler decides."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from t5x_cpm import mesh as mesh_lib
from t5x_cpm.compile import chips, plan
from t5x_cpm.compile.chips import GiB, Slice
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import flops

ROOM = 0.9  # of a chip's memory: estimates are rough
TRIED = 4  # of the best estimates are compiled
FIELDS = {'MeshConfig': ('mesh', ('data', 'model', 'expert', 'slices', 'sharding', 'host_gib')),
          'ModelConfig': ('model', ('remat',)), 'TrainConfig': ('train', ('microbatches',))}


@dataclasses.dataclass(frozen=True)
class Estimate:
  config: Config
  bytes: float  # of a chip
  seconds: float  # of a step


def _together(*seconds: float) -> float:
  """The longest, and a tenth of the others: overlap is never perfect."""
  return 0.9 * max(seconds) + 0.1 * sum(seconds)


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def candidates(config: Config, slice_: Slice, step: str) -> Iterator[Config]:
  """Every configuration that divides model, batch and slice."""
  count, model = slice_.count, config.model
  width = math.gcd(model.num_heads, model.d_ff, model.vocab_size)
  batch = config.train.batch_size if step == 'train' else config.infer.batch_size
  experts = _divisors(model.moe.num_experts) if model.moe.num_experts else [1]
  for m, e in itertools.product(_divisors(width), experts):
    if count % (m * e * slice_.slices) or batch % (count // m):
      continue
    choices: list[tuple[str, str, int]] = [('none', 'none', 1)]
    if step == 'train':
      powers = [parts for parts in _divisors(batch // (count // m)) if parts & (parts - 1) == 0]
      choices = list(itertools.product(('none', 'optimizer', 'full'), ('dots', 'full'), powers))
    for sharding, remat, parts in choices:
      yield dataclasses.replace(
          config, mesh=dataclasses.replace(config.mesh, data=count // (m * e), model=m, expert=e, sharding=sharding),
          model=dataclasses.replace(model, remat=remat), train=dataclasses.replace(config.train, microbatches=parts))


def estimate(config: Config, slice_: Slice, step: str, sizes: dict[tuple[tuple[str | None, ...], bool], int]) -> Estimate:
  """Memory and time of a step, from sizes alone.

  Args:
    config: complete.
    slice_: to run on.
    step: as for `plan.make`.
    sizes: how many parameters there are of each kind: (names of its axes, whether it is an expert's).
  """
  mesh, model, chip = config.mesh, config.model, slice_.chip
  of_axis = {'data': mesh.data, 'model': mesh.model, 'expert': mesh.expert}

  def held(rules: mesh_lib.Rules, experts: bool | None = None) -> float:
    """Parameters of a chip."""
    total = 0.0
    for (names, is_expert), count in sizes.items():
      if experts in (None, is_expert):
        axes = [axis for part in mesh_lib.spec(names, rules) for axis in ((part,) if isinstance(part, str) else part or ())]
        total += count / math.prod(of_axis[axis] for axis in axes)
    return total

  S, T, D, F, H = config.task.encoder_length, config.task.decoder_length, model.d_model, model.d_ff, model.num_heads
  layers = (model.num_encoder_layers, model.num_decoder_layers)
  parts = mesh.data * mesh.expert
  local = held(mesh_lib.RULES)

  def spans(size: int) -> int:
    """How many of the torus's dimensions a group of `size` chips spans."""
    chips = slice_.count // slice_.slices
    return max(1, round(len(slice_.shape) * math.log(size) / math.log(chips))) if size > 1 and chips > 1 else 1

  def rate(size: int) -> float:
    if chip.platform == 'cuda':
      return chip.link_rate if size <= slice_.shape[1] else chip.network_rate
    return spans(size) * chip.link_rate * (2 if all(slice_.rings) else 1)

  def exchange_seconds(size: int) -> float:
    """As in Slice, of a group that is as long in each dimension."""
    if chip.platform == 'cuda' or size == 1:
      return (size - 1) / size / rate(size)
    return size ** (1 / spans(size)) / 4 * spans(size) / rate(size)

  def exchange(tokens: tuple[float, float]) -> float:
    """Seconds to sum over `model` and to send over `expert`, in one pass."""
    sums = 2 * tokens[0] * layers[0] + 3 * tokens[1] * layers[1]
    routed = sum(t * n // model.moe.every(name) * 2 if model.moe.every(name) else 0
                 for t, n, name in zip(tokens, layers, ('encoder', 'decoder')))
    over = 2 * (mesh.model - 1) / mesh.model * sums / rate(mesh.model)
    return 2 * D * (over + routed * exchange_seconds(mesh.expert))

  if step != 'train':
    rows = config.infer.batch_size / parts
    tokens = (rows * S, 0.0) if step == 'encode' else (0.0, rows)
    cache = 0.0 if step == 'encode' else 4 * rows * layers[1] * (S + T) * model.num_heads * model.head_dim / mesh.model
    work = flops.inference_flops(model, step, config.infer.batch_size, S, T)
    hbm = (2 * local + cache) / chip.hbm_rate
    seconds = _together(work / slice_.count / chip.flops, hbm, exchange(tokens))
    return Estimate(config, 2 * local + cache + 8 * sum(tokens) * (D + F), seconds)

  param_rules, optimizer_rules = mesh_lib.STATE_RULES[mesh.sharding]
  count, full = config.train.microbatches, model.remat == 'full'
  r = config.train.batch_size / count / parts  # rows that a chip computes at a time
  tokens = (r * S, r * T)
  state = 4 * held(param_rules) + 8 * held(optimizer_rules)
  gradients = 4 * held(param_rules) * (2 if count > 1 else 1)
  kept = 2 * D * sum(t * n for t, n in zip(tokens, layers))
  if not full:
    outputs = (4 * model.num_heads * model.head_dim + 2 * F) / mesh.model + 2 * D
    kept += 2 * outputs * sum(t * n for t, n in zip(tokens, layers))
  working = 12 * r * (H * S * S + T * model.vocab_size) / mesh.model + 10 * max(tokens) * (D + F / mesh.model)
  gathered = 4 * local / max(sum(layers), 1) if mesh.sharding == 'full' else 0.0
  needed = state + gradients + kept + working + gathered

  work = flops.model_flops(model, config.train.batch_size * S, config.train.batch_size * T, S, T) * (4 / 3 if full else 1.05)
  if mesh.sharding == 'full':
    sent = count * 3 * 2 * local / rate(parts)
  else:
    sent = (8 if mesh.sharding == 'none' else 12) * local / rate(parts)
  sent += count * (3 if full else 2) * exchange(tokens)
  between = (6 * count if mesh.sharding == 'full' else 8) * local / (parts // slice_.slices)  # of a chip, to other slices
  sent += (slice_.slices - 1) / slice_.slices * between / chip.network_rate
  # Weights are read three times and gradients added up for each microbatch; activations pass about 30 times, the optimizer 7.
  moved = count * (6 * local + 8 * held(param_rules) + 60 * sum(t * n for t, n in zip(tokens, layers)) * D)
  moved += 28 * held(optimizer_rules)
  seconds = _together(work / slice_.count / chip.flops, sent, moved / chip.hbm_rate)
  missing, moments = needed - ROOM * chip.hbm, 8 * held(optimizer_rules)
  away = missing + max(missing - moments, 0)  # of a weight that is away, a copy of half its size stays
  if missing > 0 and away < moments + 4 * held(param_rules) and config.optimizer.name == 'adamw':
    gib = math.ceil(away / GiB)
    config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, host_gib=float(gib)))
    needed, seconds = ROOM * chip.hbm, seconds + 2 * gib * GiB / chip.host_rate
  return Estimate(config, needed, seconds)


def _sizes(config: Config) -> dict[tuple[tuple[str | None, ...], bool], int]:
  shapes, axes = encoder_decoder.build(config.model).abstract()
  sizes: dict[tuple[tuple[str | None, ...], bool], int] = {}
  names = jax.tree.leaves(axes, is_leaf=mesh_lib.is_names)
  for (path, leaf), leaf_names in zip(jax.tree_util.tree_leaves_with_path(shapes), names, strict=True):
    kind = leaf_names, 'experts' in jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    sizes[kind] = sizes.get(kind, 0) + math.prod(leaf.shape)
  return sizes


def ranked(config: Config, slice_: Slice, step: str) -> list[Estimate]:
  """Candidates that fit by their estimate, the fastest first; where none does, the smallest first.

  Raises:
    ConfigError: nothing divides the slice.
  """
  sizes = _sizes(config)
  found = [estimate(one, slice_, step, sizes) for one in candidates(config, slice_, step)]
  if not found:
    batch = 'TrainConfig.batch_size' if step == 'train' else 'InferConfig.batch_size'
    raise ConfigError(f'no mesh of the {slice_.count} chips of {slice_.name} divides the model and the batch: change {batch}.')
  fitting = [one for one in found if one.bytes <= ROOM * slice_.chip.hbm]
  # Of equals, fewer microbatches and less recomputation leave more room for what the estimate does not see.
  return sorted(fitting, key=lambda one: (one.seconds, one.bytes)) or sorted(found, key=lambda one: one.bytes)


def as_gin(config: Config) -> str:
  """What a search has chosen, as a gin file; and MeshConfig.slices, where there are several."""
  return ''.join(f'{cls}.{field} = {getattr(getattr(config, part), field)!r}\n'
                 for cls, (part, fields) in FIELDS.items() for field in fields if field != 'slices' or config.mesh.slices > 1)


def best(config: Config, slice_: Slice, step: str) -> tuple[Config, plan.Plan]:
  """Compiles the most promising candidates and returns the fastest that fits, or the one that comes nearest."""
  chips.devices(slice_)  # a slice that is not known, or a missing compiler, is told before the search
  order = ranked(config, slice_, step)
  print(f'{len(order)} candidates; compiling the best {min(TRIED, len(order))} by their estimates', flush=True)
  plans: list[tuple[Config, plan.Plan]] = []

  def attempt(config: Config, estimated: str = '') -> None:
    try:
      made = plan.make(config, slice_, step)
    except ConfigError as error:
      print(f'  {_line(config)}: {re.sub(r"[.] .*", "", str(error))}', flush=True)
      return
    plans.append((config, made))
    verdict = f'{made.step_seconds:.3g} s, {made.bound}' if made.fits else f'{made.missing_bytes / GiB:.1f} GiB too much'
    print(f'  {_line(config)}: {verdict}{estimated}', flush=True)

  def winner() -> tuple[Config, plan.Plan]:
    return min(plans, key=lambda pair: (not pair[1].fits, pair[1].missing_bytes, pair[1].step_seconds))

  seen: set[Any] = set()
  for one in order:
    mesh = one.config.mesh
    key = (mesh.data, mesh.model, mesh.expert, mesh.sharding if mesh.data * mesh.expert > 1 else 'none')
    if key not in seen and len(plans) < TRIED:  # the same mesh with other microbatches waits until the compiler has spoken
      seen.add(key)
      attempt(one.config, f' (estimate {one.seconds:.3g} s, {one.bytes / GiB:.1f} GiB)')
  if not plans:
    raise ConfigError(f'no mesh of {slice_.name} can split this model and batch.')
  config, made = winner()
  # Estimates ask for too many microbatches.
  while step == 'train' and made.fits and made.bound != 'compute' and config.train.microbatches % 2 == 0:
    attempt(dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=config.train.microbatches // 2)))
    if winner()[0] is config:
      break
    config, made = winner()
  return config, made


def _line(config: Config) -> str:
  mesh = config.mesh
  host = f', {mesh.host_gib:g} GiB in host memory' if mesh.host_gib else ''
  return (f'{mesh.data} x {mesh.model} x {mesh.expert} {mesh.sharding}, remat {config.model.remat}, '
          f'{config.train.microbatches} microbatches{host}')
