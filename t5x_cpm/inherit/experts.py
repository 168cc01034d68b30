"""Growth of experts: feed-forward networks become experts, of one model or of several, and experts are taken away."""

import dataclasses
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from t5x_cpm import trees
from t5x_cpm.checkpoints.tensors import Index
from t5x_cpm.config import Config, ConfigError, InheritConfig, ModelConfig, MoEConfig
from t5x_cpm.inherit.average import mean
from t5x_cpm.inherit.stage import Read, Stage, generator, gives_output, with_noise
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary

STACKS = ('encoder', 'decoder')
ONE_WHOLE = ('random_projection', 'hash', 'domain')  # routers that send a token to one expert, with weight 1
RANKED = ('top_k', 'loss_free')  # those that MoEConfig.renormalise is for
# Routers that give an expert of a token the same weight whatever other experts there are.
REGARDLESS = ('random_projection', 'domain', 'base', 'loss_free', 'top_2')


def _layers(model: ModelConfig, stack: str) -> tuple[list[int], list[int]]:
  """The numbers of the layers with experts, and of the others, among those that have parameters of their own."""
  every, layers = model.moe.every(stack), range(model.own_layers(stack))
  routed = [number for number in layers if every and (number + 1) % every == 0]
  return routed, [number for number in layers if number not in routed]


def _keeps_scale(moe: MoEConfig, stack: str, parts: int) -> bool:
  """Whether a token's experts, each a part of a network, make up what the network computes."""
  name = moe.of(stack)
  if name == 'top_2':
    return moe.second_policy == 'all' and parts <= 2
  return (name in RANKED and moe.renormalise and moe.top_k % parts == 0) or (name in ONE_WHOLE and parts == 1)


def _parts(model: ModelConfig, wanted: ModelConfig) -> int:
  """Into how many experts each network is cut."""
  if wanted.d_ff >= model.d_ff:
    return 1
  parts, rest = divmod(model.d_ff, wanted.d_ff)
  if rest:
    raise ConfigError(f'ModelConfig.d_ff = {wanted.d_ff}: expected a divisor of {model.d_ff}, that of the source, so that '
                      'networks can be cut into experts.')
  if wanted.moe.num_experts % parts:
    raise ConfigError(f'MoEConfig.num_experts = {wanted.moe.num_experts}: each network is cut into {parts} experts '
                      f'(ModelConfig.d_ff = {wanted.d_ff} of {model.d_ff}); expected a multiple of {parts}.')
  if (wanted.moe.encoder_every, wanted.moe.decoder_every) != (1, 1):
    raise ConfigError(f'ModelConfig.d_ff = {wanted.d_ff} of {model.d_ff}: layers without experts would lose hidden units. Set '
                      'MoEConfig.encoder_every and decoder_every to 1.')
  return parts


def _routers(new: ModelConfig, parts: int, seed: int) -> dict[str, np.ndarray]:
  """Fresh routers by name. Where all parts of a network are to be chosen together, they have one score (He et al. 2024)."""
  model, drawn = encoder_decoder.build(new), {}
  for stack in STACKS:
    path = f'{stack}/routers'
    if path in model.components:
      fresh = model.fresh(path, jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())))
      together = parts > 1 and new.moe.of(stack) in (*RANKED, 'top_2')
      for name, value in trees.named(fresh).items():
        experts = np.arange(new.moe.num_experts) // parts * parts
        drawn[f'{path}/{name}'] = np.asarray(value)[..., experts] if together else np.asarray(value)
  return drawn


def _changed(value: np.ndarray, leaf: Leaf, index: Index, options: InheritConfig) -> np.ndarray:
  """An expert's matrix with the noise that is wanted, and with some hidden units drawn anew (Nakamura et al. 2025)."""
  axis = leaf.axes.index('mlp') - len(index)
  if options.expert_reinit:
    # The units are the same in all matrices of an expert, whose names differ in the last word.
    units = generator(options.seed, leaf.name.rpartition('/')[0], index).permutation(value.shape[axis])
    units = units[:round(options.expert_reinit * len(units))]
    chosen = (slice(None),) * axis + (units,)
    old = np.asarray(value[chosen], np.float32)
    if old.size:
      value = np.array(value)
      value[chosen] = generator(options.seed, f'{leaf.name}/reinit', index).normal(old.mean(), old.std(), old.shape)
  return with_noise(value, options.expert_noise, generator(options.seed, leaf.name, index)) if options.expert_noise else value


