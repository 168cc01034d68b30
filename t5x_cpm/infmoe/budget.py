"""How the memory that a model may take is shared out."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from t5x_cpm import backend
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.infmoe.bundle import Bundle, Place

FIXED = 64 * 2**20  # bytes: small arrays, compiled programs
SHARE = 0.8  # of the memory that is free, where no limit is given


class Budget(NamedTuple):
  """How the memory is shared out.

  Attributes:
    staging: how many slots all layers share; 0: files are mapped.
    kept: how many experts each layer keeps.
    dense: bytes of weights other than those of experts.
    work: bytes of activations, caches of attention and the like, at most.
    slot: bytes of an expert.
  """

  staging: int
  kept: dict[Place, int]
  dense: int
  work: int
  slot: int

  @property
  def experts(self) -> int:
    """Bytes for experts."""
    return (self.staging + sum(self.kept.values())) * self.slot

  @property
  def held(self) -> str:
    """How many experts a layer of the decoder keeps, in words."""
    counts = [count for place, count in self.kept.items() if place.stack == 'decoder'] or [0]
    return f'{min(counts)} to {max(counts)}' if min(counts) < max(counts) else f'{counts[0]}'


def work_bytes(config: Config) -> int:
  """What a batch of InferConfig.batch_size rows takes beside weights, at most: float32 is assumed."""
  model, B = config.model, config.infer.batch_size * (config.decode.beam_size if config.decode.rule == 'beam' else 1)
  S, T = config.infer.input_length or config.task.encoder_length, config.decode.max_new_tokens
  heads = model.num_heads * model.head_dim
  cache = model.num_decoder_layers * B * (S + T) * heads * 2
  attention = 2 * config.infer.batch_size * model.num_heads * S * S
  activations = config.infer.batch_size * S * (8 * model.d_model + 3 * heads + 2 * model.d_ff)
  logits = 4 * B * model.vocab_size
  return 4 * (cache + max(attention + activations, logits)) + FIXED


def shared_out(count: int, places: Sequence[Place], experts: int) -> dict[Place, int]:
  """How many of `count` slots each layer keeps: the layers of the decoder first, evenly; what is left goes to the encoder's."""
  kept = dict.fromkeys(places, 0)
  for stack in ('decoder', 'encoder'):
    mine = [place for place in places if place.stack == stack]
    for number, place in enumerate(mine):
      kept[place] = min(experts, count // len(mine) + (number < count % len(mine)))
    count -= sum(kept[place] for place in mine)
  return kept


def share(config: Config, places: Sequence[Place], dense: int, slot: int, memory: float) -> Budget:
  """How so many bytes of memory are shared out.

  Args:
    config: OffloadConfig, and what a batch is.
    places: the layers with experts.
    dense: bytes of weights other than those of experts.
    slot: bytes of an expert.
    memory: what there is.

  Raises:
    ConfigError: it is not enough; says the least that is.
  """
  work = work_bytes(config)
  least, count = dense + work + 2 * slot, math.floor((memory - dense - work) / slot)
  if count < 2:
    raise ConfigError(
        f'OffloadConfig.memory_gib = {memory / GiB:.3g}: the model needs at least {math.ceil(1000 * least / GiB) / 1000:.3f}: '
        f'{dense / GiB:.2f} GiB of weights that are no experts, {work / GiB:.2f} for a batch (fewer with a smaller InferConfig.'
        f'batch_size or input_length), and two experts of {slot / GiB:.2g}.')
  staging = min(config.offload.staging, count)
  return Budget(staging, shared_out(count - staging, places, config.model.moe.num_experts), dense, work, slot)


def choose(bundle: Bundle, config: Config, dense: int) -> Budget:
  """How a bundle is run.

  Args:
    bundle: what is run.
    config: the run's, with OffloadConfig and what a batch is.
    dense: bytes of weights other than those of experts.

  Raises:
    ConfigError: the memory is not enough, which says the least that is; or the machine has less.
  """
  given, free = config.offload, backend.free_memory()
  slot, _ = bundle.block(bundle.places[0])
  fits = bundle.size + work_bytes(config) < SHARE * free
  if given.store == 'mapped' or (given.store == 'auto' and not given.memory_gib and fits):
    return Budget(0, {}, dense, work_bytes(config), slot)
  if given.memory_gib * GiB > free:
    raise ConfigError(f'OffloadConfig.memory_gib = {given.memory_gib}: {free / GiB:.2f} GiB are free on this machine.')
  return share(config, bundle.places, dense, slot, given.memory_gib * GiB or SHARE * free)


def tell(budget: Budget, bundle: Bundle, config: Config) -> None:
  """Says where experts are, and why, on standard error."""
  size = bundle.size / GiB
  if not budget.staging:
    text = f'mapped, {size:.3g} GiB' + (', which fits in memory' if config.offload.store == 'auto' else '')
  else:
    why = 'memory_gib is given' if config.offload.memory_gib else 'the bundle does not fit in memory'
    text = (f'in {budget.experts / GiB:.3g} GiB of slots ({why}; the bundle has {size:.3g}): {budget.staging} for all layers, '
            f'{budget.held} of {config.model.moe.num_experts} kept by each layer of the decoder')
  print(f'experts: {text}; other weights {budget.dense / GiB:.3g} GiB, a batch at most {budget.work / GiB:.3g}',
        file=sys.stderr, flush=True)
