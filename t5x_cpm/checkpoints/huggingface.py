"""The format of transformers: T5 1.1, mT5, T5, CPM-2 written as T5, and SwitchTransformers.

Translates between a ModelConfig and a config.json, and between our parameters and their tensors. Our kernels are [in, out] and
stacked over layers, theirs are [out, in] and one per layer; neither side scales query, key or value. `convert` and `export`
stream them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_cpm import trees
from t5x_cpm.checkpoints.readers import Index, Kind, Region, TensorReader, blocks, check_fits, equal, misfits, read_part
from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig
from t5x_cpm.config.fields import shown
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf

SWITCH = 'switch_transformers'
UNTIED = 'without it SwitchTransformers gives encoder and decoder an embedding table each, and here they share one.'
# ModelConfig field -> key of config.json. Where transformers has a default, files may leave the key out.
FIELDS = {
    'vocab_size': 'vocab_size', 'd_model': 'd_model', 'd_ff': 'd_ff', 'num_heads': 'num_heads', 'head_dim': 'd_kv',
    'num_encoder_layers': 'num_layers', 'num_decoder_layers': 'num_decoder_layers',
    'num_buckets': 'relative_attention_num_buckets', 'max_distance': 'relative_attention_max_distance',
    'norm_epsilon': 'layer_norm_epsilon', 'dropout_rate': 'dropout_rate'}
DEFAULTS = {'relative_attention_num_buckets': 32, 'relative_attention_max_distance': 128, 'layer_norm_epsilon': 1e-6,
            'dropout_rate': 0.1}
# Their 'gelu' is exact, which no published T5 uses; their 'gelu_new' is the tanh approximation, our 'gelu'.
ACTIVATIONS = {'gated-gelu': 'gated_gelu', 'gated-gelu_new': 'gated_gelu', 'gated-silu': 'gated_silu', 'relu': 'relu',
               'gelu_new': 'gelu'}
# Names of the one embedding table: files of different versions have the first, some of the others, or all.
TABLES = 'shared.weight', 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'
UNUSED = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'  # in old files, and never used


class Tensor(NamedTuple):
  """Where one parameter is found on both sides."""

  path: str  # here: 'encoder/layers/attention/query'
  name: str  # there; {0} is the number of the layer and {1} that of the expert, where it is stacked
  stack: tuple[tuple[int, ...], ...]  # the numbers of layers, and of experts, that it is stacked over: (), (layers,) or both
  transposed: bool

  def at(self, index: Index) -> str:
    """Their name of the slice at an index."""
    return self.name.format(*(numbers[i] for numbers, i in zip(self.stack, index, strict=True)))


def tensors(config: ModelConfig) -> Iterator[Tensor]:
  """Every parameter of a model."""
  yield Tensor('token_embedder/embedding', 'shared.weight', (), False)
  gated = config.mlp_activation.startswith('gated')
  for stack in ('encoder', 'decoder'):
    layers = (tuple(range(config.num_layers(stack))),)
    block = f'{stack}.block.{{0}}.layer.'
    parts = [('attention', 'SelfAttention')] + ([('cross_attention', 'EncDecAttention')] if stack == 'decoder' else [])
    for index, (ours, theirs) in enumerate(parts):
      yield Tensor(f'{stack}/layers/{ours}_norm/scale', f'{block}{index}.layer_norm.weight', layers, False)
      for kernel in ('query', 'key', 'value', 'output'):
        yield Tensor(f'{stack}/layers/{ours}/{kernel}', f'{block}{index}.{theirs}.{kernel[0]}.weight', layers, True)
    last = len(parts)
    yield Tensor(f'{stack}/layers/mlp_norm/scale', f'{block}{last}.layer_norm.weight', layers, False)
    every = config.moe.every(stack)
    routed = (tuple(number for number in layers[0] if every and (number + 1) % every == 0),)
    dense = (tuple(number for number in layers[0] if number not in routed[0]),)
    for kernel in ('wi_0', 'wi_1', 'wo') if gated else ('wi_0', 'wo'):
      theirs = kernel if gated else kernel.removesuffix('_0')
      if dense[0]:
        network = 'mlp' if config.moe.num_experts else 'DenseReluDense'
        ours = f'{stack}_dense' if routed[0] else stack
        yield Tensor(f'experts/{ours}/{kernel}', f'{block}{last}.{network}.{theirs}.weight', dense, True)
      if routed[0]:
        experts = (*routed, tuple(range(config.moe.num_experts)))
        yield Tensor(f'experts/{stack}/{kernel}', f'{block}{last}.mlp.experts.expert_{{1}}.{theirs}.weight', experts, True)
    if routed[0]:
      yield Tensor(f'{stack}/routers/kernel', f'{block}{last}.mlp.router.classifier.weight', routed, True)
    table = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    yield Tensor(f'{stack}/relative_bias/table', table, (), False)
    yield Tensor(f'{stack}/final_norm/scale', f'{stack}.final_layer_norm.weight', (), False)
  if not config.tie_embeddings:
    yield Tensor('lm_head', 'lm_head.weight', (), True)


def is_scaled(theirs: Mapping[str, Any]) -> bool:
  """Whether a config.json says that the decoder's output is divided by sqrt(d_model)."""
  if theirs.get('model_type') == 'mt5':
    return False
  # Version 5 of transformers always ties, and keeps what tie_word_embeddings used to mean in scale_decoder_outputs.
  return bool(theirs.get('scale_decoder_outputs', theirs.get('tie_word_embeddings', True)))


