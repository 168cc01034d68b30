"""The hyperparameters of a model. Nothing here imports JAX."""

import dataclasses

from t5x_cpm.config.fields import ConfigError, choice, free, in_range
from t5x_cpm.config.typed import Typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Typed):
  """Experts in place of feed-forward networks: how many, where, and which tokens go to which (t5x_cpm/models/routing.py).

  Tokens are routed in groups of at most `group_size`: pieces of one row, or several whole rows. The balance of a group, its
  auxiliary losses and what overflows depend on nothing outside it. Outside training nothing overflows.
  """

  num_experts: int = 0  # experts of each layer that has any; 0: a dense model
  # 'switch', 'top_k', 'top_2', 'prototypes', 'expert_choice', 'hash', 'base', 'random_projection', 'domain', 'loss_free', or
  # one that your own module registers
  router: str = 'switch'
  decoder_router: str = ''  # router of the decoder; '': the same as `router`
  encoder_every: int = 1  # of every so many encoder layers the last has experts; 1: all layers; 0: none
  decoder_every: int = 1  # the same in the decoder
  top_k: int = 2  # experts of a token for 'top_k' and 'loss_free'; prototypes for 'prototypes'
  renormalise: bool = False  # for 'top_k' and 'loss_free': scale the weights of a token's experts to a sum of 1
  second_policy: str = 'random'  # which second experts 'top_2' keeps: 'all', 'none', 'threshold', 'random' (in training)
  second_threshold: float = 0.2  # a second expert above it is kept; one below never ('threshold') or at random ('random')
  capacity_factor: float = 1.25  # in training an expert takes at most this many times its fair share of a group
  capacity_counts: str = 'tokens'  # fair share: tokens / experts ('tokens'), or that times experts of a token ('assignments')
  batch_prioritised: bool = False  # serve the most confident tokens of a group first, in training
  group_size: int = 512
  dispatch: str = 'einsum'  # 'einsum' (within a capacity) or 'dropless' (only 'expert_choice' reads capacity_factor)
  jitter: float = 0.0  # in training the router's input is multiplied by U(1 - jitter, 1 + jitter); 0 is off
  balance_loss: float = 0.01  # weight of the auxiliary loss against an uneven load; 0 is off
  router_z_loss: float = 0.0  # weight of the squared log-normaliser of the router's logits; 0 is off
  expert_dropout: float = -1.0  # dropout rate of the experts' hidden activations; -1: ModelConfig.dropout_rate
  shared_experts: int = 0  # every token also passes through a dense network this many experts wide; 0: none
  bias_rate: float = 0.001  # for 'loss_free': how far the bias of an expert moves in a training step

  def of(self, stack: str) -> str:
    """The router of 'encoder' or 'decoder'."""
    return self.decoder_router or self.router if stack == 'decoder' else self.router

  def uses(self, router: str) -> bool:
    """Whether this router sends tokens to the experts of a stack, encoder or decoder."""
    return any(self.every(stack) and self.of(stack) == router for stack in ('encoder', 'decoder'))

  def every(self, stack: str) -> int:
    """Of every so many layers of a stack the last has experts; 0: none."""
    return (self.encoder_every if stack == 'encoder' else self.decoder_every) if self.num_experts else 0

  def validate(self) -> None:
    in_range(self, 'top_k', 1)
    for field in ('num_experts', 'encoder_every', 'decoder_every', 'capacity_factor', 'second_threshold', 'balance_loss',
                  'router_z_loss', 'shared_experts', 'bias_rate'):
      in_range(self, field, 0)
    choice(self, 'second_policy', ('all', 'none', 'threshold', 'random'))
    choice(self, 'capacity_counts', ('tokens', 'assignments'))
    choice(self, 'dispatch', ('einsum', 'dropless'))
    in_range(self, 'jitter', 0.0, 0.99)
    in_range(self, 'expert_dropout', -1.0, 0.99)
    in_range(self, 'group_size', 1)
    if not self.num_experts:
      return
    in_range(self, 'num_experts', 2)
    if self.top_k > self.num_experts:
      raise ConfigError(f'MoEConfig.top_k = {self.top_k}: expected at most MoEConfig.num_experts = {self.num_experts}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Typed):
  """Hyperparameters of an encoder-decoder Transformer (CPM-2, T5 1.1, mT5; Raffel et al. 2020, Zhang et al. 2021).

  The defaults are CPM-2's choices: RMSNorm before every sub-layer, gated tanh-GELU, untied output head, unscaled
  attention scores and logits, one relative position table per stack and no bias vector anywhere.
  """

  # rows of the embedding table: pieces of the vocabulary, and at most 127 more as padding; 0: as many as there are pieces (of
  # a run that is continued, evaluated or started from: as many as that has)
  vocab_size: int = 26_240
  d_model: int = 128  # width of what passes from layer to layer
  d_ff: int = 320  # hidden width of a feed-forward network
  num_heads: int = 4  # attention heads of a layer
  head_dim: int = 32  # width of a head's queries, keys and values
  num_encoder_layers: int = 2  # layers of the encoder
  num_decoder_layers: int = 2  # layers of the decoder
  # True: all layers of a stack use the parameters of one; with experts in every n-th layer, those of n. `inherit` with growth
  # 'unshare_layers' gives each its own (Pseudo-to-Real, Lin et al. 2021)
  share_layers: bool = False
  mlp_activation: str = 'gated_gelu'  # 'gated_gelu', 'gated_silu', 'relu' or 'gelu'
  tie_embeddings: bool = False  # True: the head is the embedding table and the decoder output is divided by sqrt(d_model)
  num_buckets: int = 32  # buckets of relative positions; the encoder uses one half for each direction
  max_distance: int = 128  # in tokens: all positions further apart share a bucket
  norm_epsilon: float = 1e-6  # RMSNorm adds it to the mean square
  dropout_rate: float = 0.0  # dropout rate of activations, in training; 0 is off
  initializer: str = 'cpm2'  # 'cpm2': normal with init_std, output projections with init_std / sqrt(2 L); 't5': by fan-in
  init_std: float = 0.001  # read by the 'cpm2' initializer only
  dtype: str = free('auto')  # type of the computation: 'auto' is bfloat16 on accelerators and float32 on CPU
  param_dtype: str = 'float32'  # type of the parameters: 'float32', 'bfloat16' or 'float64'
  remat: str = free('none')  # what the backward pass recomputes: 'none', 'dots' (all but matrix products) or 'full' (all)
  layer_loop: str = free('auto')  # 'scan', 'unroll', or 'auto': unrolled on CPU, where it is faster, scanned elsewhere
  moe: MoEConfig = MoEConfig()

  def num_layers(self, stack: str) -> int:
    """How many layers 'encoder' or 'decoder' has."""
    return self.num_encoder_layers if stack == 'encoder' else self.num_decoder_layers

  def period(self, stack: str) -> int:
    """Of how many layers a stack is made over and over: of one, or of several of which the last has experts."""
    return self.moe.every(stack) or 1

  def own_layers(self, stack: str) -> int:
    """How many layers of 'encoder' or 'decoder' have parameters of their own; the others use these again."""
    return self.period(stack) if self.share_layers else self.num_layers(stack)

  def validate(self) -> None:
    in_range(self, 'vocab_size', 0)
    for field in ('d_model', 'd_ff', 'num_heads', 'head_dim', 'num_encoder_layers', 'num_decoder_layers'):
      in_range(self, field, 1)
    in_range(self, 'num_buckets', 4)
    if self.num_buckets % 4:
      raise ConfigError(
          f'ModelConfig.num_buckets = {self.num_buckets}: expected a multiple of 4, because the encoder splits the '
          'buckets by direction and each half again into exact and logarithmic distances.')
    if self.max_distance <= self.num_buckets // 2:
      raise ConfigError(
          f'ModelConfig.max_distance = {self.max_distance}: expected more than ModelConfig.num_buckets / 2 = '
          f'{self.num_buckets // 2}, the distances that have a bucket each.')
    in_range(self, 'norm_epsilon', 0.0)
    in_range(self, 'dropout_rate', 0.0, 0.99)
    in_range(self, 'init_std', 0.0)
    self.moe.validate()
    for stack in ('encoder', 'decoder'):
      if self.moe.every(stack) and self.num_layers(stack) % self.moe.every(stack):
        raise ConfigError(
            f'MoEConfig.{stack}_every = {self.moe.every(stack)} does not divide ModelConfig.num_{stack}_layers = '
            f'{self.num_layers(stack)}.')
    choice(self, 'mlp_activation', ('gated_gelu', 'gated_silu', 'relu', 'gelu'))
    choice(self, 'initializer', ('cpm2', 't5'))
    choice(self, 'dtype', ('auto', 'float32', 'bfloat16', 'float64'))
    choice(self, 'param_dtype', ('float32', 'bfloat16', 'float64'))
    choice(self, 'remat', ('none', 'dots', 'full'))
    choice(self, 'layer_loop', ('auto', 'scan', 'unroll'))
