"""A trained model that answers: texts in, texts out. `t5x_cpm.inference.load` makes one from a model_dir."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend, vocabularies
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.config import Config, ConfigError, DecodeConfig, MeshConfig
from t5x_cpm.inference import decode, score, text
from t5x_cpm.models import attention, encoder_decoder

LENGTH_STEP = 64  # lengths are rounded up to multiples of it, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model made of one input.

  Attributes:
    output: the input with its blanks filled; for an input without blanks, what the model wrote.
    blanks: the texts of the blanks.
    score: sum of the log-probabilities of the generated tokens; of beams divided by length ** length_penalty.
    tokens: how many were generated.
    finished: False where max_new_tokens cut the answer off.
    ids: the generated tokens.
  """

  output: str
  blanks: list[str]
  score: float
  tokens: int
  finished: bool
  ids: list[int] = dataclasses.field(repr=False)


def round_up(length: int) -> int:
  return -(-max(length, 1) // LENGTH_STEP) * LENGTH_STEP


class Engine:
  """Generates, scores and encodes with one model. Not tied to files.

  Attributes:
    mesh: the devices that share the work: rows of a batch over `data` and `expert`, the model over `model` and `expert`.
    model, params: the model, and its parameters as `Model.prepare` gives them.
    vocabulary, config, step: of the run and its checkpoint.
    codec: how texts become inputs, and answers texts.
  """

  def __init__(self, mesh: jax.sharding.Mesh, model: encoder_decoder.Model, params: Any,
               vocabulary: vocabularies.Vocabulary, config: Config, step: int = 0):
    self.mesh, self.model, self.params, self.vocabulary, self.config, self.step = mesh, model, params, vocabulary, config, step
    self.codec = text.Codec(vocabulary, config)

    def jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
      return jax.jit(mesh_lib.traced(mesh, fn), **options)

    self._generate = jit(functools.partial(_generate, model, vocabulary.bos_id), static_argnames='rule')
    self._start = jit(model.start, static_argnames='max_len')
    self._step = jit(model.step, donate_argnums=1)
    self._score = jit(functools.partial(score.targets_log_prob, model))
    self._encode = jit(model.encode)

  # What users call.

  def generate(self, texts: Sequence[str] | str, **overrides: Any) -> list[str]:
    """Answers texts: blanks written `<span>` are filled, a text without blanks is continued.

    Args:
      texts: inputs.
      **overrides: fields of DecodeConfig, such as rule='beam' or max_new_tokens=64; the others are those of the run.

    Returns:
      For each text its `Answer.output`.
    """
    texts = [texts] if isinstance(texts, str) else texts
    return [answer.output for answer in self.answers(texts, self.decode_config(**overrides))]

  def score(self, inputs: Sequence[str], targets: Sequence[str | Sequence[str]]) -> list[float]:
    """Sums of the log-probabilities of given targets.

    Args:
      inputs: texts.
      targets: for each, the text of its blank, or a list of the texts of its blanks, one for each in order, all without
        sentinels; of a model that was trained on inputs and targets, the target.

    Raises:
      ConfigError: a target that does not fit its input, or has the name of a sentinel in it, such as '<s_0>'.
    """
    if len(inputs) != len(targets):
      raise ConfigError(f'score: {len(inputs)} inputs and {len(targets)} targets: give one target for each input.')
    requests = [self.codec.request(line) for line in inputs]
    return self.score_ids(requests, [self.codec.targets(*pair) for pair in zip(requests, targets)])[0]

  def choose(self, inputs: Sequence[str], choices: Sequence[Sequence[str]], *, normalize: bool = False) -> list[int]:
    """For each input, the index of the most likely of its choices.

    Args:
      inputs: texts with one blank, or inputs of a model that was trained on inputs and targets.
      choices: the texts to choose from, for each input.
      normalize: rank by the mean log-probability of a token, which does not favour short choices, instead of the sum.
    """
    requests = [self.codec.request(line) for line, options in zip(inputs, choices, strict=True) for _ in options]
    targets = [option for options in choices for option in options]
    ids = [self.codec.targets(request, target) for request, target in zip(requests, targets)]
    scores, lengths = self.score_ids(requests, ids)
    best, begin = [], 0
    for options in choices:
      mine = slice(begin, begin + len(options))
      best.append(score.best_choice(scores[mine], lengths[mine] if normalize else None))
      begin += len(options)
    return best

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The encoder's output for each text, [tokens, d_model]."""
    rows = [self.vocabulary.encode_blanks(line) + self.codec.end for line in texts]
    result = []
    for batch_rows in self._batches(rows):
      padded = self._padded(batch_rows)
      batch = self._encoder_batch(padded, [self.config.infer.domain] * len(padded))
      hidden = np.asarray(self._encode(self.params, batch))
      result += [hidden[i, :len(row)] for i, row in enumerate(batch_rows)]
    return result

  def stream(self, line: str, **overrides: Any) -> Generator[str, None, Answer]:
    """Yields pieces of text as they are generated; the generator's value is the Answer.

    Where there are several blanks, the k-th is announced by '<s_k>'. Beam search knows its answer only at the end and yields
    it whole.
    """
    config = self.decode_config(**overrides)
    request = self.codec.request(line)
    rule: decode.Rule = decode.make_rule(config, self.vocabulary.pad_id)
    batch, stop, allowed = self._decode_inputs([request] * self.whole(1))  # equal rows, also where they are drawn
    cache, forced = self._start(self.params, batch, max_len=rule.max_new_tokens)
    prefix = jnp.concatenate([jnp.full((len(stop), 1), self.vocabulary.bos_id, jnp.int32), forced], axis=1)
    ids: list[int] = []
    shown, state = '', None
    for state in decode.python_loop(functools.partial(self._step, self.params), cache, rule, prefix, jnp.asarray(stop),
                                    take=attention.take, reorder=attention.reorder, seed=config.seed,
                                    rows_B=jnp.zeros(len(stop), jnp.int32), allowed=jnp.asarray(allowed)):
      if rule.width > 1:
        continue
      ids.append(int(state.next[0]))
      whole = self._shown(request, ids)
      if whole.startswith(shown) and not whole.endswith('\ufffd'):  # else the last character is not complete yet
        yield whole[len(shown):]
        shown = whole
    assert state is not None
    out = jax.device_get(rule.result(state))
    answer = self._answer(request, out.tokens[0, :out.length[0]], out.score[0])
    if rule.width > 1:
      yield self._shown(request, answer.ids)
    return answer

  # What files and evaluation call.

  def whole(self, rows: int) -> int:
    """Rows, rounded up to what the devices of the mesh share evenly."""
    share = self.mesh.shape['data'] * self.mesh.shape['expert']
    return -(-rows // share) * share

  def read(self, model_dir: Any, step: int) -> None:
    """Takes the parameters of another checkpoint of the run."""
    self.params, self.step = _params(self.mesh, self.config.mesh, self.model, model_dir, step), step

  def decode_config(self, **overrides: Any) -> DecodeConfig:
    """The run's DecodeConfig with other values; raises ConfigError for a name or value that it does not have."""
    names = {field.name for field in dataclasses.fields(DecodeConfig)}
    for name in overrides:
      if name not in names:
        raise ConfigError(f'{name!r} is no field of DecodeConfig: expected one of {", ".join(sorted(names))}.')
    config = dataclasses.replace(self.config.decode, **overrides)
    config.validate()
    return config

  def answers(self, texts: Sequence[str], config: DecodeConfig, rows: Sequence[int] | None = None) -> list[Answer]:
    """Answers texts in batches of InferConfig.batch_size.

    Args:
      texts: inputs, none longer than InferConfig.input_length tokens unless InferConfig.truncate.
      config: how tokens are chosen.
      rows: numbers that sampling draws by; default 0, 1, ...
    """
    return self.answer_requests([self.codec.request(line) for line in texts], config, rows)

  def answer_requests(self, requests: Sequence[text.Request], config: DecodeConfig,
                      rows: Sequence[int] | None = None) -> list[Answer]:
    """As `answers`, for inputs that are encoded."""
    rule = decode.make_rule(config, self.vocabulary.pad_id)
    rows = range(len(requests)) if rows is None else rows
    result = []
    for mine in self._batches(list(zip(requests, rows))):
      padded = self._padded(mine)
      batch, stop, allowed = self._decode_inputs([request for request, _ in padded])
      numbers = np.asarray([row for _, row in padded], np.int32)
      out = jax.device_get(self._generate(self.params, batch, stop, allowed, config.seed, numbers, rule=rule))
      result += [self._answer(request, out.tokens[i, :out.length[i]], out.score[i]) for i, (request, _) in enumerate(mine)]
    return result

  def score_ids(self, requests: Sequence[text.Request], targets: Sequence[Sequence[int]]) -> tuple[list[float], list[int]]:
    """Sums of log-probabilities, and numbers of tokens, of targets that are encoded."""
    sums, counts = [], []
    for mine in self._batches(list(zip(requests, targets))):
      padded = self._padded(mine)
      ids = [target for _, target in padded]
      batch = score.teacher_forced(
          self._request_batch([request for request, _ in padded]), ids, round_up(max(map(len, ids))), self.vocabulary.bos_id,
          self.vocabulary.pad_id)
      log_prob, count = jax.device_get(self._score(self.params, batch))
      sums += log_prob[:len(mine)].tolist()
      counts += count[:len(mine)].tolist()
    return sums, counts

  # Parts.

  def _shown(self, request: text.Request, ids: Sequence[int]) -> str:
    hidden = self.vocabulary.sentinels[0] if request.blanks == 1 else None
    return self.vocabulary.decode([token for token in self.codec.before_stop(request, ids) if token != hidden])

  def _batches(self, items: list) -> Iterator[list]:
    size = self.config.infer.batch_size
    for begin in range(0, len(items), size):
      yield items[begin:begin + size]

  def _padded(self, items: list) -> list:
    """With the last repeated up to a power of two or the batch size, so that few shapes are compiled; whole over the mesh."""
    rows = self.whole(min(1 << (len(items) - 1).bit_length(), self.config.infer.batch_size))
    return items + [items[-1]] * (rows - len(items))  # equal rows end together: they cost no step

  def _request_batch(self, requests: Sequence[text.Request]) -> dict[str, np.ndarray]:
    return self._encoder_batch([request.ids for request in requests], [request.domain for request in requests])

  def _encoder_batch(self, rows: Sequence[Sequence[int]], domains: Sequence[int]) -> dict[str, np.ndarray]:
    tokens, segments = score.pad(rows, round_up(max(map(len, rows))), self.vocabulary.pad_id)
    batch = {'encoder_input_tokens': tokens, 'encoder_segment_ids': segments}
    if self.config.model.moe.by_domain:
      batch['domain'] = np.asarray(domains, np.int32)
    return batch

  def _decode_inputs(self, requests: Sequence[text.Request]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The encoder batch, stop tokens [B, 2] and allowed tokens [B, V]."""
    V = self.model.config.vocab_size
    stop = np.full((len(requests), 2), -1, np.int32)
    allowed = np.broadcast_to(np.arange(V) < self.vocabulary.size, (len(requests), V)).copy()
    for row, request in enumerate(requests):
      stop[row, :len(request.stop)] = request.stop
      allowed[row, self.codec.forbidden(request)] = False
    return self._request_batch(requests), stop, allowed

  def _answer(self, request: text.Request, ids: np.ndarray, log_prob: Any) -> Answer:
    tokens = [int(token) for token in ids]
    output, blanks = self.codec.output(request, tokens)
    return Answer(output, blanks, float(log_prob), len(tokens), bool(tokens) and tokens[-1] in request.stop, tokens)


def _generate(model: encoder_decoder.Model, start: int, params: Any, batch: dict[str, jax.Array], stop_BE: jax.Array,
              allowed_BV: jax.Array, seed: jax.Array, rows_B: jax.Array, *, rule: Any) -> decode.Output:
  """Encoder and the whole decoding loop as one program."""
  cache, forced_BF = model.start(params, batch, rule.max_new_tokens)
  prefix_BP = jnp.concatenate([jnp.full((stop_BE.shape[0], 1), start, jnp.int32), forced_BF], axis=1)
  return decode.while_loop(
      functools.partial(model.step, params), cache, rule, prefix_BP, stop_BE, take=attention.take, reorder=attention.reorder,
      seed=seed, rows_B=rows_B, allowed=allowed_BV)


def _params(mesh: jax.sharding.Mesh, config: MeshConfig, model: encoder_decoder.Model, model_dir: Any, step: int) -> Any:
  """A checkpoint's parameters in the form for inference, each device with its part."""
  shapes, axes = model.abstract()
  rules = mesh_lib.STATE_RULES[config.sharding][0]
  mesh_lib.check_tree_divides(mesh, shapes, axes, rules)
  params = arrays.load_params(model_dir, step=step, into=shapes, shardings=mesh_lib.shardings(mesh, axes, rules))
  return jax.jit(model.prepare)(params)


def load(model_dir: Any, *, step: int | None = None, config: Config | None = None) -> Engine:
  """See `t5x_cpm.inference.load`."""
  run = run_directory.read_run(model_dir, step)
  config = dataclasses.replace(run.config, mesh=MeshConfig()) if config is None else config
  backend.use_cpu_devices(config.mesh.cpu_devices)
  backend.keep_compiled_programs()
  model = encoder_decoder.build(run.config.model)
  mesh = mesh_lib.make_mesh(config.mesh, jax.local_devices())
  folder = run_directory.resolve(model_dir) / 'vocabulary'
  vocabulary = vocabularies.load_saved(folder)
  trained = run.info.get('vocabulary')
  if trained is not None and trained != vocabulary.fingerprint:
    raise ConfigError(
        f'{folder} holds another vocabulary ({vocabulary.fingerprint}) than the model was trained with ({trained}).')
  config = dataclasses.replace(config, model=run.config.model)
  return Engine(mesh, model, _params(mesh, config.mesh, model, model_dir, run.step), vocabulary, config, run.step)
