"""Compiles a step for a slice and says what that shows: bytes of a chip, collectives, and a bound on the time of a step.

The bound is a roofline: it assumes that arithmetic, memory, interconnect and host transfers overlap perfectly, and that each
runs at its full rate.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from t5x_cpm import backend
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.chips import GiB
from t5x_cpm.compile import program, slices
from t5x_cpm.compile.slices import Slice
from t5x_cpm.config import Config
from t5x_cpm.inference import programs
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import flops, guidance, teachers
from t5x_cpm.training import step as step_lib

STEPS = ('train', 'encode', 'decode')
# What the compiler says when a step does not fit, in two of its releases: how much is needed, and how much there is.
TOO_MUCH = r'(?:Used |memory required.*?\()([\d.]+[TGMK])(?: of |\) exceeds available HBM \()([\d.]+[TGMK])'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What compiling a step for a slice shows. Bytes are those of one chip, seconds those of one step."""

  topology: str
  step: str
  mesh: dict[str, Any]
  fits: bool
  missing_bytes: float  # by which the step is too large; 0 if it fits
  argument_bytes: float  # parameters, optimizer state, batch, cache
  temporary_bytes: float
  host_bytes: float
  tokens: float  # that a step computes if no slot is padding; for `decode`, one for each row
  parameters: int
  active_parameters: int
  model_flops: float  # arithmetic that the model needs, all chips together
  six_nd: float  # 6 ND, the usual estimate of model_flops without the products within attention
  executed_flops: float  # arithmetic of the program, including what it computes again
  hbm_bytes: float  # read from and written to the memory of a chip
  collectives: dict[str, dict[str, float]]  # kind -> times, bytes that a chip sends, seconds
  seconds: dict[str, float]  # of the terms 'compute', 'memory', 'interconnect' and 'host'
  compile_seconds: float

  @property
  def bound(self) -> str:
    """The term that takes longest, and so bounds the time of a step from below."""
    return max(self.seconds, key=lambda term: self.seconds[term])

  @property
  def step_seconds(self) -> float:
    return self.seconds[self.bound]

  def mfu(self, slice_: Slice) -> float:
    """The best possible model FLOP/s utilisation: the share of the slice's peak that the model's own arithmetic reaches."""
    return self.model_flops / (slice_.count * slice_.chip.flops * self.step_seconds)


