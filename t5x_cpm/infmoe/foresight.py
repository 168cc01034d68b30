"""Whether it pays to guess which experts the next layer will need."""

import dataclasses
from collections.abc import Collection

PAYS = 0.65  # of the experts that are needed: with fewer guessed rightly, a busy disk loses more than it gains
ENOUGH = 64  # guesses, after which their worth is known
SELDOM = 16  # tokens, of which one is guessed for while it does not pay, to see whether that is still so
MEMORY = 0.98  # of earlier guesses, with each new one


@dataclasses.dataclass
class Foresight:
  """Compares guesses with what was needed.

  Attributes:
    mode: 'auto', 'on' or 'off'.
    recall: the share of needed experts that were guessed, of late.
    guesses: how many guesses were compared.
  """

  mode: str
  recall: float = 0.0
  guesses: int = 0

  @property
  def pays(self) -> bool:
    """Whether what is guessed is to be read."""
    return self.mode == 'on' or (self.mode == 'auto' and self.guesses >= ENOUGH and self.recall >= PAYS)

  def looks(self, token: int) -> bool:
    """Whether to guess for a token, by its number."""
    return self.pays or (self.mode == 'auto' and (self.guesses < ENOUGH or token % SELDOM == 0))

  def told(self, guessed: Collection[int], needed: Collection[int]) -> None:
    """Compares a guess with what was needed."""
    right = len(set(guessed) & set(needed)) / max(len(needed), 1)
    self.guesses += 1
    share = max(1 - MEMORY, 1 / self.guesses)
    self.recall += share * (right - self.recall)
