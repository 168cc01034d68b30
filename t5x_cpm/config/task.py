"""The configuration of a run's data: a task, and how its text becomes rows."""

import dataclasses
import re

from t5x_cpm.config import template
from t5x_cpm.config.fields import ConfigError, choice, free, in_range, shown
from t5x_cpm.config.template import PROMPT, Template
from t5x_cpm.config.typed import Typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(Typed):
  """The data of a run: a registered SeqIO task or mixture, and how its text becomes rows of a batch."""

  name: str = 'quickstart'  # the task or mixture; `t5x_cpm tasks` lists them
  vocabulary: str = ''  # 'cpm2:FILE', 'cpm1:FILE', 'sentencepiece:FILE'; '' is the task's own
  objective: str = 'isolated'  # 'isolated', 'cpm2', 't5', 'prefix_lm', or 'pairs' for tasks that have inputs and targets
  target_form: str = 'text'  # for 'pairs': targets and an end of sequence ('text'); or, as CPM-2, between sentinels ('span')
  encoder_length: int = 512  # encoder tokens of a row, padding included
  decoder_length: int = 128  # decoder tokens of a row, padding included
  noise_density: float = 0.15  # fraction of the tokens that span corruption masks
  mean_span_length: float = 3.0  # mean number of tokens in a masked span; 't5' and 'cpm2' always mask the end
  cache_dir: str = free('')  # folder of the caches; '' is $T5X_CPM_CACHE, or else ~/.cache/t5x_cpm
  cache_processes: int = free(0)  # processes that make a cache; 0: one per core

  def validate(self) -> None:
    choice(self, 'objective', ('isolated', 'cpm2', 't5', 'prefix_lm', 'pairs'))
    choice(self, 'target_form', ('text', 'span'))
    if self.target_form == 'span' and self.objective != 'pairs':
      raise ConfigError(f"TaskConfig.target_form = 'span' is a form of pairs, and TaskConfig.objective = {self.objective!r}: "
                        "set TaskConfig.objective = 'pairs', or leave target_form as it is.")
    in_range(self, 'encoder_length', 4)
    in_range(self, 'decoder_length', 4)
    in_range(self, 'noise_density', 0.01, 0.9)
    in_range(self, 'mean_span_length', 1.0)
    in_range(self, 'cache_processes', 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTaskConfig(Typed):
  """The task named 'local': the user's own text files, from gin alone.

  `files` is a glob, or, for a mixture, a dict of name -> glob. `rates` gives these names their shares of the rows, in numbers
  of any sum, each at least one row in 1,048,576; {} is equal shares. Files end in .txt, .jsonl (one JSON object a line), or
  either with .gz.
  """

  files: str | dict[str, str] = ''
  rates: dict[str, float] = dataclasses.field(default_factory=dict)
  validation_files: str | dict[str, str] = ''  # as `files`; '': a fraction of the documents of `files`
  validation_fraction: float = 0.01  # of the documents, where `validation_files` is empty
  text_document: str = 'line'  # in .txt a document is a 'line', a 'paragraph' (up to a blank line) or the whole 'file'
  text_field: str = 'text'  # in .jsonl: the field with the text, for the pre-training objectives
  inputs_field: str = 'inputs'  # in .jsonl: the field with the inputs, for objective 'pairs'
  targets_field: str = 'targets'  # in .jsonl: the field with the targets, for objective 'pairs'
  inputs_template: str = ''  # in .jsonl, for 'pairs': the inputs made of any fields, as '“{sentence1}”与“{sentence2}”的意思'
  targets_template: str = ''  # in .jsonl, for 'pairs': the targets made of any fields, as '{label}'
  skip_malformed: bool = False  # True: a malformed line is counted and left out; False: it is an error

  def validate(self) -> None:
    choice(self, 'text_document', ('line', 'paragraph', 'file'))
    in_range(self, 'validation_fraction', 0.0, 0.5)
    self.templates()
    for field in ('files', 'validation_files'):
      value = getattr(self, field)
      if isinstance(value, dict) and not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise ConfigError(f'LocalTaskConfig.{field} = {shown(value)}: expected a glob, or a dict of name -> glob.')
      if isinstance(value, str) and re.fullmatch(r"""[\[(]\s*['"].*['"],?\s*[\])]""", value):  # as a flag gives a list
        raise ConfigError(f'LocalTaskConfig.{field} = {shown(value)} is a list; expected one path, or a dict of name -> path.')
    if isinstance(self.validation_files, dict):
      if not isinstance(self.files, dict):
        raise ConfigError(f'LocalTaskConfig.validation_files = {shown(self.validation_files)}: expected one glob, as '
                          f'LocalTaskConfig.files = {shown(self.files)} is one.')
      unknown = sorted(set(self.validation_files) - set(self.files))
      if unknown:
        raise ConfigError(f'LocalTaskConfig.validation_files names {shown(unknown)}, but LocalTaskConfig.files names '
                          f'{shown(sorted(self.files))}: name only these.')
    if self.rates:
      names = set(self.files) if isinstance(self.files, dict) else set()
      if set(self.rates) != names:
        raise ConfigError(
            f'LocalTaskConfig.rates names {shown(sorted(self.rates))}, but LocalTaskConfig.files names {shown(sorted(names))}: '
            'give one rate for each name.')
      for name, rate in self.rates.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0:
          raise ConfigError(f'LocalTaskConfig.rates[{shown(name)}] = {shown(rate)}: expected a positive number.')

  def templates(self) -> tuple[Template | None, Template | None]:
    """Those of inputs and targets; None where the text is that of a field.

    Raises:
      ConfigError: one that cannot be read, or targets with places for a prompt.
    """
    inputs, targets = (template.parse(text, f'LocalTaskConfig.{name}') if text else None for name, text in (
        ('inputs_template', self.inputs_template), ('targets_template', self.targets_template)))
    if targets and targets.marks:
      raise ConfigError(f'LocalTaskConfig.targets_template = {shown(self.targets_template)}: {PROMPT} stands in inputs alone.')
    return inputs, targets
