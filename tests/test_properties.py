"""What must hold for any input: gin text, JSON lines, vocabularies, packing, corruption. A failure says how to repeat it."""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import tempfile
import typing

import numpy as np
import pytest
import small_data
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from t5x_cpm import vocabularies
from t5x_cpm.config import Config, ConfigError, LocalTaskConfig, TrainConfig, gin
from t5x_cpm.data import objectives, packing, pieces
from t5x_cpm.data.cache import DataError
from t5x_cpm.tasks import text_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = settings(max_examples=60, deadline=None, database=None, print_blob=True)
FEW = settings(EXAMPLES, max_examples=12)

# ---- gin ----


def fields_of(cls, path=()):
  """(path of the dataclass in Config, name, annotation) of every field of a dataclass and of those within it."""
  for name, kind in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(kind):
      yield from fields_of(kind, (*path, name))
    else:
      yield path, name, kind


def replace(config, path, name, value):
  if not path:
    return dataclasses.replace(config, **{name: value})
  return dataclasses.replace(config, **{path[0]: replace(getattr(config, path[0]), path[1:], name, value)})


FIELDS = list(fields_of(Config))
NAMED = {value for cls in typing.get_type_hints(Config).values() if dataclasses.is_dataclass(cls)
         for field in dataclasses.fields(cls) if isinstance(value := field.default, str)}
NAMED |= {'t5', 'cpm2', 'pairs', 'beam', 'greedy', 'sample', 'adafactor', 'cosine', 'full', 'dots', 'file'}


def values(kind):
  """Values of an annotation."""
  if typing.get_origin(kind) in (dict, list, tuple):
    inner = [values(argument) for argument in typing.get_args(kind) if argument is not Ellipsis]
    if typing.get_origin(kind) is dict:
      return st.dictionaries(*inner, max_size=3)
    many = st.lists(inner[0], max_size=3)
    return many if typing.get_origin(kind) is list else many.map(tuple)
  if typing.get_args(kind):
    return st.one_of(*map(values, typing.get_args(kind)))
  return {
      bool: st.booleans(), int: st.integers(-2, 10**6),
      float: st.sampled_from([math.inf, math.nan, 1e308, 5e-324]) | st.floats() | st.floats(0, 1),
      str: st.sampled_from(sorted(NAMED)) | st.text(max_size=12)}.get(kind, st.none())


@st.composite
def configs(draw):
  """A configuration of which some fields are not the defaults: those of a draw that are valid."""
  config = Config()
  for path, name, kind in draw(st.lists(st.sampled_from(FIELDS), max_size=12)):
    value = draw(values(kind))
    try:
      changed = replace(config, path, name, value)
      changed.validate()
    except ConfigError:
      continue
    config = changed
  return config


def load_gin(content: bytes) -> Config:
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'a.gin'
    file.write_bytes(content)
    return gin.load([str(file)])


@EXAMPLES
@given(configs())
def test_a_config_that_was_dumped_is_loaded_as_it_was(config):
  assert load_gin(gin.dump(config).encode()) == config


def members(kind):
  """Whether a value is one that a field of this annotation may hold, written without the code under test."""
  if typing.get_origin(kind) is dict:
    of_key, of_value = map(members, typing.get_args(kind))
    return lambda value: isinstance(value, dict) and all(of_key(k) and of_value(v) for k, v in value.items())
  if typing.get_origin(kind) is tuple:  # a list stands for one
    of_item = members(typing.get_args(kind)[0])
    return lambda value: isinstance(value, list | tuple) and all(map(of_item, value))
  if typing.get_args(kind):
    several = [members(argument) for argument in typing.get_args(kind)]
    return lambda value: any(one(value) for one in several)
  return {
      bool: lambda value: isinstance(value, bool),
      int: lambda value: type(value) is int and abs(value) < 2**63,
      float: lambda value: type(value) in (int, float) and abs(value) < 2**1024,
      str: lambda value: isinstance(value, str) and '\0' not in value and value == value.encode('utf-8', 'ignore').decode(),
  }[kind]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=4)
    | st.sampled_from([2**63, 10**400, math.inf, math.nan, np.float64(0.5), np.int64(3), b'x', TrainConfig, TrainConfig()]),
    lambda inner: st.lists(inner, max_size=2) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4)


@settings(EXAMPLES, max_examples=300)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_a_class_is_made_from_values_that_fit_its_fields_and_no_others(field, value):
  path, name, kind = field
  cls = type(functools.reduce(getattr, path, Config()))
  try:
    made = getattr(cls(**{name: value}), name)
  except ConfigError as error:
    assert str(error).startswith(f'{cls.__name__}.{name} = ') and '\n' not in str(error) and len(str(error)) < 400
    assert not members(kind)(value)
  else:
    assert made == (tuple(value) if isinstance(made, tuple) else value)
    assert not {type(made), *map(type, made.values() if isinstance(made, dict) else ())} & {np.float64}
    assert members(kind)(made)


