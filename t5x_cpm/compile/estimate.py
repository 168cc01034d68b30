"""Memory and time of a step from sizes alone: rough, and good enough to say what is worth compiling.

The compiler has the last word. An estimate only has to rank meshes about as the compiler would, so its constants are counts of
arrays and of passes over them, and some of these are round numbers.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from t5x_cpm import mesh as mesh_lib
from t5x_cpm.chips import GiB
from t5x_cpm.compile.slices import Slice
from t5x_cpm.config import Config, MeshConfig, ModelConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import flops

ROOM = 0.9  # share of a chip's memory that a candidate may fill: the rest is for what the estimate does not see

# Bytes of one number.
WEIGHT = 4  # a parameter and its gradient are float32 in training
COMPUTE = 2  # activations, and the weights that products read, are bfloat16
MOMENTS = 8  # AdamW keeps two float32 moments for each parameter

# Memory of a training step.
SUMMED_GRADIENTS = 2  # with microbatches, the sum so far and the gradients of the current one
KEPT_HEADS = 4  # arrays as wide as all heads that a layer keeps for its backward pass: query, key, value, their weighted sum
KEPT_HIDDEN = 2  # arrays as wide as d_ff that it keeps: the two products of a gated feed-forward network
KEPT_MODEL = 2  # arrays as wide as d_model that it keeps: the outputs of attention and of the feed-forward network
WIDE = 3 * 4  # bytes for each attention score and each logit: float32, its exponential, its gradient
WORKING = 5 * COMPUTE  # bytes for each number as wide as d_model or d_ff in the current layer: five arrays
GATHERED = 2 * COMPUTE  # bytes for each parameter of the current layer, if it is gathered for it: itself and its gradient

# Arithmetic of a training step, in terms of what the model needs.
AGAIN_FULL = 4 / 3  # remat 'full' repeats the forward pass, which is a third of a step
WEIGHT_GRADIENTS = 1 / 3  # of a step, which one that trains a delta leaves out
AGAIN_DOTS = 1.05  # 'dots' repeats all but the products with weights; of that, only attention's own products matter

# Passes through the layers that send activations: forward and backward, and forward again with remat 'full'.
PASSES, PASSES_AGAIN = 2, 3
ENCODER_SUMS, DECODER_SUMS = 2, 3  # sublayers of a layer, whose outputs are sums over the axis `model`
RING = 2  # bytes that a chip sends for each byte that a ring sums up: once to add, once to hand round
THERE_AND_BACK = 2  # a routed token goes to its expert, and its result comes back
HOST_TRIPS = 2  # what is kept in host memory goes to the chip for the update, and back

# Bytes that a chip sends for each parameter in a step.
SENT_FULL = 3 * COMPUTE  # sharding 'full', for each microbatch: gathered forward and backward, then its gradient scattered
SENT_NONE = RING * WEIGHT  # 'none': gradients are summed
SENT_OPTIMIZER = RING * WEIGHT + WEIGHT  # 'optimizer': the same, and new weights are gathered

# Bytes that a chip reads and writes in its memory.
WEIGHT_READS = 3 * COMPUTE  # for each parameter and microbatch: by the forward pass, and by both products of the backward pass
GRADIENT_ADDED = 2 * WEIGHT  # for each gradient and microbatch: read and written
ACTIVATION_PASSES = 30 * COMPUTE  # for each number of d_model, token and layer: some 30 reads and writes of both passes
UPDATE = 7 * WEIGHT  # for each parameter: weight and two moments read and written, gradient read

# Inference.
KEY_AND_VALUE = 2 * COMPUTE  # bytes in the cache for each slot, layer and head dimension
INFERENCE_WORKING = 4 * COMPUTE  # bytes for each number as wide as d_model or d_ff: four arrays

# How well arithmetic, memory and interconnect overlap: the longest term counts, and this share of the others.
EXPOSED = 0.1

Sizes = dict[tuple[str | None, ...], int]  # logical axis names -> how many parameters have them


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a step is expected to take."""

  config: Config
  bytes: float  # of one chip
  seconds: float  # of one step


