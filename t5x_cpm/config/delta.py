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
  base_dtype: str = 'float32'  # the type in which the base is held: 'float32' or 'bfloat16'
  prompt_length: int = 100  # of 'prompt': how many vectors stand before the input of the encoder
  prompt_init: str = 'vocabulary'  # of 'prompt': what they are at first: 'random', 'vocabulary' (frequent pieces), 'text'
  prompt_text: str = ''  # of 'prompt': the text whose tokens they are at first, again and again; for prompt_init = 'text'
  prefix_length: int = 100  # of 'prefix': how many keys and values stand before those of each attention
  prefix_places: tuple[str, ...] = PLACES  # of 'prefix': the attentions that have one; by default all three kinds
  prefix_hidden: int = 0  # of 'prefix': the width of a small network that makes keys and values; 0: they are trained themselves
  sites: tuple[str, ...] = ('query', 'value')  # of 'lora': which matrices get a product of two small ones added
  rank: int = 8  # of 'lora': columns of the first small matrix
  alpha: float = 16.0  # of 'lora': the product of the two is multiplied by alpha / rank
  rank_stabilised: bool = False  # of 'lora': alpha / sqrt(rank) instead (Kalajdzievski 2023)
  bottleneck: int = 24  # of 'adapter': the width of the network
  adapter: str = 'serial'  # of 'adapter': 'serial' reads what a sublayer gives, 'parallel' what it reads

  def validate(self) -> None:
    choice(self, 'base_dtype', ('float32', 'bfloat16'))
    choice(self, 'prompt_init', ('random', 'vocabulary', 'text'))
    in_range(self, 'prompt_length', 1)
    in_range(self, 'prefix_length', 1)
    in_range(self, 'prefix_hidden', 0)
    places = self.prefix_places
    if not places or not set(places) <= set(PLACES) or len(set(places)) < len(places):
      raise ConfigError(f'DeltaConfig.prefix_places = {shown(places)}: expected one or several different ones of '
                        f'{", ".join(PLACES)}.')
    choice(self, 'adapter', ('serial', 'parallel'))
    in_range(self, 'bottleneck', 1)
    in_range(self, 'rank', 1)
    if (self.prompt_init == 'text') != bool(self.prompt_text):
      raise ConfigError(f"DeltaConfig.prompt_init = {self.prompt_init!r} and prompt_text = {shown(self.prompt_text)}: the text "
                        "goes with 'text', and 'text' needs one.")
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
  def prompts(self) -> int:
    """How many vectors stand before an input. As tokens, they have the ids from ModelConfig.vocab_size on."""
    return self.prompt_length if 'prompt' in self.methods else 0