def test_every_class_of_a_config_checks_its_types():
  for name, cls in typing.get_type_hints(Config).items():
    with pytest.raises(ConfigError, match=f'Config.{name} is of type dict; expected {cls.__name__}'):
      Config(**{name: {}})
    with pytest.raises(ConfigError, match=r'is of type object; expected'):
      cls(**{dataclasses.fields(cls)[0].name: object()})


GIN_WORDS = [
    'TrainConfig', 'LocalTaskConfig', '.', 'steps', 'files', ':', '=', ' = ', '3', '-', '1e400', "'", '"', '"""', "'''", '%',
    '%X', 'X', '@', '@f()', '(', ')', '[', ']', '{', '}', ',', '\n', '\n  ', '\t', 'include ', 'import ', "'a.gin'", '/',
    'eval/', '#', '\\', 'None', 'True', '\0', '\ufeff', '\r', '文', '0b1', '1_', ' ', '*', 'b"x"', '1j', ';']


@settings(EXAMPLES, max_examples=300)
@given(st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(GIN_WORDS), max_size=14).map(lambda x: ''.join(x).encode())))
def test_any_gin_text_is_a_config_or_a_config_error(content):
  try:
    config = load_gin(content)
  except ConfigError:
    return
  assert isinstance(config, Config)


@settings(EXAMPLES, max_examples=150)
@given(st.lists(st.sampled_from(GIN_WORDS), max_size=8).map(''.join) | st.text(max_size=20))
@example('3\n\x00')  # a number that is refused as one, and as a text
def test_any_flag_is_a_config_or_a_config_error(text):
  for flag in (text, f'TrainConfig.steps={text}', f'LocalTaskConfig.files={text}'):
    try:
      assert isinstance(gin.load([], [flag]), Config)
    except ConfigError:
      continue

# ---- JSON lines ----


TEXTS = st.text(max_size=30)


def read_all(path, **options):
  config = LocalTaskConfig(**options)
  skipped = collections.Counter()
  documents = [text for part in text_files.ranges([str(path)], 'line')
               for text, in text_files.read(*part, config, ('text',), skipped)]
  return documents, skipped


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('properties')


@EXAMPLES
@given(texts=st.lists(TEXTS, max_size=8), ascii_only=st.booleans(), unit=st.sampled_from([1, 20, 1 << 22]))
def test_what_is_written_as_json_lines_is_read(folder, texts, ascii_only, unit):
  path = folder / 'a.jsonl'
  path.write_bytes(''.join(json.dumps({'id': 1, 'text': text}, ensure_ascii=ascii_only) + '\n' for text in texts).encode())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(text_files, 'UNIT_BYTES', unit)
    documents, skipped = read_all(path)
  assert documents == [text for text in texts if text.strip()]
  assert skipped.total() == len(texts) - len(documents)


@EXAMPLES
@given(st.lists(TEXTS.filter(str.strip), min_size=1, max_size=6), st.data())
def test_a_damaged_line_is_named_by_its_number(folder, texts, data):
  lines = [json.dumps({'text': text}, ensure_ascii=False).encode() for text in texts]
  number = data.draw(st.integers(0, len(lines) - 1))
  line = lines[number]
  begin, end = sorted((data.draw(st.integers(0, len(line))), data.draw(st.integers(0, len(line)))))
  lines[number] = line[:begin] + data.draw(st.binary(max_size=4)).replace(b'\n', b'') + line[end:]
  path = folder / 'b.jsonl'
  path.write_bytes(b'\n'.join(lines))
  kept, skipped = read_all(path, skip_malformed=True)
  others = texts[:number] + texts[number + 1:]
  if skipped['malformed']:
    assert kept == others
    with pytest.raises(DataError) as error:
      read_all(path)
    assert str(error.value).startswith(f'{path}:{number + 1}: ')
  else:
    assert read_all(path)[0] == kept and kept[:number] + kept[len(kept) - len(texts) + number + 1:] == others

# ---- vocabularies ----


ANY_CHARACTER = st.characters(exclude_categories=())  # surrogates as well
WRITTEN = st.text(st.sampled_from('中文天地人 abcXY12.,%+#-_\r\n\t▂▃▁Ａ，<>s/') | ANY_CHARACTER, max_size=40)