def sizes(model: ModelConfig) -> Sizes:
  """How many parameters there are for each tuple of logical axis names."""
  count: Sizes = collections.Counter()
  for leaf in jax.tree.leaves(encoder_decoder.build(model).leaves()):
    count[leaf.axes] += leaf.size
  return count


class Held(NamedTuple):
  """How many parameters one chip holds."""

  local: float  # to compute with: split only over `model` and `expert`
  passed: float  # the same, each counted once for every layer that uses it
  weights: float  # stored, as MeshConfig.sharding splits parameters
  moments: float  # stored, as it splits the optimizer's state


def _split(sizes: Sizes, mesh: MeshConfig, rules: mesh_lib.Rules) -> float:
  """How many parameters a chip has when they are split by these rules."""
  size_of = {'data': mesh.data, 'model': mesh.model, 'expert': mesh.expert}
  total = 0.0
  for names, count in sizes.items():
    axes = [axis for part in mesh_lib.spec(names, rules) for axis in ((part,) if isinstance(part, str) else part or ())]
    total += count / math.prod(size_of[axis] for axis in axes)
  return total


def _layers(model: ModelConfig) -> tuple[int, int]:
  return model.num_encoder_layers, model.num_decoder_layers


def _own_layers(model: ModelConfig) -> tuple[int, int]:
  return model.own_layers('encoder'), model.own_layers('decoder')


def _held(sizes: Sizes, config: Config) -> Held:
  mesh, model = config.mesh, config.model
  param_rules, optimizer_rules = mesh_lib.STATE_RULES[mesh.sharding]
  local, weights, moments = (_split(sizes, mesh, rules) for rules in (mesh_lib.RULES, param_rules, optimizer_rules))
  again = sum(_layers(model)) / sum(_own_layers(model)) - 1  # encoder and decoder alike: that is close enough
  of_layers = _split({names: count for names, count in sizes.items() if 'layers' in names}, mesh, mesh_lib.RULES)
  return Held(local, local + again * of_layers, weights, moments)


# The links of a slice, for groups of which only the size is known. `Slice` does the same for chips whose places are known.


def _spanned(slice_: Slice, size: int) -> int:
  """How many dimensions of the torus a group of `size` chips is assumed to span."""
  chips = slice_.count // slice_.slices
  return max(1, round(len(slice_.shape) * math.log(size) / math.log(chips))) if size > 1 and chips > 1 else 1


def _rate(slice_: Slice, size: int) -> float:
  """Bytes per second that a chip can send within a group of `size` chips."""
  if slice_.chip.platform == 'cuda':
    return slice_.chip.link_rate if size <= slice_.shape[1] else slice_.chip.network_rate
  return _spanned(slice_, size) * slice_.chip.link_rate * (2 if all(slice_.rings) else 1)


def _exchange_seconds(slice_: Slice, size: int) -> float:
  """Seconds of an all-to-all for each byte that a chip holds, as in `Slice`, if the group is as long in every dimension."""
  if slice_.chip.platform == 'cuda' or size == 1:
    return (size - 1) / size / _rate(slice_, size)
  spanned = _spanned(slice_, size)
  return size ** (1 / spanned) / 4 * spanned / _rate(slice_, size)


# Shared by training and inference.


def _tokens_in_layers(model: ModelConfig, tokens: tuple[float, float]) -> float:
  """Tokens of encoder and decoder, each counted once for every layer that it passes."""
  return sum(count * layers for count, layers in zip(tokens, _layers(model)))


def _travel_seconds(config: Config, slice_: Slice, tokens: tuple[float, float]) -> float:
  """Seconds that the activations of one pass travel: they are summed over `model`, and routed tokens are sent over `expert`.

  Args:
    config: the whole configuration.
    slice_: the chips to run on.
    tokens: tokens per chip, in the encoder and in the decoder.
  """
  mesh, model = config.mesh, config.model
  encoder_layers, decoder_layers = _layers(model)
  summed = ENCODER_SUMS * tokens[0] * encoder_layers + DECODER_SUMS * tokens[1] * decoder_layers
  routed = sum(count * layers // model.moe.every(stack) * THERE_AND_BACK if model.moe.every(stack) else 0
               for count, layers, stack in zip(tokens, _layers(model), ('encoder', 'decoder')))
  sums = RING * (mesh.model - 1) / mesh.model * summed / _rate(slice_, mesh.model)
  return COMPUTE * model.d_model * (sums + routed * _exchange_seconds(slice_, mesh.expert))


