"""Growth in depth: shared layers get parameters of their own, and stacks get more layers."""

import dataclasses

import numpy as np

from t5x_cpm.checkpoints.tensors import Index
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.inherit.stage import Stage, gives_output
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary

STACKS = ('encoder', 'decoder')


def unshare_layers(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """Each layer begins with the parameters that all have shared (Pseudo-to-Real, Lin et al. 2021)."""
  if not stage.model.share_layers:
    raise ConfigError("InheritConfig.growth has 'unshare_layers', but each layer of the source has its own parameters already "
                      '(ModelConfig.share_layers = False).')
  new, old = dataclasses.replace(stage.model, share_layers=False), stage.leaves

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    shared = old[leaf.name]
    return stage.read(shared, (index[0] % shared.shape[0], *index[1:]) if 'layers' in leaf.stacked else index)

  told = {name: 'one for all layers becomes one for each' for name, leaf in old.items() if 'layers' in leaf.stacked}
  return stage.then(new, read, told, 'unshare_layers: the function is that of the source.')


def _origins(order: str, old: int, new: int) -> tuple[list[int], list[bool]]:
  """For each of the new layers the old one that it comes from, and whether it is added to it; layers come in whole periods."""
  origin = [number % old if order == 'stack' else number * old // new for number in range(new)]
  return origin, [source in origin[:number] for number, source in enumerate(origin)]


def deepen(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """More layers: on top of the old ones (Gong et al. 2019), or each after the one that it is made of.

  New layers give nothing until they are trained, because the last matrix of each sublayer is 0 (Wu et al. 2024), or
  are copies.
  """
  model, order, copies = stage.model, config.inherit.deepen, config.inherit.new_layers == 'copy'
  if model.share_layers:
    raise ConfigError("InheritConfig.growth has 'deepen', but the layers of the source share their parameters "
                      "(ModelConfig.share_layers): put 'unshare_layers' before it.")
  new = dataclasses.replace(
      model, num_encoder_layers=config.model.num_encoder_layers, num_decoder_layers=config.model.num_decoder_layers)
  for stack in STACKS:
    if new.num_layers(stack) < model.num_layers(stack):
      raise ConfigError(f'ModelConfig.num_{stack}_layers = {new.num_layers(stack)}: the source has {model.num_layers(stack)}, '
                        "and InheritConfig.growth with 'deepen' only adds layers.")
  if new == model:
    raise ConfigError("InheritConfig.growth has 'deepen', but ModelConfig.num_encoder_layers and num_decoder_layers are those "
                      'of the source: say how many layers there are to be.')
  new.validate()
  periods = {stack: _origins(order, *(one.num_layers(stack) // one.period(stack) for one in (model, new))) for stack in STACKS}
  old = stage.leaves

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    if 'layers' not in leaf.stacked:
      return stage.read(leaf, index)
    origins, added = periods[leaf.stack]
    rows = leaf.shape[0] // len(origins)
    period, row = divmod(index[0], rows)
    if added[period] and not copies and gives_output(leaf):
      return np.zeros(leaf.shape[len(index):], np.dtype(leaf.dtype))
    return stage.read(old[leaf.name], (origins[period] * rows + row, *index[1:]))

  told = {}
  for name, leaf in old.items():
    if 'layers' in leaf.stacked and any(added := periods[leaf.stack][1]):
      told[name] = f'of {len(added)} the {sum(added)} new are {"0" if gives_output(leaf) and not copies else "copies"}'
  kept = 'the function changes: new layers are copies.' if copies else (
      'the function is that of the source; new layers add nothing until they are trained.')
  return stage.then(new, read, told, f'deepen: {kept}')
