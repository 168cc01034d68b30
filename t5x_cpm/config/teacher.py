"""The configuration of a teacher: a trained model whose distributions another one learns from, for a time."""

import dataclasses

from t5x_cpm.config.fields import ConfigError, choice, free, in_range, shown
from t5x_cpm.config.typed import Typed

SCHEDULES = ('linear', 'cosine', 'step', 'constant')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Typed):
  """How a run learns from a teacher: its loss is (1 - a) times its own and a tau^2 KL(teacher || student) (Qin et al. 2022).

  The share a is `alpha` at first. It falls to 0 within `steps` along a line ('linear') or half a cosine ('cosine'), or is cut
  off there ('step'); with 'constant' it stays to the end of the run. Once it is 0, the teacher is not run any more.
  """

  # the run of the teacher, of the same vocabulary, or a dict of task -> run for tasks of a mixture, whose other tasks then have
  # none; `--teacher` sets it; '' is none
  model_dir: str | dict[str, str] = free('')
  cache: str = free('')  # a folder with the distributions of the teacher, made once by `cache`; `--teacher_cache` sets it
  alpha: float = 1.0  # the share of the teacher in the loss at the first step
  schedule: str = 'linear'  # how that share goes on: 'linear', 'cosine', 'step' or 'constant'
  # steps within which it falls to 0; 0 is TrainConfig.steps: a run that is made longer then goes on with the share of the
  # longer course, and needs its teacher again
  steps: int = 0
  temperature: float = 2.0  # tau, by which the logits of both are divided for the divergence
  top_k: int = 0  # how many tokens of each distribution of the teacher count, the most probable ones; 0 is all
  rest: str = 'bucket'  # for top_k: all other tokens count as one ('bucket') or not at all ('renormalise')
  dtype: str = 'float32'  # the type in which the teacher's weights are held: 'float32' or 'bfloat16'

  def validate(self) -> None:
    choice(self, 'schedule', SCHEDULES)
    choice(self, 'rest', ('bucket', 'renormalise'))
    choice(self, 'dtype', ('float32', 'bfloat16'))
    in_range(self, 'alpha', 0.0, 1.0)
    in_range(self, 'steps', 0)
    in_range(self, 'temperature', 0.01, 100.0)
    in_range(self, 'top_k', 0)
    if isinstance(self.model_dir, dict) and not all((*self.model_dir, *self.model_dir.values())):
      raise ConfigError(f'TeacherConfig.model_dir = {shown(self.model_dir)}: expected a run for each task that it names.')
    if self.schedule == 'constant' and self.steps:
      raise ConfigError(f"TeacherConfig.steps = {self.steps} with TeacherConfig.schedule = 'constant', which lasts to the end "
                        "of the run: set steps to 0, or schedule to 'step'.")
    if self.schedule == 'step' and not self.steps:
      raise ConfigError("TeacherConfig.schedule = 'step' cuts the teacher off after TeacherConfig.steps: give their number; or "
                        "set schedule to 'constant'.")
    if self.rest != 'bucket' and not self.top_k:
      raise ConfigError(f'TeacherConfig.rest = {shown(self.rest)} is about the tokens that top_k leaves out: set '
                        'TeacherConfig.top_k, or leave rest as it is.')

  @property
  def given(self) -> bool:
    """Whether there is a teacher."""
    return bool(self.model_dir or self.cache)

  @property
  def runs(self) -> dict[str, tuple[str, ...]]:
    """The runs of the teachers, each with the tasks whose rows it teaches; () is all rows."""
    if isinstance(self.model_dir, str):
      return {self.model_dir: ()} if self.model_dir else {}
    different = dict.fromkeys(self.model_dir.values())
    return {run: tuple(task for task, its in self.model_dir.items() if its == run) for run in different}

  def guided(self, total: int) -> int:
    """How many steps, the first ones, a teacher guides in a run of `total` steps."""
    return 0 if not self.alpha else min(self.steps or total, total)
