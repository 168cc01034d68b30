"""The configuration of a delta: what is trained on a frozen base, and which base."""

import dataclasses

from t5x_cpm.config.fields import ConfigError, choice, free, in_range, shown
from t5x_cpm.config.typed import Typed

PLACES = ('encoder.self', 'decoder.self', 'decoder.cross')  # where there is attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(Typed):
  """A small set of parameters, a delta, that is trained while a base model stays as it is.

  `sites` names places in the layers of the base: 'query' means encoder.self.query, decoder.self.query and decoder.cross.query,
  'cross.query' the last of them, 'self' all in self-attention; anything else is a regular expression for whole names, as in
  'encoder.*value'. The places are those of `self` and `cross` attention (query, key, value, output) and of the feed-forward
  part `mlp` (wi_0, wi_1, wo). Matrices of experts, of which each gets a pair of its own, are meant only by what has the word
  'experts' in it, such as 'experts' or 'decoder.experts.wo'.
  """

  method: str = ''  # 'prompt', 'prefix', 'lora', 'ia3', 'adapter', 'bitfit'; several are joined by '+'; '' trains everything
  base: str = free('')  # the model_dir of the base; `--base` sets it
  train_base: bool = False  # train the base and the delta of another run together; --init_from with a delta's run sets it
  allow_other_base: bool = free(False)  # go on where the base has other weights than the delta was trained on; of one command
  base_dtype: str = 'float32'  # the type in which the base is held: 'float32' or 'bfloat16'
  prompt_length: int = 100  # of 'prompt': how many vectors stand before the input of the encoder
  lengths: tuple[int, ...] = ()  # of 'prompt': instead of that, how many stand in each <prompt> of the task's inputs_template
  decoder_prompt_length: int = 0  # of 'prompt': how many more vectors the decoder reads before its start token
  prompt_init: str = 'vocabulary'  # of 'prompt': what they are at first: 'random', 'vocabulary', 'words', 'text' or 'file'
  prompt_words: tuple[str, ...] = ()  # for prompt_init = 'words', such as the names of classes: each is the first of a vector
  prompt_text: str = ''  # for prompt_init = 'text': the text whose tokens they are at first, again and again
  prompt_file: str = ''  # for prompt_init = 'file': a .npy array [vectors, d_model], or the model_dir or folder of a delta
  prompt_sees_text: bool = True  # of 'prompt': whether its vectors attend to the tokens of the input
  text_sees_prompt: bool = True  # of 'prompt': whether the tokens of the input attend to its vectors
  prefix_length: int = 100  # of 'prefix': how many keys and values stand before those of each attention
  prefix_places: tuple[str, ...] = PLACES  # of 'prefix': the attentions that have one; by default all three kinds
  prefix_hidden: int = 0  # of 'prefix': the width of a small network that makes keys and values; 0: they are trained themselves
  sites: tuple[str, ...] = ('query', 'value')  # of 'lora': which matrices get a product of two small ones added
  rank: int = 8  # of 'lora': columns of the first small matrix
  alpha: float = 16.0  # of 'lora': the product of the two is multiplied by alpha / rank
  rank_stabilised: bool = False  # of 'lora': alpha / sqrt(rank) instead (Kalajdzievski 2023)
  bottleneck: int = 24  # of 'adapter': the width of the network
  adapter: str = 'serial'  # of 'adapter': 'serial' reads what a sublayer gives, 'parallel' what it reads
  lora_dropout: float = 0.0  # of 'lora': dropout rate of what its matrices read, in training; not in experts
  token_ids: tuple[int, ...] = ()  # tokens whose rows of the embedding and of the output are trained beside the method
  modules_to_save: tuple[str, ...] = ()  # parameters trained as a whole beside it, named as `sites`: 'lm_head', 'final_norm'
  slots: int = free(8)  # of `infer --delta`: how many deltas of a kind the device holds at a time; others wait in host memory

  def validate(self) -> None:
    choice(self, 'base_dtype', ('float32', 'bfloat16'))
    choice(self, 'prompt_init', ('random', 'vocabulary', 'words', 'text', 'file'))
    in_range(self, 'prompt_length', 1)
    in_range(self, 'decoder_prompt_length', 0)
    if not all(length >= 1 for length in self.lengths):
      raise ConfigError(f'DeltaConfig.lengths = {shown(self.lengths)}: expected numbers of at least 1.')
    in_range(self, 'prefix_length', 1)
    in_range(self, 'prefix_hidden', 0)
    places = self.prefix_places
    if not places or not set(places) <= set(PLACES) or len(set(places)) < len(places):
      raise ConfigError(f'DeltaConfig.prefix_places = {shown(places)}: expected one or several different ones of '
                        f'{", ".join(PLACES)}.')
    choice(self, 'adapter', ('serial', 'parallel'))
    in_range(self, 'bottleneck', 1)
    in_range(self, 'rank', 1)
    in_range(self, 'lora_dropout', 0.0, 0.99)
    if min(self.token_ids, default=0) < 0 or len(set(self.token_ids)) < len(self.token_ids):
      raise ConfigError(f'DeltaConfig.token_ids = {shown(self.token_ids)}: expected different ids of tokens, from 0.')
    in_range(self, 'slots', 1)
    for field in ('words', 'text', 'file'):
      value = getattr(self, f'prompt_{field}')
      if (self.prompt_init == field) != bool(value):
        raise ConfigError(f'DeltaConfig.prompt_{field} = {shown(value)} with DeltaConfig.prompt_init = {self.prompt_init!r}: '
                          f'prompt_{field} goes with {field!r}, which needs it.')
    if len(self.prompt_words) > self.vectors > 0:
      raise ConfigError(f'DeltaConfig.prompt_words has {len(self.prompt_words)} words for {self.vectors} vectors: give as many '
                        'as there are vectors, or fewer.')
    if self.train_base and (self.base or not self.method):
      raise ConfigError('DeltaConfig.train_base = True trains what another run has, base and delta: give --init_from with the '
                        'model_dir of a run that trained a delta, and no --base.')
    for field in ('token_ids', 'modules_to_save'):
      if getattr(self, field) and not self.method:
        raise ConfigError(f"DeltaConfig.{field} = {shown(getattr(self, field))} with DeltaConfig.method = '', which trains all "
                          "parameters: set the method beside which they are trained, for example to 'lora'.")
    if self.base and not self.method:
      raise ConfigError(f"DeltaConfig.base = {shown(self.base)} with DeltaConfig.method = '': set the method, for example to "
                        "'lora', to train a delta on that base.")
    if len(set(self.methods)) < len(self.methods) or not all(self.methods) and self.method:
      raise ConfigError(f"DeltaConfig.method = {self.method!r}: expected the name of a method, or several different ones "
                        "joined by '+'.")

  @property
  def methods(self) -> tuple[str, ...]:
    """The names of the methods."""
    return tuple(self.method.split('+')) if self.method else ()

  @property
  def frozen(self) -> bool:
    """Whether a base stays as it is beside the delta."""
    return bool(self.method) and not self.train_base

  @property
  def parts(self) -> tuple[int, ...]:
    """How many vectors stand in each place of a prompt."""
    return (self.lengths or (self.prompt_length,)) if 'prompt' in self.methods else ()

  @property
  def prompts(self) -> int:
    """How many vectors stand in an input."""
    return sum(self.parts)

  @property
  def vectors(self) -> int:
    """How many vectors a prompt has. As tokens, they have the ids from ModelConfig.vocab_size on, those of the decoder last."""
    return self.prompts + self.decoder_prompt_length if self.parts else 0