def read_experts(theirs: Mapping[str, Any]) -> MoEConfig:
  """The MoEConfig of a SwitchTransformers config.json. Its capacity, in tokens, is not carried over."""
  every: dict[str, Any] = {}
  for stack, layers, sparse in (('encoder', 'num_layers', 'num_sparse_encoder_layers'),
                                ('decoder', 'num_decoder_layers', 'num_sparse_decoder_layers')):
    number, of = theirs.get(sparse, 3), theirs.get(layers, 12)
    if not isinstance(number, int) or not isinstance(of, int):
      raise ConfigError(f'config.json: {sparse} = {shown(number)}, {layers} = {shown(of)}: expected whole numbers.')
    if number and of % number:
      raise ConfigError(f'config.json: {sparse} = {number} does not divide {layers} = {of}.')
    every[f'{stack}_every'] = of // number if number else 0
  if not theirs.get('tie_word_embeddings', True):
    raise ConfigError(f'config.json: tie_word_embeddings = false: {UNTIED}')
  if theirs.get('router_bias'):
    raise ConfigError('config.json: router_bias = true: routers have no bias here.')
  return MoEConfig(
      num_experts=theirs.get('num_experts', 8), jitter=theirs.get('router_jitter_noise', 0.01),
      balance_loss=theirs.get('router_aux_loss_coef', 0.001), router_z_loss=theirs.get('router_z_loss_coef', 0.001), **every)


def read_config(theirs: Mapping[str, Any]) -> ModelConfig:
  """The ModelConfig of a config.json. Its tie_embeddings says only whether the head is scaled: see `head_to_ours`.

  Raises:
    ConfigError: it is not a T5, or uses an activation that this project does not have.
  """
  kind = theirs.get('model_type')
  if kind not in ('t5', 'mt5', SWITCH):
    raise ConfigError(f"config.json: model_type = {shown(kind)}: expected 't5', 'mt5' or '{SWITCH}'.")
  key = 'dense_act_fn' if kind == SWITCH else 'feed_forward_proj'
  activation = theirs.get(key, 'gated-gelu' if kind == 'mt5' else 'relu')
  if activation not in tuple(ACTIVATIONS):  # which may be of any type
    raise ConfigError(f'config.json: {key} = {shown(activation)}: expected one of {", ".join(ACTIVATIONS)}.')
  values: dict[str, Any] = {}
  for ours, key in FIELDS.items():
    value = theirs.get(key, DEFAULTS.get(key))
    if value is None and key == 'num_decoder_layers':
      value = theirs.get('num_layers')
    if value is None:
      raise ConfigError(f'config.json: {key} is missing.')
    values[ours] = value
  return ModelConfig(
      mlp_activation=ACTIVATIONS[activation], tie_embeddings=is_scaled(theirs), initializer='t5',
      moe=read_experts(theirs) if kind == SWITCH else MoEConfig(), **values)


def write_switch(config: ModelConfig, activation: str) -> dict[str, Any]:
  """The config.json of a model with experts, as SwitchTransformers; no token is dropped, as outside training here."""
  experts = config.moe
  if {experts.of(stack) for stack in ('encoder', 'decoder')} != {'switch'} or experts.shared_experts or 'gated' in activation:
    raise ConfigError(
        f'MoEConfig.router = {experts.router!r}, mlp_activation = {config.mlp_activation!r}: SwitchTransformers has '
        "router 'switch' without shared experts, and an activation that is not gated.")
  if not config.tie_embeddings:
    raise ConfigError(f'ModelConfig.tie_embeddings = False: {UNTIED}')
  layers = {f'num_sparse_{stack}_layers': config.num_layers(stack) // experts.every(stack) if experts.every(stack) else 0
            for stack in ('encoder', 'decoder')}
  return {
      'model_type': SWITCH, 'architectures': ['SwitchTransformersForConditionalGeneration'], 'is_encoder_decoder': True,
      'dense_act_fn': activation, 'tie_word_embeddings': config.tie_embeddings, 'num_experts': experts.num_experts,
      'expert_capacity': 1 << 20, 'router_jitter_noise': experts.jitter, 'router_aux_loss_coef': experts.balance_loss,
      'router_z_loss_coef': experts.router_z_loss,
  } | layers | {key: getattr(config, ours) for ours, key in FIELDS.items()}


def check_layers(config: ModelConfig) -> None:
  """Raises ConfigError where layers share their parameters, which no T5 of transformers can."""
  if config.share_layers:
    raise ConfigError('ModelConfig.share_layers = True: transformers has no such T5. Give each layer its own parameters first: '
                      '`inherit` with gin/runs/inherit_unshare_layers.gin.')


