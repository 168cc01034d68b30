"""A trained model that answers: texts in, texts out. `t5x_cpm.inference.load` makes one from a model_dir."""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import backend, tasks, vocabularies
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError, DecodeConfig, MeshConfig, row_features
from t5x_cpm.inference import arguments, decode, programs, score, streamed, text
from t5x_cpm.inference import deltas as deltas_lib
from t5x_cpm.inference.answer import Answer, new_text
from t5x_cpm.infmoe import about, opened

LENGTH_STEP = 64  # lengths are rounded up to multiples of it, so that few shapes are compiled
DeltaNames = str | None | Sequence[str | None]  # the name of a delta, or one for each text


def round_up(length: int) -> int:
  """A length, or 1, rounded up to a multiple of LENGTH_STEP."""
  return -(-max(length, 1) // LENGTH_STEP) * LENGTH_STEP


class Engine:
  """Generates, scores and encodes with one model. Knows neither where the model's parameters lie nor how it is computed.

  A string is one text in every call, the same as a list with it alone: what is returned is a list of one result. Anything but
  texts is refused with a ConfigError. Texts become the tokens that training makes of them; `<span>` is a blank for a model that
  fills blanks, and plain text for one that was trained on inputs and targets.

  Attributes:
    program: the model, ready to run.
    vocabulary: the model's vocabulary.
    config: the run's configuration.
    step: the step of the checkpoint.
    codec: how texts become inputs, and what the model writes becomes a text.
    deltas: what may be added to the model for some texts; None where no delta can be.
  """

  def __init__(self, program: programs.Program, vocabulary: vocabularies.Vocabulary, config: Config, step: int = 0,
               deltas: deltas_lib.Deltas | None = None):
    self.program, self.vocabulary, self.config, self.step = program, vocabulary, config, step
    self.codec, self.deltas = text.Codec(vocabulary, config), deltas
    self._is_told = False

  # What users call.

  def generate(self, texts: Sequence[str] | str, *, delta: DeltaNames = None, **overrides: Any) -> list[str]:
    """Answers texts: blanks, written `<span>`, are filled, and a text without blanks is continued.

    Args:
      texts: inputs, or one.
      delta: the name of the delta that answers them, None for the model alone, or a list with one of these for each text.
      **overrides: fields of DecodeConfig, such as rule='beam' or max_new_tokens=64; the other fields are those of the run.

    Returns:
      For each text its `Answer.output`.

    Raises:
      ConfigError: an input or a field that cannot be.
    """
    config, lines = self.decode_config(**overrides), arguments.texts(texts, 'generate: texts')
    requests = self.requests(lines, arguments.delta_names(delta, len(lines), 'generate: delta'))
    return [answer.output for answer in self.answer_requests(requests, config)]

  def score(self, inputs: Sequence[str] | str, targets: Sequence[str | Sequence[str]] | str, *,
            delta: DeltaNames = None) -> list[float]:
    """Sums of the log-probabilities of given targets.

    Args:
      inputs: texts, or one.
      targets: for each input the text of its blank, or a list of the texts of its blanks in order, all without sentinels; for
        a model that was trained on inputs and targets, the target. For one input, its target itself.
      delta: as in `generate`.

    Returns:
      A number for each input.

    Raises:
      ConfigError: a target does not fit its input, or contains the name of a sentinel, such as '<s_0>'.
    """
    lines, answers = arguments.targets(inputs, targets)
    requests = self.requests(lines, arguments.delta_names(delta, len(lines), 'score: delta'))
    return self.score_ids(requests, [self.codec_of(request.delta).targets(request, target)
                                     for request, target in zip(requests, answers)])[0]

  def choose(self, inputs: Sequence[str] | str, choices: Sequence[Sequence[str]] | Sequence[str], *,
             normalize: bool = False, delta: DeltaNames = None) -> list[int]:
    """For each input, the index of the most likely of its choices.

    Args:
      inputs: texts with one blank, or inputs for a model that was trained on inputs and targets; or one of them.
      choices: for each input the texts to choose from, at least one. For one input, its texts themselves.
      normalize: ranks by the mean log-probability of a token, which does not favour short choices, instead of by the sum.
      delta: as in `generate`.

    Raises:
      ConfigError: as in `score`, or an input without choices.
    """
    lines, options = arguments.choices(inputs, choices)
    normalize = arguments.is_set(normalize, 'choose: normalize')
    requests = self.requests(lines, arguments.delta_names(delta, len(lines), 'choose: delta'))
    pairs = [(request, target) for request, some in zip(requests, options) for target in some]
    scores, lengths = self.score_ids([request for request, _ in pairs],
                                     [self.codec_of(request.delta).targets(request, target) for request, target in pairs])
    best, begin = [], 0
    for some in options:
      mine = slice(begin, begin + len(some))
      best.append(score.best_choice(scores[mine], lengths[mine] if normalize else None))
      begin += len(some)
    return best

  def encode(self, texts: Sequence[str] | str, *, delta: DeltaNames = None) -> list[np.ndarray]:
    """The encoder's output for each text, or for one, [tokens, d_model].

    The tokens are those of the text, with an end of sequence where training has one. Unlike in `generate`, a text that does
    not end with a blank gets none, and InferConfig.input_length does not limit it. The vectors of a prompt are left out.
    `delta` is as in `generate`.
    """
    lines = arguments.texts(texts, 'encode: texts')
    names = arguments.delta_names(delta, len(lines), 'encode: delta')
    codecs = [self.codec_of(name) for name in names]
    read = [codec.encoder_ids(line) for codec, line in zip(codecs, lines)]
    result = [np.zeros(0)] * len(lines)
    for mine in self._batches(names):
      padded = self._padded(mine)
      program, slots = self._program([names[i] for i in padded])
      batch = self._encoder_batch([read[i][0] for i in padded], [codecs[i].row for i in padded])
      hidden = np.asarray(program.encode(batch | slots))
      for row, i in enumerate(mine):
        result[i] = hidden[row, read[i][1]]
    return result

  def stream(self, line: str, *, delta: str | None = None, **overrides: Any) -> Generator[str, None, Answer]:
    """Yields pieces of text as they are generated; the value of the generator is the Answer.

    The pieces add up to what the model wrote: to the answer of `generate` for a text without blanks, and to the text of the
    blank where there is one. Where there are several, '<s_k>' announces the k-th. Beam search knows its answer only at the
    end, and yields it in one piece. `delta` names the delta that answers.

    Raises:
      ConfigError: at once, for an input or a field that cannot be.
    """
    config = self.decode_config(**overrides)
    lines = [arguments.one_text(line, 'stream: line')]
    request, = self.requests(lines, arguments.delta_names(delta, 1, 'stream: delta'))
    return self._stream(request, config)

  def add_delta(self, name: str, model_dir: Any) -> None:
    """Adds a delta that was trained on this model.

    Args:
      name: under which it is asked for.
      model_dir: of the run that trained it, or a copy of the folder `delta` there.

    Raises:
      ConfigError: the name is taken; there is no delta, it is damaged, or it is one of another base or vocabulary.
    """
    if self.deltas is None:
      raise ConfigError('add_delta: this engine was not made by t5x_cpm.load, and cannot serve deltas.')
    self.deltas.add(name, arguments.folder(model_dir, 'add_delta: model_dir'))

  def remove_delta(self, name: str) -> None:
    """Removes a delta. Raises ConfigError if there is none of this name."""
    if self.deltas is None:
      raise ConfigError(f'remove_delta: {deltas_lib.unknown(name, ())}')
    self.deltas.remove(name)

  def close(self) -> None:
    """Ends the threads that read the experts of a bundle, which then can be asked no more. Any other model has none."""
    self.program.close()

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
    return self.answer_requests(self.requests(texts), config)

  def codec_of(self, delta: str) -> text.Codec:
    """The codec of a delta by its name, '' for none. Raises ConfigError for a name that no delta has."""
    known = self.deltas.codecs if self.deltas is not None else {}
    if delta and delta not in known:
      raise ConfigError(deltas_lib.unknown(delta, list(known)))
    return known[delta] if delta else self.codec

  def requests(self, texts: Sequence[str], deltas: Sequence[str] | None = None) -> list[text.Request]:
    """Encodes inputs, each for the delta of a name, '' for none.

    The first time that an input has a mark that was probably meant as a blank, that is told on stderr.
    """
    names = deltas or [''] * len(texts)
    codecs = [self.codec_of(name) for name in names]  # all, before the first text is cut into words
    requests = [codec.request(line)._replace(delta=name) for line, codec, name in zip(texts, codecs, names)]
    self._is_told = self._is_told or text.tell_notes(requests, 'input')
    return requests

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
    names = [request.delta for request in requests]
    result: dict[int, Answer] = {}
    for mine in self._batches(names):
      padded = self._padded(mine)
      program, slots = self._program([names[i] for i in padded])
      batch, prefix, stop, allowed = self._decode_inputs([requests[i] for i in padded])
      numbers = np.asarray([rows[i] for i in padded], np.int32)
      out = jax.device_get(program.generate(
          rule, batch | slots, prefix, stop, allowed=allowed, seed=config.seed, rows_B=numbers))
      result |= {i: self._answer(requests[i], out.tokens[row, :out.length[row]], out.score[row]) for row, i in enumerate(mine)}
    return [result[i] for i in range(len(requests))]

  def score_ids(self, requests: Sequence[text.Request], targets: Sequence[Sequence[int]]) -> tuple[list[float], list[int]]:
    """For each target, given as tokens: the sum of its log-probabilities, and how many tokens it has."""
    names = [request.delta for request in requests]
    sums, counts = [0.0] * len(names), [0] * len(names)
    for mine in self._batches(names):
      padded = self._padded(mine)
      program, slots = self._program([names[i] for i in padded])
      prefixes, ids = [requests[i].prefix for i in padded], [targets[i] for i in padded]
      longest = max(len(prefix) - 1 + len(target) for prefix, target in zip(prefixes, ids))
      batch = score.teacher_forced(
          self._request_batch([requests[i] for i in padded]), prefixes, ids, round_up(longest), self.vocabulary.pad_id)
      log_prob, count = jax.device_get(program.score(score.row_log_probs, batch | slots))
      for row, i in enumerate(mine):
        sums[i], counts[i] = float(log_prob[row]), int(count[row])
    return sums, counts

  # From requests to rows, and from rows to answers.

  def _stream(self, request: text.Request, config: DecodeConfig) -> Generator[str, None, Answer]:
    rule: decode.Rule = decode.make_rule(config, self.vocabulary.pad_id)
    codec = self.codec_of(request.delta)
    rows = self.whole(1)
    program, slots = self._program([request.delta] * rows)
    batch, prefix, stop, allowed = self._decode_inputs([request] * rows)  # equal rows, even where tokens are drawn
    cache = program.start(batch | slots, prefix.shape[1] + rule.max_new_tokens - 1)
    states = decode.python_loop(
        program.step, cache, rule, jnp.asarray(prefix), jnp.asarray(stop), take=program.take, reorder=program.reorder,
        seed=config.seed, rows_B=jnp.zeros(rows, jnp.int32), allowed=jnp.asarray(allowed))
    ids: list[int] = []
    state: Any = None

    def shown() -> Iterator[str]:
      nonlocal state
      for state in states:
        if rule.width == 1:
          ids.append(int(state.next[0]))
          yield codec.shown(request, ids)

    yield from new_text(shown())
    out = jax.device_get(rule.result(state))
    answer = self._answer(request, out.tokens[0, :out.length[0]], out.score[0])
    if rule.width > 1:
      yield codec.shown(request, answer.ids)
    return answer

  def _batches(self, names: Sequence[str]) -> Iterator[list[int]]:
    """Which rows share a batch, as their indices, from the name of each row's delta."""
    size, rows = self.config.infer.batch_size, list(range(len(names)))
    if self.deltas is not None and any(names):
      yield from self.deltas.together(names, size)
      return
    for begin in range(0, len(rows), size):
      yield rows[begin:begin + size]

  def _program(self, names: Sequence[str]) -> tuple[programs.Program, dict[str, np.ndarray]]:
    """What computes the rows of a batch, from the name of each row's delta, and what that adds to the batch."""
    if self.deltas is None or not any(names):
      return self.program, {}
    program, slots = self.deltas.program(names)
    return program, {'delta': slots}

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
      allowed[row, self.codec_of(request.delta).forbidden(request)] = False
    return self._request_batch(requests), prefix, stop, allowed

  def _answer(self, request: text.Request, ids: np.ndarray, log_prob: Any) -> Answer:
    tokens = [int(token) for token in ids]
    output, blanks = self.codec_of(request.delta).output(request, tokens)
    return Answer(output, blanks, float(log_prob), len(tokens), bool(tokens) and tokens[-1] in request.stop, tokens)


def load(model_dir: Any, *, step: int | None = None, config: Config | None = None,
         deltas: Mapping[str, Any] | None = None, memory_gib: float | None = None) -> Engine:
  """See `t5x_cpm.inference.load`."""
  arguments.check_load(step, config)
  given = arguments.deltas(deltas)
  run = about.read_run(model_dir, step)
  trained = tasks.located(run.config, run.started.get('folder', ''))
  config = dataclasses.replace(trained, mesh=MeshConfig()) if config is None else config
  if memory_gib is not None:
    config = dataclasses.replace(config, offload=dataclasses.replace(config.offload, memory_gib=memory_gib))
    config.offload.validate()
  backend.use_cpu_devices(config.mesh.cpu_devices)
  backend.keep_compiled_programs()
  mesh = mesh_lib.make_mesh(config.mesh, backend.devices(local=True))
  folder = run_directory.resolve(model_dir) / 'vocabulary'
  vocabulary = vocabularies.load_saved(folder)
  run_directory.check_vocabulary(model_dir, run.info, vocabulary.fingerprint)
  config = text.of_model(config, trained)
  reader = deltas_lib.Reader(model_dir, run.step, vocabulary, config)
  for name, path in given.items():
    reader.read(name, path)  # a mistake is told before the model is loaded
  program: programs.Program
  if about.is_bundle(model_dir):
    program = streamed.Streamed(opened.open_bundle(model_dir, config))
  else:
    if config.offload.memory_gib:
      raise ConfigError(f'OffloadConfig.memory_gib = {config.offload.memory_gib} is for a bundle, and {model_dir} holds a '
                        'checkpoint, all of which is loaded: `t5x_cpm bundle` makes a bundle of one with experts.')
    functions = programs.build(config, mesh)
    program = programs.Resident(functions, programs.read_params(functions, model_dir, run.step))
  engine = Engine(program, vocabulary, config, run.step, deltas_lib.Deltas(program, reader, config, mesh))
  for name, path in given.items():
    engine.add_delta(name, path)
  return engine