def _inference(config: Config, mesh: Any, step: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """The function of a decoding step or of the encoder, as inference runs it, and its abstract arguments."""
  functions = programs.build(config, mesh)
  return functions.encode if step == 'encode' else functions.step, functions.abstract_arguments(step)


def _size(text: str) -> float:
  """Bytes of a size as the compiler writes it, such as '33.08G'."""
  return float(text[:-1]) * {'T': 2**40, 'G': GiB, 'M': 2**20, 'K': 2**10}[text[-1]]


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says about a step, in bytes of one chip. It gives no sizes for a step that is too large: they are 0."""

  missing: float  # by which the step is too large; 0 if the compiler accepts it
  arguments: float = 0.0
  temporaries: float = 0.0
  host: float = 0.0  # arguments that lie in the memory of the host
  text: program.Program | None = None


def _compile(traced: Any) -> Compiled:
  """Compiles a traced step. The program comes from the compiler's dump, which is there even if the step is too large."""
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
    read = program.Program(texts[-1].read_text()) if texts else None
  if memory is None:
    return Compiled(missing, text=read)
  return Compiled(missing, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
                  float(memory.host_argument_size_in_bytes), read)


def _token_slots(config: Config, step: str) -> tuple[int, int]:
  """How many slots of encoder rows and of decoder rows a step computes for the whole batch."""
  S, T = config.task.encoder_length, config.task.decoder_length
  if step == 'train':
    return config.train.batch_size * S, config.train.batch_size * T
  return (config.infer.batch_size * S, 0) if step == 'encode' else (0, config.infer.batch_size)


def _needed(config: Config, step: str) -> float:
  """Floating-point operations that the model needs for a step, all chips together."""
  S, T = config.task.encoder_length, config.task.decoder_length
  if step == 'train':
    return flops.model_flops(config.model, *_token_slots(config, step), S, T, frozen=config.delta.frozen)
  return flops.inference_flops(config.model, step, config.infer.batch_size, S, T)


def _of_teacher(config: Config, teacher: guidance.Teacher) -> float:
  """Floating-point operations of the passes of teachers, all chips together."""
  S, T = config.task.encoder_length, config.task.decoder_length
  return sum((flops.forward_flops(one, *_token_slots(config, 'train'), S, T) for one in guidance.models(teacher)), 0.0)


def _passed(model: encoder_decoder.Model) -> tuple[float, float]:
  """How many parameters a token of the encoder passes, and a token of the decoder: the N of 6 ND.

  What makes keys and values of cross-attention is the decoder's, but encoder tokens pass it.
  """
  passed = {'encoder': 0.0, 'decoder': 0.0}
  for leaf in jax.tree.leaves(model.leaves()):
    if leaf.axes[:1] == ('vocab',) and not model.config.tie_embeddings:
      continue  # the embedding is only looked up, unless it is also the head
    # The head belongs to no stack, and decoder tokens pass it.
    passed[leaf.stack or 'decoder'] += model.share(leaf) * model.uses(leaf) * leaf.size
  config = model.config
  cross = config.num_decoder_layers * 2 * config.d_model * config.num_heads * config.head_dim
  return passed['encoder'] + cross, passed['decoder'] - cross


def six_nd(model: encoder_decoder.Model, slots: tuple[int, int]) -> float:
  """6 ND summed over both stacks: N parameters that a token passes, D tokens. Products within attention are not in it."""
  return 6.0 * sum(N * n for N, n in zip(_passed(model), slots, strict=True))


def _seconds_of(one: program.Collective, coordinates: Any, slice_: Slice) -> float:
  """Seconds that all runs of one collective of the program take, over the links that its group spans.

  Args:
    one: the collective.
    coordinates: of every device of the mesh [n, dimensions].
    slice_: the slice of these devices.
  """
  sent = one.times * one.sent
  if one.kind == 'between slices':
    return sent / slice_.chip.network_rate
  group = coordinates[list(one.group)]
  if one.kind == 'collective-permute':  # to a neighbour, over one link
    return sent / min(slice_.chip.link_rate, slice_.rate(group))
  if one.kind.endswith('all-to-all') and len(one.group) > 1:  # passed on from chip to chip
    held = sent * len(one.group) / (len(one.group) - 1)  # `sent` leaves out the part that stays
    return held * slice_.exchange_seconds(group)
  return sent / slice_.rate(group)


def collectives_by_kind(found: list[program.Collective], mesh: Any, slice_: Slice) -> dict[str, dict[str, float]]:
  """How often collectives of each kind run, how many bytes each chip sends for them, and how many seconds that takes.

  Args:
    found: the collectives of a program.
    mesh: the mesh that it was compiled for; groups index its devices.
    slice_: the slice of these devices.
  """
  coordinates = slice_.coordinates(mesh.devices.ravel())
  neighbours: dict[tuple[int, ...], float] = collections.defaultdict(float)
  kinds: dict[str, dict[str, float]] = collections.defaultdict(lambda: {'times': 0, 'bytes': 0.0, 'seconds': 0.0})
  for one in found:
    total, seconds = kinds[one.kind], _seconds_of(one, coordinates, slice_)
    total['times'] += one.times
    total['bytes'] += one.times * one.sent
    total['seconds'] += seconds
    if one.kind == 'collective-permute':  # different neighbours are reached over different links, at the same time
      neighbours[one.group] += seconds
      total['seconds'] = max(neighbours.values())
  return dict(kinds)


def make(config: Config, slice_: Slice, step: str = 'train') -> Plan:
  """Compiles a step for a slice. Needs the compiler of its platform but no chip; takes minutes for billions of parameters.

  Args:
    config: model, mesh, lengths and batch sizes; InferConfig.batch_size for inference.
    slice_: the chips to compile for.
    step: 'train', or 'encode', or 'decode' for one token of each row.

  Raises:
    ConfigError: the compiler is missing, the slice is unknown, or the mesh cannot split the model and the batch.
  """
  started, chip = time.monotonic(), slice_.chip
  teacher = teachers.model_of(config) if step == 'train' else None
  with backend.compiling_for(chip.platform):
    mesh = mesh_lib.make_mesh(config.mesh, slices.devices(slice_))
    if step == 'train':
      built = step_lib.build(config, mesh, teacher=teacher)
      fn: Any = built.fn
      arguments: tuple[Any, ...] = (built.abstract_state, built.abstract_frozen, built.abstract_batch)
    else:
      fn, arguments = _inference(config, mesh, step)
    traced = fn.trace(*arguments)
    executed = program.arithmetic(traced.jaxpr.jaxpr)
    compiled = _compile(traced)
  read = compiled.text
  collectives = collectives_by_kind(read.collectives(slice_.slices), mesh, slice_) if read else {}
  hbm = read.hbm_bytes() if read else 0.0
  left = chip.hbm - compiled.arguments - compiled.temporaries
  model, slots = encoder_decoder.build(config.model), _token_slots(config, step)
  return Plan(
      topology=slice_.title, step=step, mesh=dict(mesh.shape) | {'sharding': config.mesh.sharding},
      fits=not compiled.missing and left >= 0, missing_bytes=compiled.missing or max(-left, 0.0),
      argument_bytes=compiled.arguments, temporary_bytes=compiled.temporaries, host_bytes=compiled.host,
      tokens=float(sum(slots)), parameters=model.num_parameters(), active_parameters=model.num_active_parameters(),
      model_flops=_needed(config, step) + _of_teacher(config, teacher), six_nd=six_nd(model, slots),
      executed_flops=executed, hbm_bytes=hbm, collectives=collectives,
      seconds={'compute': executed / (slice_.count * chip.flops), 'memory': hbm / chip.hbm_rate,
               'interconnect': sum(kind['seconds'] for kind in collectives.values()), 'host': compiled.host / chip.host_rate},
      compile_seconds=time.monotonic() - started)
