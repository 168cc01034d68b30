"""A trained model that answers: texts in, texts out. `t5x_cpm.inference.load` makes one from a model_dir."""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend, vocabularies
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError, DecodeConfig, MeshConfig, row_features
from t5x_cpm.inference import decode, programs, score, text

LENGTH_STEP = 64  # lengths are rounded up to multiples of it, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer to one input.

  Attributes:
    output: the input with its blanks filled, or for an input without blanks what the model wrote.
    blanks: the texts of the blanks.
    score: the sum of the log-probabilities of the generated tokens; with beams divided by length ** length_penalty.
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
  """A length, or 1, rounded up to a multiple of LENGTH_STEP."""
  return -(-max(length, 1) // LENGTH_STEP) * LENGTH_STEP


class Engine:
  """Generates, scores and encodes with one model. Knows neither where the model's parameters lie nor how it is computed.

  Attributes:
    program: the model, ready to run.
    vocabulary: the model's vocabulary.
    config: the run's configuration.
    step: the step of the checkpoint.
    codec: how texts become inputs, and what the model writes becomes a text.
  """

  def __init__(self, program: programs.Program, vocabulary: vocabularies.Vocabulary, config: Config, step: int = 0):
    self.program, self.vocabulary, self.config, self.step = program, vocabulary, config, step
    self.codec = text.Codec(vocabulary, config)

  # What users call.

  def generate(self, texts: Sequence[str] | str, **overrides: Any) -> list[str]:
    """Answers texts: blanks, written `<span>`, are filled, and a text without blanks is continued.

    Args:
      texts: inputs.
      **overrides: fields of DecodeConfig, such as rule='beam' or max_new_tokens=64; the other fields are those of the run.

    Returns:
      For each text its `Answer.output`.
    """
    texts = [texts] if isinstance(texts, str) else texts
    return [answer.output for answer in self.answers(texts, self.decode_config(**overrides))]

  def score(self, inputs: Sequence[str], targets: Sequence[str | Sequence[str]]) -> list[float]:
    """Sums of the log-probabilities of given targets.

    Args:
      inputs: texts.
      targets: for each input the text of its blank, or a list of the texts of its blanks in order, all without sentinels; for
        a model that was trained on inputs and targets, the target.

    Raises:
      ConfigError: a target does not fit its input, or contains the name of a sentinel, such as '<s_0>'.
    """
    if len(inputs) != len(targets):
      raise ConfigError(f'score: {len(inputs)} inputs and {len(targets)} targets: give one target for each input.')
    requests = [self.codec.request(line) for line in inputs]
    return self.score_ids(requests, [self.codec.targets(*pair) for pair in zip(requests, targets)])[0]

  def choose(self, inputs: Sequence[str], choices: Sequence[Sequence[str]], *, normalize: bool = False) -> list[int]:
    """For each input, the index of the most likely of its choices.

    Args:
      inputs: texts with one blank, or inputs for a model that was trained on inputs and targets.
      choices: for each input the texts to choose from.
      normalize: ranks by the mean log-probability of a token, which does not favour short choices, instead of by the sum.
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
    ids = [self.vocabulary.encode_blanks(line) + self.codec.end for line in texts]
    result = []
    for some in self._batches(ids):
      padded = self._padded(some)
      hidden = np.asarray(self.program.encode(self._encoder_batch(padded, [self.codec.row] * len(padded))))
      result += [hidden[i, :len(tokens)] for i, tokens in enumerate(some)]
    return result

  def stream(self, line: str, **overrides: Any) -> Generator[str, None, Answer]:
    """Yields pieces of text as they are generated; the value of the generator is the Answer.

    Where there are several blanks, '<s_k>' announces the k-th. Beam search knows its answer only at the end, and yields it in
    one piece.
    """
    config = self.decode_config(**overrides)
    request = self.codec.request(line)
    rule: decode.Rule = decode.make_rule(config, self.vocabulary.pad_id)
    program, rows = self.program, self.whole(1)
    batch, prefix, stop, allowed = self._decode_inputs([request] * rows)  # equal rows, even where tokens are drawn
    cache = program.start(batch, prefix.shape[1] + rule.max_new_tokens - 1)
    states = decode.python_loop(
        program.step, cache, rule, jnp.asarray(prefix), jnp.asarray(stop), take=program.take, reorder=program.reorder,
        seed=config.seed, rows_B=jnp.zeros(rows, jnp.int32), allowed=jnp.asarray(allowed))
    ids: list[int] = []
    yielded, state = '', None
    for state in states:
      if rule.width > 1:
        continue
      ids.append(int(state.next[0]))
      written = self._shown(request, ids)
      if written.startswith(yielded) and not written.endswith('\ufffd'):  # else the last character is not complete yet
        yield written[len(yielded):]
        yielded = written
    assert state is not None
    out = jax.device_get(rule.result(state))
    answer = self._answer(request, out.tokens[0, :out.length[0]], out.score[0])
    if rule.width > 1:
      yield self._shown(request, answer.ids)
    return answer

  # What files and evaluation call.

  def whole(self, rows: int) -> int:
    """A number of rows, rounded up to one that the devices can share evenly."""
    return self.program.whole(rows)

  def read(self, model_dir: Any, step: int) -> None:
    """Loads the parameters of another checkpoint of the run."""
    self.program.read(model_dir, step)
    self.step = step

  def decode_config(self, **overrides: Any) -> DecodeConfig:
    """The run's DecodeConfig with other values. Raises ConfigError for a name that is not a field, or a value out of range."""
    names = {field.name for field in dataclasses.fields(DecodeConfig)}
    for name in overrides:
      if name not in names:
        raise ConfigError(f'{name!r} is no field of DecodeConfig: expected one of {", ".join(sorted(names))}.')
    config = dataclasses.replace(self.config.decode, **overrides)
    config.validate()
    return config

  def answers(self, texts: Sequence[str], config: DecodeConfig) -> list[Answer]:
    """Answers texts in batches of InferConfig.batch_size.

    Args:
      texts: inputs; none is longer than InferConfig.input_length tokens, unless InferConfig.truncate.
      config: how tokens are chosen.
    """
    return self.answer_requests([self.codec.request(line) for line in texts], config)

  def answer_requests(self, requests: Sequence[text.Request], config: DecodeConfig,
                      rows: Sequence[int] | None = None) -> list[Answer]:
    """Answers inputs that are encoded already.

    Args:
      requests: from the codec.
      config: how tokens are chosen.
      rows: a number for each, on which the draws of sampling depend; default 0, 1, ...
    """
    rule = decode.make_rule(config, self.vocabulary.pad_id)
    rows = range(len(requests)) if rows is None else rows
    result = []
    for mine in self._batches(list(zip(requests, rows))):
      padded = self._padded(mine)
      batch, prefix, stop, allowed = self._decode_inputs([request for request, _ in padded])
      numbers = np.asarray([row for _, row in padded], np.int32)
      out = jax.device_get(self.program.generate(
          rule, batch, prefix, stop, allowed=allowed, seed=config.seed, rows_B=numbers))
      result += [self._answer(request, out.tokens[i, :out.length[i]], out.score[i]) for i, (request, _) in enumerate(mine)]
    return result

  def score_ids(self, requests: Sequence[text.Request], targets: Sequence[Sequence[int]]) -> tuple[list[float], list[int]]:
    """For each target, given as tokens: the sum of its log-probabilities, and how many tokens it has."""
    sums, counts = [], []
    for mine in self._batches(list(zip(requests, targets))):
      padded_requests, ids = zip(*self._padded(mine))
      prefixes = [request.prefix for request in padded_requests]
      longest = max(len(prefix) - 1 + len(target) for prefix, target in zip(prefixes, ids))
      batch = score.teacher_forced(
          self._request_batch(padded_requests), prefixes, ids, round_up(longest), self.vocabulary.pad_id)
      log_prob, count = jax.device_get(self.program.score(score.row_log_probs, batch))
      sums += log_prob[:len(mine)].tolist()
      counts += count[:len(mine)].tolist()
    return sums, counts

  # From requests to rows, and from rows to answers.

  def _shown(self, request: text.Request, ids: Sequence[int]) -> str:
    hidden = self.vocabulary.sentinels[0] if request.blanks == 1 else None
    return self.vocabulary.decode([token for token in self.codec.before_stop(request, ids) if token != hidden])

  def _batches(self, items: list) -> Iterator[list]:
    size = self.config.infer.batch_size
    for begin in range(0, len(items), size):
      yield items[begin:begin + size]

  def _padded(self, items: list) -> list:
    """Repeats the last item up to a power of two or the batch size, so that few shapes are compiled.

    The number is rounded up to one that the devices can share evenly.
    """
    rows = self.whole(min(1 << (len(items) - 1).bit_length(), self.config.infer.batch_size))
    return items + [items[-1]] * (rows - len(items))  # equal rows end together, so that they cost no step

  def _request_batch(self, requests: Sequence[text.Request]) -> dict[str, np.ndarray]:
    return self._encoder_batch([request.ids for request in requests], [request.row for request in requests])

  def _encoder_batch(self, ids: Sequence[Sequence[int]], rows: Sequence[Mapping[str, int]]) -> dict[str, np.ndarray]:
    """The encoder's features, from the tokens of each row and what else it carries."""
    tokens, segments = score.pad(ids, round_up(max(map(len, ids))), self.vocabulary.pad_id)
    batch = {'encoder_input_tokens': tokens, 'encoder_segment_ids': segments}
    return batch | {name: np.array([row[name] for row in rows], np.int32) for name in row_features.names(self.config)}

  def _decode_inputs(
      self, requests: Sequence[text.Request]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """The encoder's features, prefixes [B, P], stop tokens [B, 2] and allowed tokens [B, V]; -1 fills what is shorter."""
    V = self.config.model.vocab_size
    prefix = np.full((len(requests), max(len(request.prefix) for request in requests)), -1, np.int32)
    stop = np.full((len(requests), 2), -1, np.int32)
    allowed = np.broadcast_to(np.arange(V) < self.vocabulary.size, (len(requests), V)).copy()
    for row, request in enumerate(requests):
      prefix[row, :len(request.prefix)] = request.prefix
      stop[row, :len(request.stop)] = request.stop
      allowed[row, self.codec.forbidden(request)] = False
    return self._request_batch(requests), prefix, stop, allowed

  def _answer(self, request: text.Request, ids: np.ndarray, log_prob: Any) -> Answer:
    tokens = [int(token) for token in ids]
    output, blanks = self.codec.output(request, tokens)
    return Answer(output, blanks, float(log_prob), len(tokens), bool(tokens) and tokens[-1] in request.stop, tokens)


def load(model_dir: Any, *, step: int | None = None, config: Config | None = None) -> Engine:
  """See `t5x_cpm.inference.load`."""
  run = run_directory.read_run(model_dir, step)
  config = dataclasses.replace(run.config, mesh=MeshConfig()) if config is None else config
  backend.use_cpu_devices(config.mesh.cpu_devices)
  backend.keep_compiled_programs()
  mesh = mesh_lib.make_mesh(config.mesh, backend.devices(local=True))
  folder = run_directory.resolve(model_dir) / 'vocabulary'
  vocabulary = vocabularies.load_saved(folder)
  run_directory.check_vocabulary(model_dir, run.info, vocabulary.fingerprint)
  delta = dataclasses.replace(run.config.delta, base=config.delta.base or run.config.delta.base)
  config = dataclasses.replace(config, model=run.config.model, delta=delta)
  functions = programs.build(config, mesh)
  program = programs.Resident(functions, programs.read_params(functions, model_dir, run.step))
  return Engine(program, vocabulary, config, run.step)