def write_config(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a ModelConfig, without the special tokens."""
  check_layers(config)
  activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp_activation)
  if config.moe.num_experts:
    return write_switch(config, activation)
  return {
      'model_type': 't5', 'architectures': ['T5ForConditionalGeneration'], 'is_encoder_decoder': True,
      'feed_forward_proj': activation, 'tie_word_embeddings': config.tie_embeddings,
  } | {key: getattr(config, ours) for ours, key in FIELDS.items()}


class Part(NamedTuple):
  """One of their tensors, and the slice of a parameter that it is made of."""

  name: str
  shape: tuple[int, ...]
  leaf: Leaf
  at: Index
  transposed: bool


def _leaves(config: ModelConfig) -> dict[str, Leaf]:
  return trees.named(encoder_decoder.build(config).leaves())


def exported(config: ModelConfig) -> Iterator[Part]:
  """Their tensors of a model, one after the other."""
  leaves = _leaves(config)
  for tensor in tensors(config):
    leaf = leaves[tensor.path]
    shape = leaf.shape[len(tensor.stack):]
    for index in np.ndindex(*map(len, tensor.stack)):
      yield Part(tensor.at(index), shape[::-1] if tensor.transposed else shape, leaf, index, tensor.transposed)


class Exported:
  """A TensorReader of their tensors, made of the parameters of a model of ours."""

  def __init__(self, config: ModelConfig, reader: TensorReader):
    """reader: of our parameters."""
    self._reader = reader
    self.parts = {part.name: part for part in exported(config)}
    self.kinds = {name: Kind(part.shape, np.dtype(part.leaf.dtype)) for name, part in self.parts.items()}

  def place(self, name: str) -> str:
    return self._reader.place(self.parts[name].leaf.name)

  def read(self, name: str, index: Region = ()) -> np.ndarray:
    part = self.parts[name]
    value = self._reader.read(part.leaf.name, part.at)
    return (value.T if part.transposed else value)[index]


def _head(config: ModelConfig, reader: TensorReader) -> tuple[ModelConfig, dict[str, str], bool]:
  """Brings the four combinations of (tied or not, scaled or not) to the two of ModelConfig.tie_embeddings.

  Args:
    config: its tie_embeddings says whether they scale.
    reader: of their tensors; a head that equals the embedding table is tied.

  Returns:
    The configuration; their names of the table and of the head, where they lie under another; whether the head is to be scaled
    by 1 / sqrt(d_model).

  Raises:
    ConfigError: encoder and decoder have an embedding table each.
  """
  first, *others = [name for name in TABLES if name in reader.kinds] or ['']
  for name in others:
    if not equal(reader, first, name):
      raise ConfigError(f'{first} and {name} differ: here encoder and decoder share one embedding table.')
  own = 'lm_head.weight' in reader.kinds
  if not first:
    return config, {}, False
  tied = not own or equal(reader, first, 'lm_head.weight')
  names = {'shared.weight': first, 'lm_head.weight': first if tied else 'lm_head.weight'}
  if tied == config.tie_embeddings:
    return config, names, False
  return dataclasses.replace(config, tie_embeddings=False), names, config.tie_embeddings


class Source:
  """The parameters of a model in the tensors of a folder of transformers, slice by slice.

  Attributes:
    config: of the model.
    leaves: its parameters by name.
  """

  def __init__(self, config: ModelConfig, reader: TensorReader):
    """Names up to 5 tensors that are missing, left over, or of another shape than the configuration says, as a ConfigError.

    Args:
      config: as from `read_config`.
      reader: of their tensors.
    """
    self.config, self._names, self._scales = _head(config, reader)
    self._reader = reader
    self.leaves = _leaves(self.config)
    self._tensors = {tensor.path: tensor for tensor in tensors(self.config)}
    wanted = {self._names.get(part.name, part.name): part.shape for part in exported(self.config)}
    # What is the same table under another name was compared, and is not missed.
    spare = {*TABLES, UNUSED} | ({'lm_head.weight'} if self._names.get('lm_head.weight') in TABLES else set())
    kinds = {name: kind for name, kind in reader.kinds.items() if name in wanted or name not in spare}
    check_fits('the tensors do not fit config.json', misfits(kinds, wanted))

  def read(self, leaf: Leaf, index: Index) -> np.ndarray:
    """A slice of a parameter, in its type. Raises ConfigError where it cannot be read, or is not finite."""
    tensor = self._tensors[leaf.name]
    name = tensor.at(index)
    name = self._names.get(name, name)
    value = np.empty(leaf.shape[len(index):], np.dtype(leaf.dtype))
    theirs = value.T if tensor.transposed else value
    for region in blocks(self._reader.kinds[name]):
      theirs[region] = read_part(self._reader, name, region)
    if self._scales and leaf.name == 'lm_head':
      value *= np.asarray(self.config.d_model**-0.5, value.dtype)
    return value
