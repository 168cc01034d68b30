"""What a model with experts will need on a machine, and how fast it will answer there, from sizes and rates alone.

A token reads the experts that it goes to, a batch those that any of its tokens goes to: with E experts of which each token
passes k, evenly spread, B tokens need E (1 - (1 - k/E)^B) of them. Of those, a layer that keeps some has their share; the rest
is read. Reading and computing are two machines that the experts of a layer pass one after the other (see `run.in_order`);
a layer cannot begin to read before its router has spoken.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from t5x_cpm import backend
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.infmoe import budget as budget_lib
from t5x_cpm.infmoe import bundle
from t5x_cpm.infmoe import machine as machine_lib
from t5x_cpm.infmoe.bundle import Place, place_of
from t5x_cpm.infmoe.machine import Machine
from t5x_cpm.infmoe.run import Pace
from t5x_cpm.models import encoder_decoder, routers
from t5x_cpm.models.layer import Layer

BATCHES = 1, 8, 64
NOTICED = 1.05  # a ratio of rates, below which a change is not worth naming


class Sizes(NamedTuple):
  """What a model takes, from its description.

  Attributes:
    model: it.
    bundle: bytes of all files.
    dense: of weights that are no experts, as they lie in memory.
    slot: of an expert, whole pages.
    layers: by place, bytes of the weights of layers but for their experts.
  """

  model: encoder_decoder.Model
  bundle: int
  dense: int
  slot: int
  layers: dict[Place, int]


def sizes_of(config: Config) -> Sizes:
  """The sizes of a model. Raises ConfigError where it has no experts, or cannot be stored as OffloadConfig says."""
  if not config.model.moe.num_experts:
    raise ConfigError('plan is for a model with experts (MoEConfig.num_experts), and this one is dense: `infer` loads it as a '
                      'whole, for which `compile --step=decode` says what it takes.')
  model = encoder_decoder.build(config.model)
  laid_out = bundle.layout(model, config.offload)
  total = sum(len(header) + sum(entry.kind.nbytes for entry in entries.values()) for header, entries in laid_out.values())
  places = {place_of(layer) for stack in model.stacks for layer in model.layers[stack]}
  layers = {place: sum(entry.kind.nbytes for entry in laid_out[place.file][1].values() if entry.leaf and not entry.expert)
            for place in places}
  rest = sum(entry.kind.nbytes for entry in laid_out[bundle.REST][1].values() if entry.leaf)
  entries = next(entries for _, entries in laid_out.values() if any(entry.expert for entry in entries.values()))
  slot = sum(entry.kind.nbytes for name, entry in entries.items() if name.startswith('experts/0/'))
  return Sizes(model, total, rest + sum(layers.values()), -(-slot // bundle.PAGE) * bundle.PAGE, layers)


class Time(NamedTuple):
  """Seconds of a pass through a stack, and what they go into."""

  total: float
  reading: float
  weights: float
  arithmetic: float
  host: float

  @property
  def bound(self) -> str:
    """What takes most of it."""
    parts = {'disk': self.reading, 'memory': self.weights, 'arithmetic': self.arithmetic, 'calls of programs': self.host}
    return max(parts, key=lambda name: parts[name])


NOTHING = Time(0.0, 0.0, 0.0, 0.0, 0.0)


def distinct(experts: int, chosen: float, tokens: float) -> float:
  """How many experts any of so many tokens goes to, where all are as likely."""
  return experts * (1 - (1 - chosen / experts)**tokens)


def _pass(config: Config, sizes: Sizes, machine: Machine, kept: dict[Place, int], stack: str, tokens: int,
          context: int) -> Time:
  """One pass of a stack.

  Args:
    config, sizes, machine: of what runs where.
    kept: how many experts each layer has in memory.
    stack: 'encoder' or 'decoder'.
    tokens: how many pass together.
    context: how many others each attends to.
  """
  model, given = config.model, config.offload
  E, chosen = model.moe.num_experts, routers.experts_of_token(model.moe, stack)
  D, F, heads = model.d_model, model.d_ff, model.num_heads * model.head_dim
  matrices = 4 if stack == 'encoder' else 6  # that a token passes: the keys and values of the encoder's output are at hand
  total = reading = weights = arithmetic = 0.0
  layers: list[Layer] = list(sizes.model.layers[stack])
  for layer in layers:
    place = place_of(layer)
    dense, rate = sizes.layers[place], machine.weights[given.dense_format]
    attention = 2 * tokens * (matrices * D * heads + 2 * context * heads)
    width = F * (model.moe.shared_experts if layer.routed else 1)
    operations = attention + 2 * tokens * 3 * D * width
    at_least = dense / rate, operations / machine.products[given.dense_format]
    first = max(at_least)
    weights, arithmetic = weights + at_least[0], arithmetic + at_least[1]
    second = 0.0
    if layer.routed:
      needed = distinct(E, chosen, tokens)
      missing = needed * (1 - kept.get(place, 0) / E)
      load = sizes.slot / machine.disk
      share = tokens * chosen / needed  # of the tokens, to each
      one = sizes.slot / machine.weights[given.format], 2 * share * 3 * D * F / machine.products[given.format]
      compute = max(one)
      second = max(missing * load + compute, min(load, missing * load) + needed * compute)
      reading += missing * load
      weights, arithmetic = weights + needed * one[0], arithmetic + needed * one[1]
    total += first + second + machine.call
  if stack == 'decoder':  # the logits
    head = D * model.vocab_size
    at_least = 4 * head / machine.weights['float32'], 2 * tokens * head / machine.products['float32']
    weights, arithmetic, total = weights + at_least[0], arithmetic + at_least[1], total + max(at_least)
  return Time(total, reading, weights, arithmetic, machine.call * len(layers))


class Row(NamedTuple):
  """What is expected for a number of inputs at once.

  Attributes:
    batch: how many.
    inputs: tokens of each.
    budget: how the memory is shared out then; None: it is too little for so many.
    encoder, decoder: seconds of a pass of the encoder over all of them, and of a token of each.
  """

  batch: int
  inputs: int
  budget: budget_lib.Budget | None
  encoder: Time
  decoder: Time

  @property
  def encoder_rate(self) -> float:
    """Tokens of the encoder a second."""
    return self.batch * self.inputs / self.encoder.total

  @property
  def decoder_rate(self) -> float:
    """Tokens of the decoder a second."""
    return self.batch / self.decoder.total


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a model will run.

  Attributes:
    config: of the model.
    sizes: what it takes.
    rows: what is expected for numbers of inputs, of which the first fits.
  """

  config: Config
  sizes: Sizes
  rows: list[Row]


