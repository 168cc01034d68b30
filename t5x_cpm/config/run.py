"""The configuration of a run, as frozen dataclasses that gin can set field by field.

Nothing here imports JAX or TensorFlow, so that a bad configuration is refused before any device work. Each class checks
the values of its own fields in ``validate()``; ``Config.validate()`` calls them all and checks what spans two classes.

A field is *identity* unless it is declared with ``free()``: a run may be resumed with another value of a free field
(step count, logging, mesh), while changing an identity field would silently make it another experiment and is refused.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from t5x_cpm.config.delta import DeltaConfig
from t5x_cpm.config.fields import ConfigError, as_count, choice, free, in_range, shown
from t5x_cpm.config.inherit import InheritConfig
from t5x_cpm.config.model import ModelConfig
from t5x_cpm.config.offload import OffloadConfig
from t5x_cpm.config.task import LocalTaskConfig, TaskConfig
from t5x_cpm.config.teacher import TeacherConfig
from t5x_cpm.config.template import PROMPT
from t5x_cpm.config.typed import Typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Typed):
  """How many devices each mesh axis has (-1: all that the others leave), and what is split over them.

  The batch is split over `data` and `expert`, the width of the model over `model`, experts over `expert`. `sharding` names
  what is split over data as well instead of being copied to every device (the ZeRO stages of Rajbhandari et al. 2020):
  nothing ('none'), the optimizer's state ('optimizer', stage 1), or the parameters too ('full', stage 3).
  """

  data: int = free(-1)
  model: int = free(1)
  expert: int = free(1)
  sharding: str = free('none')
  host_gib: float = free(0.0)  # GiB of a device's optimizer state, then weights, that its host holds; 0: none; -1: all it can
  slices: int = free(1)  # groups of devices joined by a slower network, such as TPU slices; they divide the axis `data`
  cpu_devices: int = free(0)  # run on the CPU as this many devices, to try a mesh; 0: use the devices that are there

  def validate(self) -> None:
    sizes = (self.data, self.model, self.expert)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
      raise ConfigError(
          f'MeshConfig.data = {self.data}, MeshConfig.model = {self.model}, MeshConfig.expert = {self.expert}: expected '
          'positive sizes, at most one of them -1 (all remaining devices).')
    choice(self, 'sharding', ('none', 'optimizer', 'full'))
    in_range(self, 'slices', 1)
    in_range(self, 'host_gib', -1.0)
    in_range(self, 'cpu_devices', 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Typed):
  """Optimizer, learning-rate schedule and regularisation of the update."""

  name: str = 'adamw'  # 'adamw', 'adafactor' or 'sgd'
  learning_rate: float = 0.001  # the peak; for 'noam' and 'inverse_square_root' the peak times sqrt(warmup_steps)
  schedule: str = 'noam'  # 'noam', 'inverse_square_root', 'cosine', 'linear' or 'constant'
  warmup_steps: int = 100  # steps in which the rate rises; for 'inverse_square_root', in which it is constant
  decay_steps: int = 0  # step at which 'cosine' and 'linear' end, warmup included; 0 is TrainConfig.steps
  final_scale: float = 0.0  # 'cosine' and 'linear' end at learning_rate * final_scale
  beta1: float = 0.9  # for 'adamw': decay of the running mean of gradients
  beta2: float = 0.999  # for 'adamw': decay of the running mean of their squares
  epsilon: float = 1e-8  # for 'adamw': added to the square root of that mean of squares
  weight_decay: float = 0.01  # decoupled: scaled by the learning rate; not on norms and relative position tables; 0 is off
  momentum: float = 0.0  # for 'sgd': decay of the running sum of gradients; 0 is off
  adafactor_decay_exponent: float = 0.8  # for 'adafactor': at update t the mean of squares decays by 1 - t ** -exponent
  adafactor_clip_threshold: float = 1.0  # for 'adafactor': greatest RMS of an update before it is scaled; 0 is off
  adafactor_parameter_scale: bool = True  # for 'adafactor': scale the update by the RMS of the parameter, as T5 does
  clip_norm: float = 1.0  # greatest norm of the gradient of all parameters together; 0 is off
  z_loss: float = 0.0  # weight of log(Z)^2 in the loss; 0 is off, T5 uses 1e-4

  def validate(self) -> None:
    choice(self, 'name', ('adamw', 'adafactor', 'sgd'))
    choice(self, 'schedule', ('noam', 'inverse_square_root', 'cosine', 'linear', 'constant'))
    for field in ('learning_rate', 'warmup_steps', 'decay_steps', 'weight_decay', 'clip_norm', 'z_loss'):
      in_range(self, field, 0)
    in_range(self, 'epsilon', 1e-30)
    for field in ('beta1', 'beta2'):  # at 1 the mean of past gradients never sees one, and its correction divides by 0
      in_range(self, field, 0.0, 1.0 - 1e-9)
    for field in ('momentum', 'final_scale'):
      in_range(self, field, 0.0, 1.0)
    in_range(self, 'adafactor_decay_exponent', 0.01, 1.0)
    in_range(self, 'adafactor_clip_threshold', 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Typed):
  """Length of a run, its batches, its seed, and what it starts from."""

  steps: int = free(1000)  # steps of the whole run, those before a resume included
  batch_size: int = 32  # rows (packed sequences) per step, over all devices
  microbatches: int = free(1)  # gradient accumulation: how many microbatches a batch is computed in
  seed: int = 0  # seed of the initial parameters, of dropout, and of the order and the masks of the data
  eval_every: int = free(0)  # steps between evaluations; there is always one at the end, and with 0 no other
  eval_batches: int = free(0)  # how many batches of the validation split are read at most; 0 is all of it
  init_from: str = ''  # a model_dir whose parameters this run starts from; '' is none
  go_on: bool = False  # number steps from where the run of init_from stopped: schedule, rows and curve go on from there
  deterministic: bool = free(False)  # the same bits in every run on GPUs too, by slower kernels, none of them chosen by timing
  check_finite: bool = free(True)  # stop on a loss or gradient that is not finite and name the first bad tensor

  def validate(self) -> None:
    in_range(self, 'steps', 0)
    in_range(self, 'batch_size', 1)
    in_range(self, 'microbatches', 1)
    in_range(self, 'eval_every', 0)
    in_range(self, 'eval_batches', 0)
    in_range(self, 'seed', 0, 2**31 - 1)
    if self.batch_size % self.microbatches:
      raise ConfigError(
          f'TrainConfig.microbatches = {self.microbatches} does not divide TrainConfig.batch_size = {self.batch_size}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Typed):
  """When checkpoints are written and which are kept."""

  every: int = free(1000)  # steps between checkpoints; there is also one at the end and on SIGTERM or SIGINT
  keep: int = free(3)  # how many of the newest checkpoints stay; 0 is all
  keep_best: int = free(0)  # how many of the best that were evaluated stay in addition, saved whatever `every` says
  best_metric: str = free('eval/loss')  # a metric of the evaluations, as eval/NAME; also one of the task's answers or choices
  best_mode: str = free('min')  # whether the least ('min') or the greatest ('max') value is the best
  patience: int = free(0)  # evaluations in a row without a better best_metric after which the run stops; 0: it never does

  def validate(self) -> None:
    in_range(self, 'every', 1)
    in_range(self, 'keep', 0)
    in_range(self, 'keep_best', 0)
    in_range(self, 'patience', 0)
    choice(self, 'best_mode', ('min', 'max'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig(Typed):
  """How long a run of several processes waits for one of them until all stop. One that dies stops the others at once."""

  start_seconds: float = free(300.0)  # within which all processes must have come
  silent_seconds: float = free(60.0)  # without a sign of life from a process: it is frozen, or its network is down
  behind_seconds: float = free(600.0)  # that a process stays at an earlier step than the others: it hangs

  def validate(self) -> None:
    in_range(self, 'start_seconds', 1.0)
    in_range(self, 'silent_seconds', 5.0)
    in_range(self, 'behind_seconds', 5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig(Typed):
  """What a run reports. metrics.jsonl is always written."""

  every: int = free(10)  # steps between lines of metrics
  tensorboard: bool = free(True)  # write event files for TensorBoard
  wandb_project: str = free('')  # project at Weights & Biases; '' is off; needs the wandb package
  profile_start: int = free(-1)  # first step that the profiler records; -1 is none
  profile_steps: int = free(5)  # how many steps it records
  peak_flops: float = free(0.0)  # FLOP/s of one device, for MFU; 0: looked up by its kind, or measured on CPU

  def validate(self) -> None:
    in_range(self, 'every', 1)
    in_range(self, 'profile_start', -1)
    in_range(self, 'profile_steps', 1)
    in_range(self, 'peak_flops', 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig(Typed):
  """How tokens are chosen in `infer` and `eval`."""

  rule: str = free('greedy')  # 'greedy', 'sample' or 'beam'
  max_new_tokens: int = free(128)  # longest answer, in tokens
  temperature: float = free(1.0)  # for 'sample': logits are divided by it
  top_k: int = free(0)  # for 'sample': draw from this many of the most probable tokens; 0 is off
  top_p: float = free(1.0)  # for 'sample': draw from the most probable tokens that together reach this probability; 1 is off
  seed: int = free(0)  # for 'sample': this and the number of the input determine what is drawn
  beam_size: int = free(4)  # for 'beam': how many hypotheses are kept
  length_penalty: float = free(1.0)  # for 'beam': hypotheses are ranked by sum of log-probabilities / length ** length_penalty
  early_stopping: bool = free(False)  # for 'beam': stop as soon as beam_size hypotheses are finished

  def validate(self) -> None:
    choice(self, 'rule', ('greedy', 'sample', 'beam'))
    in_range(self, 'max_new_tokens', 1)
    in_range(self, 'temperature', 1e-6)
    in_range(self, 'top_k', 0)
    in_range(self, 'top_p', 1e-6, 1.0)
    in_range(self, 'beam_size', 1)
    in_range(self, 'seed', 0, 2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig(Typed):
  """How inputs are read and answered together."""

  batch_size: int = free(8)  # how many inputs are answered together
  input_length: int = free(512)  # longest input, in tokens; a longer one is refused unless `truncate`
  truncate: bool = free(False)  # cut off the end of an input that is too long, instead of refusing it
  text_field: str = free('text')  # in .jsonl: the field with the input
  skip_malformed: bool = free(False)  # leave a bad line unanswered instead of refusing the file
  domain: int = free(0)  # for router 'domain': the number, in its mixture, of the task that inputs and other tasks count as

  def validate(self) -> None:
    in_range(self, 'batch_size', 1)
    in_range(self, 'input_length', 4)
    in_range(self, 'domain', 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Typed):
  """Evaluation of checkpoints on tasks."""

  split: str = free('validation')  # the split of the tasks that is read
  checkpoints: str = free('last')  # 'last', 'all', or the number of a step
  batch_size: int = free(32)  # how many rows, or inputs, are evaluated together
  max_examples: int = free(0)  # how many examples of a task are read at most (of a task of text: packed rows); 0 is all

  def validate(self) -> None:
    in_range(self, 'batch_size', 1)
    in_range(self, 'max_examples', 0)
    if self.checkpoints not in ('last', 'all') and as_count(self.checkpoints) is None:
      raise ConfigError(f"EvalConfig.checkpoints = {shown(self.checkpoints)}: expected 'last', 'all' or a step number.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Typed):
  """Everything a run is made of. Gin names a class and a field: `TrainConfig.steps = 200`."""

  model: ModelConfig = ModelConfig()
  mesh: MeshConfig = MeshConfig()
  task: TaskConfig = TaskConfig()
  local_task: LocalTaskConfig = LocalTaskConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  processes: ProcessesConfig = ProcessesConfig()
  metrics: MetricsConfig = MetricsConfig()
  decode: DecodeConfig = DecodeConfig()
  infer: InferConfig = InferConfig()
  eval: EvalConfig = EvalConfig()
  delta: DeltaConfig = DeltaConfig()
  inherit: InheritConfig = InheritConfig()
  teacher: TeacherConfig = TeacherConfig()
  offload: OffloadConfig = OffloadConfig()

  @property
  def marks(self) -> int:
    """How many places for parts of a prompt the inputs of the task have; 0: a prompt stands before them."""
    inputs = self.local_task.templates()[0] if self.task.name.partition(':')[0] == 'local' else None
    return inputs.marks if inputs and self.task.objective == 'pairs' else 0

  def validate(self) -> None:
    """Raises ConfigError for the first value that cannot work."""
    for field in dataclasses.fields(self):
      getattr(self, field.name).validate()
    if self.mesh.host_gib and self.optimizer.name == 'adafactor':
      raise ConfigError("MeshConfig.host_gib: Adafactor's state is too small to be worth moving; set it to 0, or take 'adamw'.")
    if self.delta.prompts and self.task.objective != 'pairs':
      raise ConfigError(f"TaskConfig.objective = {self.task.objective!r}: a prompt stands in the inputs of 'pairs' alone.")
    if self.delta.prompts and self.marks not in (0, len(self.delta.parts)):
      raise ConfigError(f'DeltaConfig.lengths = {self.delta.lengths}: LocalTaskConfig.inputs_template has {self.marks} places '
                        f'{PROMPT}; give the number of vectors of each.')
    if len(self.delta.parts) > 1 and not self.marks:
      raise ConfigError(f'DeltaConfig.lengths = {self.delta.lengths}: LocalTaskConfig.inputs_template must have as many places '
                        f"{PROMPT}, as in '{PROMPT}{{sentence1}}{PROMPT}{{sentence2}}'; one length stands before the inputs.")
    if self.delta.method and self.mesh.host_gib:
      raise ConfigError('MeshConfig.host_gib: the optimizer state of a delta is too small to be worth moving; set it to 0.')
    if self.teacher.given and self.delta.vectors:
      raise ConfigError(f'DeltaConfig.method = {self.delta.method!r} gives rows vectors that a teacher (TeacherConfig) does '
                        'not know: tune a prompt without one.')
    if self.teacher.top_k >= self.model.vocab_size > 0:
      raise ConfigError(f'TeacherConfig.top_k = {self.teacher.top_k}: the model has {self.model.vocab_size} tokens; 0 is all.')
    moe = self.model.moe
    if moe.uses('domain') and self.infer.domain >= moe.num_experts:
      raise ConfigError(
          f'InferConfig.domain = {self.infer.domain}: expected a number below MoEConfig.num_experts = {moe.num_experts}.')


def to_dict(config: Any) -> dict[str, Any]:
  """A dataclass as plain nested dicts, fit for JSON."""
  return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any], cls: type = Config) -> Any:
  """The inverse of `to_dict`.

  Raises:
    ConfigError: an unknown field, which another version of t5x_cpm must have written, or a value of the wrong type.
  """
  if not isinstance(tree, dict):
    raise ConfigError(f'{cls.__name__} is of type {type(tree).__name__}; expected a dict of its fields.')
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(tree) - set(fields))
  if unknown:
    raise ConfigError(f'{cls.__name__} has no field {", ".join(unknown)}: the configuration was written by another version.')
  values = {}
  for name, value in tree.items():
    nested = fields[name].type
    values[name] = from_dict(value, nested) if dataclasses.is_dataclass(nested) and isinstance(nested, type) else value
  return cls(**values)


def identity_differences(saved: Config, given: Config) -> list[str]:
  """Lines 'ModelConfig.d_model: 128 in the checkpoint, 256 now' for every identity field that differs."""
  def compare(old: Any, new: Any) -> Iterator[str]:
    for field in dataclasses.fields(old):
      a, b = getattr(old, field.name), getattr(new, field.name)
      if dataclasses.is_dataclass(a):
        yield from compare(a, b)
      elif not field.metadata.get('free') and a != b:
        yield f'{type(old).__name__}.{field.name}: {a!r} in the checkpoint, {b!r} now'

  return list(compare(saved, given))