def _together(*seconds: float) -> float:
  """Seconds of terms that overlap, though never perfectly."""
  return (1 - EXPOSED) * max(seconds) + EXPOSED * sum(seconds)


# Training.


def _rows_at_a_time(config: Config) -> float:
  """Rows that a chip computes at a time: its part of one microbatch."""
  return config.train.batch_size / config.train.microbatches / (config.mesh.data * config.mesh.expert)


@dataclasses.dataclass(frozen=True)
class Guide:
  """A teacher that guides a training step."""

  model: ModelConfig
  sizes: Sizes

  def held(self, config: Config) -> Held:
    """How many of its parameters one chip of a run holds."""
    return _held(self.sizes, dataclasses.replace(config, model=self.model))


def _guide_bytes(config: Config, guide: Guide) -> float:
  """Bytes that a teacher adds to one chip: its weights, and its logits of a microbatch."""
  width = COMPUTE if config.teacher.dtype == 'bfloat16' else WEIGHT
  logits = _rows_at_a_time(config) * config.task.decoder_length * guide.model.vocab_size / config.mesh.model
  return width * guide.held(config).weights + WEIGHT * logits


def _guide_seconds(config: Config, slice_: Slice, guide: Guide) -> float:
  """Seconds that the pass of a teacher takes: its arithmetic, or reading its weights for each microbatch."""
  B, S, T = config.train.batch_size, config.task.encoder_length, config.task.decoder_length
  arithmetic = flops.forward_flops(guide.model, B * S, B * T, S, T) / slice_.count / slice_.chip.flops
  read = config.train.microbatches * COMPUTE * guide.held(config).passed / slice_.chip.hbm_rate
  return _together(arithmetic, read)


def _training_bytes(config: Config, held: Held) -> float:
  """Bytes that a training step needs on one chip."""
  mesh, model, rows = config.mesh, config.model, _rows_at_a_time(config)
  S, T, V = config.task.encoder_length, config.task.decoder_length, model.vocab_size
  D, F, H, HK = model.d_model, model.d_ff, model.num_heads, model.num_heads * model.head_dim
  tokens = rows * S, rows * T

  state = WEIGHT * held.weights + MOMENTS * held.moments
  gradients = WEIGHT * held.weights * (SUMMED_GRADIENTS if config.train.microbatches > 1 else 1)
  if config.delta.frozen:  # the delta itself is too small to count
    state, gradients = (COMPUTE if config.delta.base_dtype == 'bfloat16' else WEIGHT) * held.weights, 0.0
  kept = COMPUTE * D * _tokens_in_layers(model, tokens)  # the inputs of layers
  if model.remat != 'full':
    outputs = (KEPT_HEADS * HK + KEPT_HIDDEN * F) / mesh.model + KEPT_MODEL * D
    kept += COMPUTE * outputs * _tokens_in_layers(model, tokens)
  working = WIDE * rows * (H * S * S + T * V) / mesh.model + WORKING * max(tokens) * (D + F / mesh.model)
  gathered = GATHERED * held.local / sum(_own_layers(model)) if mesh.sharding == 'full' else 0.0
  return state + gradients + kept + working + gathered