def _into_experts(stage: Stage, networks: Sequence[Read], config: Config, name: str) -> Stage:
  """Networks become the experts of their layers.

  Args:
    stage: gives everything else.
    networks: of which the copies are made, one after the other and over again.
    config: of the new model.
    name: of the growth.
  """
  moe, options = config.model.moe, config.inherit
  if stage.model.moe.num_experts:
    raise ConfigError(f'InheritConfig.growth has {name}, but the source has {stage.model.moe.num_experts} experts already.')
  if not moe.num_experts:
    raise ConfigError(f'InheritConfig.growth has {name}, but MoEConfig.num_experts = 0: set how many there are to be.')
  if moe.shared_experts:
    raise ConfigError(f'MoEConfig.shared_experts = {moe.shared_experts}: experts are copies of a network, and beside a shared '
                      'one they would count twice. Set it to 0.')
  parts = _parts(stage.model, config.model)
  new = dataclasses.replace(stage.model, moe=moe, d_ff=stage.model.d_ff // parts)
  drawn, old = _routers(new, parts, options.seed), stage.leaves

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    if leaf.name in drawn:
      return drawn[leaf.name][index]
    if not leaf.name.startswith('experts/') or not new.moe.every(leaf.stack):
      before = old[leaf.name]  # where layers share the parameters of one, there may be several now
      return stage.read(before, (index[0] % before.shape[0], *index[1:]) if index else index)
    before = old[f'experts/{leaf.stack}/{leaf.name.rpartition("/")[2]}']
    routed, dense = _layers(new, leaf.stack)
    layer = (routed if len(index) > 1 else dense)[index[0]] % before.shape[0],
    if len(index) == 1:
      return stage.read(before, layer)
    network, part = divmod(index[1], parts)
    value = networks[network % len(networks)](before, layer)
    if parts > 1:
      units = np.arange(part * new.d_ff, (part + 1) * new.d_ff)
      value = value.take(units, leaf.axes.index('mlp') - len(index))
      value = value * np.asarray(parts, value.dtype) if gives_output(leaf) else value
    return _changed(value, leaf, index, options)

  told = dict.fromkeys(drawn, 'drawn' if parts == 1 else 'drawn, alike for the parts of a network')
  for leaf in Stage(new, stage.words, read).leaves.values():
    if leaf.name.startswith('experts/') and new.moe.every(leaf.stack):
      times = f'each network {moe.num_experts // parts // len(networks)} times' + (f', in {parts} parts' if parts > 1 else '')
      told[leaf.name] = times if 'expert' in leaf.stacked else 'of the other layers'
  routed = [stack for stack in STACKS if new.moe.every(stack)]
  exact = all(_keeps_scale(moe, stack, parts) for stack in routed) and not options.expert_noise and not options.expert_reinit
  kept = 'outside training the function is that of the source.' if exact else (
      'the function changes, by what is drawn anew or added, or because the weights of the experts that make up a network do '
      'not add up to 1 (MoEConfig.renormalise, top_k).')
  return stage.then(new, read, told, f'{name}: {kept}')


def grow_experts(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """Each network becomes the experts of its layer, the router is drawn (Komatsuzaki et al. 2022; Zhang et al. 2021).

  A smaller ModelConfig.d_ff cuts the copies into fine-grained experts, the parts of a network one after the other. A router
  with renormalised weights chooses all parts together, and the last matrix makes up for what each of them weighs.
  """
  return _into_experts(stage, [stage.read], config, 'experts')


def merge_models(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """Several dense models become one expert each, and the rest is their mean (Branch-Train-MiX, Sukhbaatar et al. 2024)."""
  sources, moe, name = (stage, *stage.others), config.model.moe, 'merge_models_into_experts'
  if moe.num_experts and moe.num_experts != len(sources):
    raise ConfigError(f'MoEConfig.num_experts = {moe.num_experts}: InheritConfig.growth with {name!r} makes an expert of each '
                      f'--source, of which there are {len(sources)}.')
  found = _into_experts(stage.then(stage.model, mean(sources), {}, ''), [source.read for source in sources], config, name)
  told = {leaf: found.told.get(leaf, '') for leaf in found.leaves}
  told = {leaf: 'a network of each source' if text.startswith('each') else text if text.startswith('drawn') else
          f'the mean of {len(sources)}' for leaf, text in told.items()}
  routers = {moe.of(stack) for stack in STACKS if moe.every(stack)}
  kept = 'a row of the domain of a source is computed as the source does, where they differ in these networks alone.'
  if routers != {'domain'} or config.inherit.expert_noise or config.inherit.expert_reinit:
    kept = f'the function is that of none of the {len(sources)} sources.'
  return dataclasses.replace(found, told=told, kept=(*stage.kept, f'{name}: {kept}'))


def _kept_experts(config: Config, old: MoEConfig) -> list[int]:
  """Which experts are kept, in their new order."""
  keep, count = list(config.inherit.keep_experts), config.model.moe.num_experts
  groups = old.top_k if old.uses('prototypes') else 1  # each has a router of its own
  if not count or count > old.num_experts or (count == old.num_experts and not keep):
    raise ConfigError(f"MoEConfig.num_experts = {count}: InheritConfig.growth has 'prune_experts', and the source has "
                      f'{old.num_experts}; expected fewer, and at least 2.')
  if count % groups:
    raise ConfigError(f"MoEConfig.num_experts = {count}: router 'prototypes' has {groups} groups of experts, each of which "
                      f'keeps as many; expected a multiple of {groups}.')
  size, each = old.num_experts // groups, count // groups
  keep = keep or [group * size + number for group in range(groups) for number in range(each)]
  if len(keep) != count:
    raise ConfigError(f'InheritConfig.keep_experts has {len(keep)} experts, and MoEConfig.num_experts = {count}: expected as '
                      'many.')
  if max(keep) >= old.num_experts:
    raise ConfigError(f'InheritConfig.keep_experts has {max(keep)}: the experts of the source are 0 to {old.num_experts - 1}.')
  if [expert // size for expert in keep] != [place // each for place in range(count)]:
    raise ConfigError(f"InheritConfig.keep_experts = {tuple(keep)}: router 'prototypes' has {groups} groups of {size} experts; "
                      f'expected {each} of the first group, then {each} of the next.')
  return keep


def prune_experts(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """Some experts are kept, with what the routers have for them."""
  if not stage.model.moe.num_experts:
    raise ConfigError("InheritConfig.growth has 'prune_experts', but the source has no experts.")
  keep, moe = _kept_experts(config, stage.model.moe), config.model.moe
  # A token has no more experts than there are.
  less = dataclasses.replace(stage.model.moe, num_experts=len(keep), top_k=min(stage.model.moe.top_k, len(keep)))
  new, old = dataclasses.replace(stage.model, moe=less), stage.leaves
  routers = tuple(f'{stack}/routers/' for stack in STACKS)

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    before = old[leaf.name]
    if 'expert' in leaf.stacked:
      return stage.read(before, (*index[:-1], keep[index[-1]]))
    value = stage.read(before, index)
    if leaf.name.startswith(routers):  # whatever its weights are, the axis of experts is the one that is shorter
      for axis, (size, was) in enumerate(zip(leaf.shape[len(index):], value.shape, strict=True)):
        value = value if size == was else value.take(keep, axis)
    return value

  told = {leaf.name: f'{len(keep)} of {stage.model.moe.num_experts} experts'
          for leaf in Stage(new, words, read).leaves.values() if leaf.shape != old[leaf.name].shape}
  regardless = (*REGARDLESS, *(('top_k',) if moe.renormalise else ()))
  kept = 'the function changes, but for tokens all of whose experts are kept.'
  if any(moe.of(stack) not in regardless for stack in STACKS if moe.every(stack)):
    kept = 'the function changes: tokens go to other experts, or with other weights.'
  if moe.uses('domain'):
    kept += f' The domains {", ".join(map(str, keep))} are now 0 to {len(keep) - 1}.'
  return stage.then(new, read, told, f'prune_experts: {kept}')