def bilingual_file(folder):
  path = folder / 'bilingual.txt'
  words = ['ab', 'c', 'a', '##b', '##c', '##12', '1', '##a', '中文', '中', '文', '.', '##.', '天地']
  path.write_text('\n'.join([*small_data.SPECIALS, *words, *(f'<s_{i}>' for i in range(10))]) + '\n', encoding='utf-8')
  return path


def sentencepiece_model(folder, name, **options):
  import sentencepiece

  text = folder / 'text'
  text.write_text('\n'.join(f'word{i} 天地{i} and another one\n' for i in range(200)), encoding='utf-8')
  sentencepiece.SentencePieceTrainer.train(
      input=str(text), model_prefix=str(folder / name), vocab_size=60, hard_vocab_limit=False, minloglevel=2, **options)
  return folder / f'{name}.model'


@pytest.fixture(scope='module')
def every_vocabulary(folder):
  """One of each kind."""
  t5 = sentencepiece_model(folder, 't5', pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  cpm1 = sentencepiece_model(folder, 'cpm1', user_defined_symbols=['<pad>', '<eod>'])
  files = (small_data.vocabulary_file(folder), bilingual_file(folder), ROOT / 'tasks/corpus/vocab.txt')
  specs = [*(f'cpm2:{file}' for file in files), f'sentencepiece:{t5}?extra_ids=10', f'cpm1:{cpm1}']
  return [vocabularies.load(spec) for spec in specs]


@EXAMPLES
@given(texts=st.lists(WRITTEN, max_size=4), blanks=st.integers(0, 9))
def test_any_text_has_ids_within_the_vocabulary_and_a_decoding(every_vocabulary, texts, blanks):
  for vocabulary in every_vocabulary:
    batch = vocabulary.encode_batch(texts)
    assert [list(ids) for ids in batch] == [vocabulary.encode(text) for text in texts], vocabulary.spec
    special = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, *vocabulary.sentinels} - {vocabulary.unk_id}
    for text, ids in zip(texts, batch):
      assert all(0 <= token < vocabulary.size for token in ids), vocabulary.spec
      assert not special & set(ids), f'{vocabulary.spec}: what is written in {text!r} became a special token'
      assert isinstance(vocabulary.decode(ids), str)
    if vocabulary.sentinels:
      ids = vocabulary.encode_blanks(vocabularies.BLANK.join(''.join(texts) for _ in range(blanks + 1)))
      found = [token for token in ids if token in vocabulary.sentinels]
      assert found == list(vocabulary.sentinels[:len(found)]) and len(found) >= blanks


@EXAMPLES
@given(ids=st.lists(st.integers(-3, 10**5), max_size=20))
def test_any_ids_have_a_decoding(every_vocabulary, ids):
  for vocabulary in every_vocabulary:
    vocabulary.decode(ids).encode('utf-8', 'surrogatepass')


@settings(EXAMPLES, max_examples=200)
@given(WRITTEN)
def test_a_vocabulary_with_bytes_loses_nothing(every_vocabulary, text):
  lossless = every_vocabulary[2]
  without_halves = ''.join('\ufffd' if '\ud800' <= c <= '\udfff' else c for c in text)
  assert lossless.decode(lossless.encode(text)) == without_halves

# ---- packing ----


@EXAMPLES
@given(room=st.tuples(st.integers(1, 60), st.integers(1, 60)), most=st.integers(1, 8), data=st.data())
def test_packing_has_every_piece_once_and_no_row_overfull(room, most, data):
  side = [st.integers(1, slots) for slots in room]
  classes = data.draw(st.lists(st.tuples(*side, st.integers(0, 50)), min_size=1, max_size=12))
  sizes, counts = np.array(classes)[:, :2], np.array(classes)[:, 2]
  packed = packing.pack(sizes, counts, room, most)
  row, class_id, member = packed.members(np.arange(packed.rows))
  order = np.lexsort((member, class_id))
  np.testing.assert_array_equal(class_id[order], np.repeat(np.arange(len(classes)), counts))
  np.testing.assert_array_equal(member[order], objectives.ramp(counts))
  if packed.rows:
    for slots, size in zip(room, sizes.T):
      assert np.bincount(row, size[class_id], packed.rows).max() <= slots
    pieces_in_row = np.bincount(row, minlength=packed.rows)
    assert pieces_in_row.min() >= 1 and pieces_in_row.max() <= most


@EXAMPLES
@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_an_order_is_a_permutation(size, key):
  assert sorted(packing.permute(np.arange(size), size, np.uint64(key)).tolist()) == list(range(size))