def make(config: Config, machine: Machine, batches: tuple[int, ...] = BATCHES) -> Plan:
  """The plan of a model on a machine.

  Args:
    config: ModelConfig; OffloadConfig with memory_gib; InferConfig.input_length, or the encoder_length of the task.
    machine: its rates.
    batches: for which numbers of inputs at once.

  Raises:
    ConfigError: the memory is not enough, or the model cannot be stored so.
  """
  sizes = sizes_of(config)
  inputs = config.infer.input_length or config.task.encoder_length
  layers = (layer for stack in sizes.model.stacks for layer in sizes.model.layers[stack] if layer.routed)
  places = list(dict.fromkeys(map(place_of, layers)))
  rows = []
  for batch in batches:
    of_batch = dataclasses.replace(config, infer=dataclasses.replace(config.infer, batch_size=batch))
    try:
      budget = budget_lib.share(of_batch, places, sizes.dense, sizes.slot, config.offload.memory_gib * GiB)
    except ConfigError:
      if batch == batches[0]:
        raise
      rows.append(Row(batch, inputs, None, NOTHING, NOTHING))
      continue
    encoder = _pass(of_batch, sizes, machine, budget.kept, 'encoder', batch * inputs, inputs)
    decoder = _pass(of_batch, sizes, machine, budget.kept, 'decoder', batch, inputs + config.decode.max_new_tokens // 2)
    rows.append(Row(batch, inputs, budget, encoder, decoder))
  return Plan(config, sizes, rows)


def changes(config: Config, machine: Machine) -> list[tuple[str, float]]:
  """What one might change, and by how much tokens of the decoder would come faster at one input; the best first."""
  def rate(of: Config, on: Machine) -> float:
    return make(of, on, (1,)).rows[0].decoder_rate

  def offload(**fields: Any) -> Config:
    return dataclasses.replace(config, offload=dataclasses.replace(config.offload, **fields))

  given, now = config.offload, rate(config, machine)
  found = [(f'twice the memory (memory_gib = {2 * given.memory_gib:g})', offload(memory_gib=2 * given.memory_gib), machine),
           ('a disk that is twice as fast', config, dataclasses.replace(machine, disk=2 * machine.disk))]
  smaller = {'float32': 'int8', 'bfloat16': 'int8', 'int8': 'int4'}
  for field in ('format', 'dense_format'):
    if (other := smaller.get(getattr(given, field))) in machine.weights:
      found.append((f"OffloadConfig.{field} = '{other}'", offload(**{field: other}), machine))
  return sorted(((text, rate(of, on) / now) for text, of, on in found), key=lambda change: -change[1])


def tell(plan: Plan, machine: Machine) -> None:
  """Prints a plan."""
  config, sizes, budget = plan.config, plan.sizes, plan.rows[0].budget
  assert budget is not None
  given, E = config.offload, config.model.moe.num_experts
  least = sizes.dense + budget.work + 2 * sizes.slot
  print(f'bundle            {sizes.bundle / GiB:.3g} GiB: experts of {sizes.slot / 2**20:.3g} MiB as {given.format}, other '
        f'weights {sizes.dense / GiB:.3g} GiB, as {given.dense_format} where they belong to layers')
  print(f'memory            {given.memory_gib:g} GiB: other weights, {budget.work / GiB:.2g} for one input, '
        f'{budget.experts / GiB:.3g} for experts: {budget.staging} on their way, and {budget.held} of {E} kept by each layer '
        f'of the decoder; at least {math.ceil(100 * least / GiB) / 100:g} would do')
  print(f'machine           {machine.about}: disk {machine.disk / 1e9:.2g} GB/s, weights '
        + ', '.join(f'{name} {rate / 1e9:.3g} GB/s' for name, rate in machine.weights.items()
                    if name in (given.format, given.dense_format)))
  print(f'inputs at once    encoder ({plan.rows[0].inputs} tokens each)        decoder')
  for row in plan.rows:
    if row.budget is None:
      print(f'{row.batch:>14}    too many for this memory')
      continue
    print(f'{row.batch:>14}    {row.encoder_rate:>8.3g} tokens/s, {row.encoder.bound:<14}'
          f' {row.decoder_rate:>8.3g} tokens/s, {row.decoder.bound}')
  text, ratio = changes(config, machine)[0]
  if ratio < NOTICED:
    text = 'neither more memory nor a faster disk nor fewer bits: each gives less than 5 % more tokens a second'
  else:
    text = f'{text}: {ratio:.2g} times as many tokens of the decoder a second for one input'
  print(f'what helps most   {text}')


def run(config: Config, folder: pathlib.Path, *, disk: float = 0.0, measured: bool = False) -> None:
  """Prints the plan of a model on this machine, or on one that is described.

  Args:
    config: of the model; OffloadConfig.memory_gib = 0 is what is free on this machine.
    folder: on the disk that experts would be read from.
    disk: its rate in GB/s; 0: as it was measured, or assumed.
    measured: measure this machine first.
  """
  sizes_of(config)  # a mistake is told before anything is measured
  machine = machine_lib.measure(config, folder) if measured else machine_lib.known()
  if disk:
    machine = dataclasses.replace(machine, disk=1e9 * disk)
  if not config.offload.memory_gib:
    memory = round(budget_lib.SHARE * backend.free_memory() / GiB, 2)
    config = dataclasses.replace(config, offload=dataclasses.replace(config.offload, memory_gib=memory))
  tell(make(config, machine), machine)


def compared(config: Config, pace: Mapping[str, Pace]) -> str:
  """How fast the stacks of a model were, beside the plan for as many inputs and tokens on this machine; in a line."""
  machine, told = machine_lib.known(), []
  encoder, decoder = pace['encoder'], pace['decoder']
  if not encoder.passes or not decoder.passes:
    return ''
  batch = max(round(decoder.tokens / decoder.passes), 1)
  inputs = max(round(encoder.tokens / encoder.passes / batch), 1)
  if not config.offload.memory_gib:  # mapped, or what was free
    memory = budget_lib.SHARE * backend.free_memory() / GiB
    config = dataclasses.replace(config, offload=dataclasses.replace(config.offload, memory_gib=memory))
  try:
    infer = dataclasses.replace(config.infer, input_length=inputs)
    row = make(dataclasses.replace(config, infer=infer), machine, (batch,)).rows[0]
    planned = {'encoder': row.encoder_rate, 'decoder': row.decoder_rate}
  except (ConfigError, KeyError):  # a machine that was measured for other formats
    planned = {}
  for stack, one in pace.items():
    told.append(f'{stack} {one.tokens / one.seconds:.3g} tokens/s' +
                (f' ({planned[stack]:.3g} planned)' if planned else ''))
  return f'{", ".join(told)}, {batch} at once; the plan is for a machine {machine.about}'