def _training_seconds(config: Config, slice_: Slice, held: Held) -> float:
  """Seconds of a training step that keeps nothing in host memory."""
  mesh, model, chip, count = config.mesh, config.model, slice_.chip, config.train.microbatches
  B, S, T, rows = config.train.batch_size, config.task.encoder_length, config.task.decoder_length, _rows_at_a_time(config)
  tokens, full = (rows * S, rows * T), model.remat == 'full'
  trains = not config.delta.frozen
  arithmetic = flops.model_flops(model, B * S, B * T, S, T) * (
      (AGAIN_FULL if full else AGAIN_DOTS) - (0 if trains else WEIGHT_GRADIENTS))

  replicas = mesh.data * mesh.expert
  sent_each = {'none': SENT_NONE * trains, 'optimizer': SENT_OPTIMIZER * trains, 'full': count * SENT_FULL}[mesh.sharding]
  sent = sent_each * held.local / _rate(slice_, replicas)
  sent += count * (PASSES_AGAIN if full else PASSES) * _travel_seconds(config, slice_, tokens)
  # Between slices travel gradients that each slice has summed up and, with 'full', gathered weights; each chip sends its part.
  between = (count * SENT_FULL if mesh.sharding == 'full' else SENT_NONE * trains) * held.local / (replicas // slice_.slices)
  sent += (slice_.slices - 1) / slice_.slices * between / chip.network_rate

  activations = ACTIVATION_PASSES * _tokens_in_layers(model, tokens) * model.d_model
  moved = count * (WEIGHT_READS * held.passed + GRADIENT_ADDED * held.weights * trains + activations)
  moved += UPDATE * held.moments * trains
  return _together(arithmetic / slice_.count / chip.flops, sent, moved / chip.hbm_rate)


def _training(config: Config, slice_: Slice, held: Held, guides: Sequence[Guide] = ()) -> Estimate:
  """Estimates a training step; what does not fit goes to host memory, where that is possible and sufficient."""
  needed, seconds = _training_bytes(config, held), _training_seconds(config, slice_, held)
  for guide in guides:
    needed, seconds = needed + _guide_bytes(config, guide), seconds + _guide_seconds(config, slice_, guide)
  room, moments = ROOM * slice_.chip.hbm, MOMENTS * held.moments
  missing = needed - room
  # All moments move first. A weight that moves leaves a bfloat16 copy of half its size behind, so twice as much must move.
  away = missing + max(missing - moments, 0)
  if missing <= 0 or away >= moments + WEIGHT * held.weights or config.optimizer.name != 'adamw' or config.delta.frozen:
    return Estimate(config, needed, seconds)
  gib = math.ceil(away / GiB)
  config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, host_gib=float(gib)))
  return Estimate(config, room, seconds + HOST_TRIPS * gib * GiB / slice_.chip.host_rate)


# Inference.


def _inference(config: Config, slice_: Slice, step: str, held: Held) -> Estimate:
  """Estimates the step 'encode', of whole rows, or 'decode', of one token for each row."""
  mesh, model, chip = config.mesh, config.model, slice_.chip
  B, S, T = config.infer.batch_size, config.task.encoder_length, config.task.decoder_length
  rows = B / (mesh.data * mesh.expert)
  tokens, cache = (rows * S, 0.0), 0.0
  if step == 'decode':
    tokens = 0.0, rows
    slots = rows * model.num_decoder_layers * (S + T)
    cache = KEY_AND_VALUE * slots * model.num_heads * model.head_dim / mesh.model
  read = COMPUTE * held.passed + cache
  arithmetic = flops.inference_flops(model, step, B, S, T)
  seconds = _together(
      arithmetic / slice_.count / chip.flops, read / chip.hbm_rate, _travel_seconds(config, slice_, tokens))
  kept = COMPUTE * held.local + cache
  return Estimate(config, kept + INFERENCE_WORKING * sum(tokens) * (model.d_model + model.d_ff), seconds)


def estimate(config: Config, slice_: Slice, step: str, sizes: Sizes, guides: Sequence[Guide] = ()) -> Estimate:
  """Memory and time of a step, from sizes alone.

  Args:
    config: the whole configuration.
    slice_: the chips to run on.
    step: 'train', 'encode' or 'decode'.
    sizes: those of the model's parameters, from `sizes`.
    guides: the teachers of a training step; (): it has none, or batches bring what they say.

  Returns:
    The estimate; its configuration has MeshConfig.host_gib set where a training step fits only with it.
  """
  held = _held(sizes, config)
  return _training(config, slice_, held, guides) if step == 'train' else _inference(config, slice_, step, held)