@EXAMPLES
@given(rates=st.lists(st.integers(1, 150), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_mixture_reads_each_stream_row_by_row(rates, seed):
  counts = packing.rate_counts(dict(enumerate(rates)))
  assert len(counts) == len(rates) and min(counts) >= 1
  mixer = packing.Mixer(counts, seed)
  component, row = mixer.locate(np.arange(2 * int(mixer.counts.sum())))
  for number, count in enumerate(mixer.counts):
    assert row[component == number].tolist() == list(range(2 * count))


@FEW
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), seed=st.integers(0, 9),
       objective=st.sampled_from(['isolated', 't5', 'pairs']))
def test_an_epoch_has_every_token_once(lengths, seed, objective):
  """Every token is another number, those of inputs above all others; sentinels begin at 1128."""
  assume(objective != 't5' or max(lengths) > 1)
  documents = [part.tolist() for part in np.split(np.arange(20, 20 + sum(lengths)), np.cumsum(lengths)[:-1])]
  with tempfile.TemporaryDirectory() as folder:
    config = small_data.make_config(folder, batch_size=3, seed=seed, objective=objective, encoder_length=96, decoder_length=96)
    other = {'inputs': [[token + 4000 for token in document] for document in documents]} if objective == 'pairs' else {}
    vocabulary = small_data.fill(config, {'train': {**other, 'targets': documents}})
    stream = small_data.open_reader(config, 'train').components[0]
    found = collections.Counter()
    rows, segments = stream.read(np.arange(stream.rows_per_epoch, 2 * stream.rows_per_epoch), seed)  # the second epoch
  for lengths_P, tokens in ((segments.encoder_lengths, segments.encoder_tokens),
                            (segments.decoder_lengths, segments.decoder_targets)):
    assert np.bincount(rows, lengths_P).max() <= 96 and len(tokens) == lengths_P.sum()
    found.update(token for token in tokens.tolist() if token not in vocabulary.sentinels and token != vocabulary.eos_id)
  expected = [token for document in documents for token in document if objective != 't5' or len(document) > 1]
  expected += [token for document in other.get('inputs', []) for token in document]
  assert found == collections.Counter(expected)

# ---- pieces and span corruption ----


@EXAMPLES
@given(lengths=st.lists(st.integers(0, 200), max_size=20), longest=st.integers(3, 50))
def test_pieces_cover_their_documents(lengths, longest):
  document, start, length = pieces.cut(np.array(lengths, np.int64), longest)
  assert ((length >= 2) & (length <= longest)).all()
  covered = collections.Counter((d, t) for d, s, n in zip(document.tolist(), start.tolist(), length.tolist())
                                for t in range(s, s + n))
  assert covered == collections.Counter((d, t) for d, n in enumerate(lengths) if n > 1 for t in range(n))


@EXAMPLES
@given(lengths=st.lists(st.integers(2, 120), min_size=1, max_size=10), key=st.integers(0, 2**63), density=st.floats(0.01, 0.9),
       mean=st.floats(1, 20), t5=st.booleans(), anywhere=st.booleans())
def test_corruption_hides_what_the_formula_says_and_loses_nothing(lengths, key, density, mean, t5, anywhere):
  sentinels, start, eos = np.arange(10_000, 10_200), 1, 7 if t5 else None
  lengths = np.array(lengths)
  tokens = np.arange(20, 20 + lengths.sum())
  noise, spans = objectives.noise_counts(lengths, density, mean)
  for length, n, k in zip(lengths.tolist(), noise.tolist(), spans.tolist()):
    assert n == min(max(round(length * density), 1), length - 1)
    assert k == min(max(round(n / mean), 1), n, length - n)
  drawn = objectives.draw_spans(objectives.combine(key, np.arange(len(lengths))), lengths, noise, spans, anywhere)
  result = objectives.corrupt(tokens, lengths, drawn, noise, sentinels, start=start, eos=eos)
  split = lambda flat, sizes: [part.tolist() for part in np.split(flat, np.cumsum(sizes)[:-1])]  # noqa: E731
  sides = zip(split(tokens, lengths), split(result.encoder_tokens, result.encoder_lengths),
              split(result.decoder_inputs, result.decoder_lengths), split(result.decoder_targets, result.decoder_lengths),
              noise, spans, strict=True)
  for piece, encoder, inputs, targets, n, k in sides:
    assert inputs == [start, *targets[:-1]]
    if t5:
      assert encoder.pop() == targets.pop() == eos
    else:
      assert targets.pop() == sentinels[k]
    hidden = np.split(targets, np.flatnonzero(np.array(targets) >= sentinels[0]))[1:]
    assert [span[0] for span in hidden] == sentinels[:k].tolist() and sum(len(span) - 1 for span in hidden) == n
    assert all(len(span) > 1 for span in hidden)
    spans_of = {int(span[0]): span[1:].tolist() for span in hidden}
    assert [token for mark in encoder for token in spans_of.get(mark, [mark])] == piece
