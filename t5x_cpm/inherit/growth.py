"""What can grow: each function makes of a model that is read slice by slice another one.

A function is a row of GROWTH. It changes the description of the model and how its slices are read, and says what it keeps.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import numpy as np

from t5x_cpm import trees
from t5x_cpm.checkpoints.tensors import Index
from t5x_cpm.config import Config, ConfigError, ModelConfig
from t5x_cpm.inherit import vocabulary
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary

Read = Callable[[Leaf, Index], np.ndarray]  # (parameter, index of a slice) -> the slice


@dataclasses.dataclass(frozen=True)
class Stage:
  """A model on its way from the source to what is wanted.

  Attributes:
    model: its configuration.
    words: its vocabulary.
    read: its parameters.
    told: what became of parameters, by name, for those that are not as in the source.
    kept: what is kept of the function that the source computes, a sentence for each growth.
  """

  model: ModelConfig
  words: Vocabulary
  read: Read
  told: dict[str, str] = dataclasses.field(default_factory=dict)
  kept: tuple[str, ...] = ()

  @functools.cached_property
  def leaves(self) -> dict[str, Leaf]:
    """The parameters by name."""
    return {leaf.name: leaf for leaf in jax.tree.leaves(encoder_decoder.build(self.model).leaves())}


def grow_vocabulary(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """The rows of another vocabulary; see `vocabulary.origins`."""
  new = dataclasses.replace(stage.model, vocab_size=config.model.vocab_size)
  found, old = vocabulary.origins(stage.words, words, new.vocab_size, config.inherit.seed), stage.leaves
  if not found.counts.get('kept') and not found.counts.get('prefix'):
    raise ConfigError(f'TaskConfig.vocabulary: {words.spec} shares no piece with {stage.words.spec}, the vocabulary of the '
                      'source: nothing would be inherited.')

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    if 'vocab' not in leaf.axes:
      return stage.read(leaf, index)
    return np.take(stage.read(old[leaf.name], index), found.rows, axis=leaf.axes.index('vocab'))

  counts = ', '.join(f'{count:,} {kind}' for kind, count in found.counts.items())
  told = {name: counts for name, leaf in old.items() if 'vocab' in leaf.axes}
  kept = (f'vocabulary: texts of the {found.counts.get("kept", 0):,} pieces that both have get the same hidden states and the '
          'same logits of these pieces; others compete with them in the softmax.')
  return Stage(new, words, read, stage.told | told, (*stage.kept, kept))


def _layers(model: ModelConfig, stack: str) -> tuple[list[int], list[int]]:
  """The numbers of the layers with experts, and of the others."""
  every, layers = model.moe.every(stack), range(model.num_layers(stack))
  routed = [number for number in layers if every and (number + 1) % every == 0]
  return routed, [number for number in layers if number not in routed]


def _keeps_scale(model: ModelConfig, stack: str) -> bool:
  """Whether the weights of a token's experts add up to 1, so that equal experts compute what each of them does."""
  name = model.moe.of(stack)
  return name in ('random_projection', 'hash', 'domain', 'top_2') or (name in ('top_k', 'loss_free') and model.moe.renormalise)


def grow_experts(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """Each network becomes the experts of its layer, the router is drawn (Komatsuzaki et al. 2022; Zhang et al. 2021)."""
  moe, noise = config.model.moe, config.inherit.expert_noise
  if stage.model.moe.num_experts:
    raise ConfigError(f'InheritConfig.growth has experts, but the source has {stage.model.moe.num_experts} experts already.')
  if not moe.num_experts:
    raise ConfigError('InheritConfig.growth has experts, but MoEConfig.num_experts = 0: set how many there are to be.')
  if moe.shared_experts:
    raise ConfigError(f'MoEConfig.shared_experts = {moe.shared_experts}: experts are copies of a network, and beside a shared '
                      'one they would count twice. Set it to 0.')
  new = dataclasses.replace(stage.model, moe=moe)
  model, old = encoder_decoder.build(new), stage.leaves
  leaves = {leaf.name: leaf for leaf in jax.tree.leaves(model.leaves())}
  drawn: dict[str, np.ndarray] = {}
  for stack in ('encoder', 'decoder'):
    path = f'{stack}/routers'
    if path in model.components:
      fresh = model.fresh(path, jax.random.fold_in(jax.random.key(config.inherit.seed), zlib.crc32(path.encode())))
      drawn |= {f'{path}/{name}': np.asarray(x) for name, x in trees.named(fresh).items()}

  def source_of(name: str, index: Index) -> tuple[str, Index]:
    """The name and the index that a slice of an expert, or of a network beside them, has in the source."""
    _, where, kernel = name.split('/')
    stack = where.partition('_')[0]
    routed, dense = _layers(new, stack)
    return f'experts/{stack}/{kernel}', ((dense if where.endswith('_dense') else routed)[index[0]],)

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    if leaf.name in drawn:
      return drawn[leaf.name][index]
    if not leaf.name.startswith('experts/') or not new.moe.every(leaf.stack):
      return stage.read(leaf, index)
    name, at = source_of(leaf.name, index)
    value = stage.read(old[name], at)
    if noise and len(index) > 1:
      rng = np.random.default_rng([config.inherit.seed, zlib.crc32(leaf.name.encode()), *index])
      value = value + noise * value.std() * rng.standard_normal(value.shape, np.float32)
    return value

  told = dict.fromkeys(drawn, 'drawn')
  for name in leaves.keys() - drawn.keys():
    if name.startswith('experts/') and new.moe.every(leaves[name].stack):
      told[name] = 'of the other layers' if '_dense/' in name else f'each network {moe.num_experts} times'
  exact = all(_keeps_scale(new, stack) for stack in ('encoder', 'decoder') if new.moe.every(stack)) and not noise
  kept = 'experts: ' + (
      'outside training the function is that of the source.' if exact else
      'the function changes, by the noise or by router weights that do not add up to 1 (MoEConfig.renormalise).')
  return Stage(new, stage.words, read, stage.told | told, (*stage.kept, kept))


GROWTH: dict[str, Callable[[Stage, Config, Vocabulary], Stage]] = {'vocabulary': grow_vocabulary, 'experts': grow_experts}
