"""Compiling a step for a slice, and what that says: bytes per chip, collectives, and a bound on the time of a step.

The bound is a roofline: as if arithmetic, memory and interconnect overlapped perfectly, and each ran at its full rate.
"""

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from t5x_cpm import backend
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.compile import chips, program
from t5x_cpm.compile.chips import GiB, Slice
from t5x_cpm.config import Config
from t5x_cpm.inference import programs
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import flops
from t5x_cpm.training import step as step_lib

STEPS = ('train', 'encode', 'decode')
# The compiler's words for what is needed and what there is, in two of its releases.
TOO_MUCH = r'(?:Used |memory required.*?\()([\d.]+[TGMK])(?: of |\) exceeds available HBM \()([\d.]+[TGMK])'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What compiling a step for a slice says. Bytes are of one chip, seconds of one step."""

  topology: str
  step: str
  mesh: dict[str, Any]
  fits: bool
  missing_bytes: float  # by which it does not fit
  argument_bytes: float  # parameters, optimizer state, batch, cache
  temporary_bytes: float
  host_bytes: float
  tokens: float  # slots of a step with all that is not padding; of `decode`, one for each row
  parameters: int
  active_parameters: int
  model_flops: float  # that the model needs; all chips
  six_nd: float  # 6 times parameters that a token passes, times tokens, over both stacks: all but attention's own products
  executed_flops: float  # with what is computed again
  hbm_bytes: float
  collectives: dict[str, dict[str, float]]  # kind -> times, bytes that a chip sends, seconds
  seconds: dict[str, float]  # by term
  compile_seconds: float

  @property
  def bound(self) -> str:
    return max(self.seconds, key=lambda term: self.seconds[term])

  @property
  def step_seconds(self) -> float:
    return self.seconds[self.bound]

  def mfu(self, slice_: Slice) -> float:
    """The share of the slice's peak that the model's arithmetic has, at most."""
    return self.model_flops / (slice_.count * slice_.chip.flops * self.step_seconds)


def _inference(config: Config, mesh: Any, step: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """The function of a decoding step or of the encoder, as inference runs it, and its abstract arguments."""
  functions = programs.build(config, mesh)
  return functions.encode if step == 'encode' else functions.step, functions.abstract_arguments(step)


def make(config: Config, slice_: Slice, step: str = 'train') -> Plan:
  """Compiles a step for a slice. Needs libtpu, no TPU; minutes for models of billions.

  Args:
    config: model, mesh, lengths and batch sizes; of inference InferConfig.batch_size.
    slice_: to compile for.
    step: 'train', or the 'decode' step of one token a row, or 'encode'.

  Raises:
    ConfigError: libtpu is missing, the slice unknown, or the model and batch cannot be split over the mesh.
  """
  started = time.monotonic()
  with backend.compiling_for(slice_.chip.platform):
    mesh = mesh_lib.make_mesh(config.mesh, chips.devices(slice_))
    if step == 'train':
      built = step_lib.build(config, mesh)
      fn: Any = built.fn
      arguments: tuple[Any, ...] = (built.abstract_state, {}, built.abstract_batch)
    else:
      fn, arguments = _inference(config, mesh, step)
    traced = fn.trace(*arguments)
    executed = program.arithmetic(traced.jaxpr.jaxpr)
    with tempfile.TemporaryDirectory(prefix='t5x_cpm-') as folder:
      try:
        with backend.quiet():
          memory = traced.lower().compile(compiler_options={'xla_dump_to': folder}).memory_analysis()
        missing = 0.0
      except jax.errors.JaxRuntimeError as error:
        used = re.search(TOO_MUCH, str(error))
        if used is None:
          raise
        memory, missing = None, _size(used[1]) - _size(used[2])
      texts = sorted(pathlib.Path(folder).glob('*after_optimizations.txt'), key=lambda path: path.stat().st_size)
      compiled = program.Program(texts[-1].read_text()) if texts else None
  arguments_bytes, temporary = (memory.argument_size_in_bytes, memory.temp_size_in_bytes) if memory else (0.0, 0.0)
  host = float(memory.host_argument_size_in_bytes) if memory else 0.0
  S, T = config.task.encoder_length, config.task.decoder_length
  model = encoder_decoder.build(config.model)
  if step == 'train':
    counts = config.train.batch_size * S, config.train.batch_size * T
  else:
    counts = (config.infer.batch_size * S, 0) if step == 'encode' else (0, config.infer.batch_size)
  tokens = float(sum(counts))
  needed = (flops.model_flops(config.model, *counts, S, T) if step == 'train' else
            flops.inference_flops(config.model, step, config.infer.batch_size, S, T))
  collectives = _by_kind(compiled.collectives(slice_.slices), mesh, slice_) if compiled else {}
  hbm = compiled.hbm_bytes() if compiled else 0.0
  seconds = {
      'compute': executed / (slice_.count * slice_.chip.flops), 'memory': hbm / slice_.chip.hbm_rate,
      'interconnect': sum(kind['seconds'] for kind in collectives.values()), 'host': host / slice_.chip.host_rate}
  left = slice_.chip.hbm - arguments_bytes - temporary
  return Plan(
      topology=slice_.title, step=step, mesh=dict(mesh.shape) | {'sharding': config.mesh.sharding},
      fits=not missing and left >= 0, missing_bytes=missing or max(-left, 0.0), argument_bytes=arguments_bytes,
      temporary_bytes=temporary, host_bytes=host,
      tokens=tokens, parameters=model.num_parameters(), active_parameters=model.num_active_parameters(), model_flops=needed,
      six_nd=6.0 * sum(N * n for N, n in zip(_passed(model), counts, strict=True)),
      executed_flops=executed, hbm_bytes=hbm, collectives=collectives, seconds=seconds,
      compile_seconds=time.monotonic() - started)


def _passed(model: encoder_decoder.Model) -> tuple[float, float]:
  """Parameters that a token of the encoder passes, and one of the decoder."""
  passed, moe = [0.0, 0.0], model.config.moe
  for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract()[0]):
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    share = 1.0
    if names[0] == 'token_embedder' and not model.config.tie_embeddings:
      continue  # looked up, not multiplied
    if names[0] == 'experts' and names[1] in encoder_decoder.STACKS and moe.every(names[1]):
      share = moe.experts_of_token(moe.of(names[1])) / moe.num_experts
    passed['encoder' not in '/'.join(names[:2])] += share * math.prod(leaf.shape)
  return passed[0], passed[1]


def _size(text: str) -> float:
  return float(text[:-1]) * {'T': 2**40, 'G': GiB, 'M': 2**20, 'K': 2**10}[text[-1]]


def _by_kind(found: list[program.Collective], mesh: Any, slice_: Slice) -> dict[str, dict[str, float]]:
  coordinates = slice_.coordinates(mesh.devices.ravel())
  neighbours: dict[tuple[int, ...], float] = collections.defaultdict(float)
  kinds: dict[str, dict[str, float]] = collections.defaultdict(lambda: {'times': 0, 'bytes': 0.0, 'seconds': 0.0})
  for one in found:
    total = kinds[one.kind]
    total['times'] += one.times
    total['bytes'] += one.times * one.sent
    if one.kind == 'between slices':
      total['seconds'] += one.times * one.sent / slice_.chip.network_rate
    elif one.kind == 'collective-permute':  # to a neighbour, over one link; those to another neighbour take another link
      neighbours[one.group] += one.times * one.sent / min(slice_.chip.link_rate, slice_.rate(coordinates[list(one.group)]))
      total['seconds'] = max(neighbours.values())
    elif one.kind.endswith('all-to-all') and len(one.group) > 1:  # from chip to chip, through those between them
      held = one.sent * len(one.group) / (len(one.group) - 1)
      total['seconds'] += one.times * held * slice_.exchange_seconds(coordinates[list(one.group)])
    else:
      total['seconds'] += one.times * one.sent / slice_.rate(coordinates[list(one.group)])
  return dict(kinds)


def advice(plan: Plan, config: Config) -> list[str]:
  """What to change, most effective first, when a step does not fit or is bound by other than compute."""
  lines = []
  if not plan.fits:
    if plan.step == 'train':
      if config.mesh.sharding != 'full':
        lines.append("MeshConfig.sharding = 'full' splits parameters and optimizer state over all chips of `data` and `expert`")
      if config.model.remat != 'full':
        lines.append("ModelConfig.remat = 'full' keeps the inputs of layers only")
      lines.append(f'TrainConfig.microbatches = {2 * config.train.microbatches} halves the activations')
      if config.mesh.host_gib == 0:
        lines.append(f"MeshConfig.host_gib = {math.ceil(plan.missing_bytes / GiB)} keeps so much of the optimizer's state in "
                     "the memory of the hosts; beyond that, twice as much for weights")
    else:
      lines.append('a larger MeshConfig.model splits the parameters, a smaller InferConfig.batch_size the cache')
    lines.append('a larger slice')
  elif plan.step == 'train' and plan.bound == 'interconnect':
    if config.train.microbatches > 1:
      lines.append(f'TrainConfig.microbatches = {config.train.microbatches // 2}: parameters are gathered once for each')
    lines.append('a larger TrainConfig.batch_size, or another mesh: --search')
  elif plan.step == 'train' and plan.bound == 'memory':
    lines.append('fewer microbatches, or a larger TrainConfig.batch_size')
  return lines


def show(plan: Plan, config: Config, slice_: Slice) -> None:
  """Prints a plan."""
  used = plan.argument_bytes + plan.temporary_bytes
  sizes = ' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items() if axis != 'sharding')
  print(f'{plan.topology}  {slice_.count} chips as {sizes}, sharding {plan.mesh["sharding"]!r}; compiled in '
        f'{plan.compile_seconds:.0f} s')
  if plan.fits:
    print(f'memory of a chip  {plan.argument_bytes / GiB:.2f} GiB arguments + {plan.temporary_bytes / GiB:.2f} temporaries, '
          f'{(slice_.chip.hbm - used) / GiB:.2f} of {slice_.chip.hbm / GiB:.2f} left'
          + (f'; {plan.host_bytes / GiB:.2f} GiB in host memory' if plan.host_bytes else ''))
  else:
    print(f'memory of a chip  DOES NOT FIT: {plan.missing_bytes / GiB:.2f} GiB too much for {slice_.chip.hbm / GiB:.2f}')
  print(f'arithmetic        {plan.model_flops:.3g} FLOPs for {plan.tokens:,.0f} tokens, {plan.executed_flops:.3g} with what is '
        'computed again' + (f'; 6ND is {plan.six_nd:.3g}' if plan.step == 'train' else ''))
  for kind, total in sorted(plan.collectives.items(), key=lambda item: -item[1]['seconds']):
    print(f'  {kind:<18}{total["times"]:>9,.0f} times, {total["bytes"] / 1e9:>9.3f} GB sent by each chip, '
          f'{total["seconds"] * 1e3:>9.2f} ms')
  print('time of a step    at least ' + ', '.join(
      f'{term} {seconds * 1e3:.2f} ms' for term, seconds in plan.seconds.items() if seconds) + f': bound by {plan.bound}')
  rate = plan.tokens / plan.step_seconds
  print(f'at most           {plan.mfu(slice_):.1%} MFU, {rate:,.0f} tokens/s, {rate * 86400 / 1e9:,.2f} billion tokens a day')
  for line in advice(plan, config):
    print(f'  try: {line}')
