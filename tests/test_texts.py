"""One text, one sequence of tokens, wherever it comes in; and what comes in is a text, or is refused."""

import functools
import io
import itertools
import json
import pathlib
import random
import types

import numpy as np
import pytest
import small_data
from hypothesis import given, settings
from hypothesis import strategies as st

import t5x_cpm
from t5x_cpm import inference, vocabularies
from t5x_cpm.config import Config, ConfigError, InferConfig, ModelConfig, TaskConfig
from t5x_cpm.inference import engine as engine_lib
from t5x_cpm.inference import evaluate, infer, lines, text
from t5x_cpm.tasks import documents
from t5x_cpm.vocabularies import report

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLANK = vocabularies.BLANK
MARKS = [BLANK, '<s_0>', '<extra_id_0>', '<eod>', '</s>', '<s>', '<unk>', '<pad>', '<mask>', '<sep>', '<0x41>', '##a',
         '\n', '\t', ' ', '  ', '\0', '\r\n', '\r', '\u2028', '\x85', '\x7f', '\u3000', '\uffff', '\ufffd', '\ufeff',
         'ＡＢ', '＜span＞', 'x²', 'H₂O', '½', 'e\u0301', '😀', '👨\u200d👩', '▁', '▂', '▃', '⁇',
         'ab', 'word1', '一丁', '七', '，', '.', '5%']
KINDS = ['letters', 'bytes', 'sentencepiece', 'sentencepiece inside', 'sentencepiece bytes', 'cn', 'en and cn', 'cpm1']


def hostile_texts(seed, count):
  print(f'seed {seed}')
  rng = random.Random(seed)
  return MARKS + [''.join(rng.choices(MARKS, k=rng.randint(2, 6))) for _ in range(count)]


def sentencepiece_file(folder, name, **options):
  import sentencepiece

  (folder / 'text').write_text('\n'.join(f'word{i} and another one 一丁七，今天天气很好。' for i in range(200)))
  sentencepiece.SentencePieceTrainer.train(
      input=str(folder / 'text'), model_prefix=str(folder / name), hard_vocab_limit=False, minloglevel=2,
      pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **options)
  return f'sentencepiece:{folder / name}.model'


@pytest.fixture(scope='module')
def load(tmp_path_factory, request):
  """load(kind) -> a vocabulary of each kind; skips a test of a published one where it is not there."""
  folder = tmp_path_factory.mktemp('texts')

  @functools.cache
  def vocabulary(kind):
    if kind == 'letters':
      return vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')
    if kind == 'bytes':
      return vocabularies.load(f'cpm2:{ROOT}/tasks/corpus/vocab.txt')
    if kind == 'sentencepiece':
      return vocabularies.load(sentencepiece_file(folder, 'm', vocab_size=80) + '?extra_ids=10')
    if kind == 'sentencepiece inside':
      return vocabularies.load(sentencepiece_file(
          folder, 'i', vocab_size=90, user_defined_symbols=[f'<extra_id_{k}>' for k in range(9, -1, -1)]))
    if kind == 'sentencepiece bytes':
      return vocabularies.load(sentencepiece_file(
          folder, 'b', vocab_size=350, byte_fallback=True, normalization_rule_name='identity') + '?extra_ids=10')
    published = request.getfixturevalue('shared_data') / 'vocab'
    return vocabularies.load({
        'cn': f'cpm2:{published}/cpm2_bpe_cn/vocab.txt', 'en and cn': f'cpm2:{published}/cpm2_bpe_cn_en/vocab.txt',
        'cpm1': f'cpm1:{published}/cpm1_bpe_3w_new/chinese_vocab.model'}[kind])

  return vocabulary


def in_cache(vocabulary, texts):
  """The tokens of texts as they stand in a cache."""
  ids, lengths = documents.encode(vocabulary, texts)
  return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def config_of(vocabulary, objective):
  return Config(model=ModelConfig(vocab_size=vocabulary.size), task=TaskConfig(vocabulary=vocabulary.spec, objective=objective),
                infer=InferConfig(batch_size=64, input_length=10_000))


class HeardError(Exception):
  """Ends a call as soon as the model has been given its input."""


class Listener:
  """A program that keeps what it is given: the tokens of each row of the encoder, and of the decoder's targets."""

  def whole(self, rows):
    return rows

  def note(self, batch):
    rows = {side: [row[seen == 1].tolist() for row, seen in zip(batch[f'{side}_{name}'], batch[f'{side}_segment_ids'])]
            for side, name in (('encoder', 'input_tokens'), ('decoder', 'target_tokens')) if f'{side}_{name}' in batch}
    self.inputs, self.targets = rows['encoder'], rows.get('decoder')
    raise HeardError

  def generate(self, rule, batch, *args, **options):
    self.note(batch)

  def start(self, batch, length):
    self.note(batch)

  def score(self, function, batch):
    self.note(batch)

  def encode(self, batch):
    self.note(batch)


def listen(vocabulary, objective):
  """An engine without a model, and heard(name, *arguments) -> the rows of inputs and targets of a call of it."""
  engine = engine_lib.Engine(Listener(), vocabulary, config_of(vocabulary, objective))

  def heard(name, *arguments):
    with pytest.raises(HeardError):
      list(getattr(engine, name)(*arguments))
    return engine.program.inputs, engine.program.targets

  return engine, heard


def check_pairs(vocabulary, texts, tmp_path):
  engine, heard = listen(vocabulary, 'pairs')
  end = [vocabulary.eos_id]
  wanted = [ids + end for ids in in_cache(vocabulary, texts)]
  size = engine.config.infer.batch_size
  for begin in range(0, len(texts), size):
    some, ids = texts[begin:begin + size], wanted[begin:begin + size]
    assert heard('generate', some)[0][:len(some)] == ids
    assert heard('encode', some)[0][:len(some)] == ids
    inputs, targets = heard('score', some, some)
    assert (inputs[:len(some)], targets[:len(some)]) == (ids, ids)
    inputs, targets = heard('choose', some[:1], [some])
    assert (inputs[:len(some)], targets[:len(some)]) == ([ids[0]] * len(some), ids)
  for line, ids in zip(texts[:80], wanted):
    assert heard('stream', line)[0][0] == ids
    features = {f'{side}{form}': value for side in ('inputs', 'targets')
                for form, value in (('', np.array(ids[:-1], np.int32)), ('_pretokenized', line.encode()))}
    example = evaluate._example(types.SimpleNamespace(postprocess_fn=lambda x, **_: x), features, engine.codec)
    assert (example.request.ids, example.target_ids) == (ids, ids)
  read(tmp_path, texts, engine.codec, wanted)


def read(tmp_path, texts, codec, wanted):
  """The file of `infer`, whose lines end where lines end."""
  (tmp_path / 'in.jsonl').write_text(''.join(infer.as_json({'text': line}) + '\n' for line in texts))
  read = lines.read_lines(tmp_path / 'in.jsonl', 'in.jsonl', 'text')
  found = [request.ids for _, request in lines.checked(read, codec) if request]
  assert found == [ids for line, ids in zip(texts, wanted) if line.strip()]


def check_blanks(vocabulary, objective, texts, tmp_path):
  engine, heard = listen(vocabulary, objective)
  end = [vocabulary.eos_id] if objective == 't5' else []
  s = vocabulary.sentinels
  texts = [line for line in texts if BLANK not in line and line[-1] not in ' ▂']  # a space before a blank may be implied
  cached = in_cache(vocabulary, texts)
  size = engine.config.infer.batch_size
  for begin in range(0, len(texts), size):
    some, ids = texts[begin:begin + size], cached[begin:begin + size]
    asked = [[*row, s[0], *end] for row in ids]
    assert heard('generate', some)[0][:len(some)] == asked
    assert heard('encode', some)[0][:len(some)] == [row + end for row in ids]
    plain = [(line, row) for line, row in zip(some, ids) if not text._SENTINEL.search(line)]
    inputs, targets = heard('score', ['七'] * len(plain), [line for line, _ in plain])
    assert targets[:len(plain)] == [[s[0], *row, *(end or [s[1]])] for _, row in plain]
    assert heard('choose', '七', [line for line, _ in plain]) == (inputs, targets)
    assert heard('stream', some[0])[0][0] == asked[0]
  read(tmp_path, texts, engine.codec, [[*ids, s[0], *end] for ids in cached])


@pytest.mark.parametrize('kind', KINDS)
def test_one_text_is_one_sequence_of_tokens(load, tmp_path, kind):
  vocabulary, texts = load(kind), hostile_texts(3, 60)
  special = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, *vocabulary.sentinels} - {vocabulary.unk_id}
  assert not special & set(itertools.chain(*in_cache(vocabulary, texts)))
  check_pairs(vocabulary, texts, tmp_path)
  for objective in ('isolated', 'cpm2', 't5') if vocabulary.sentinels else ():
    check_blanks(vocabulary, objective, texts, tmp_path)


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'sentencepiece bytes', 'cn'])
def test_what_stands_around_a_blank_has_the_tokens_that_it_has_in_the_text(load, kind):
  """Where a blank stands for whole tokens of a text, input and target are the tokens of the text."""
  vocabulary, s = load(kind), load(kind).sentinels
  for before, hidden, after in (
      ('一丁', '七', '，一丁'), ('', '一丁', '七七'), ('一丁，', 'word1', '，七'), ('word1 ', 'and', ' another one'),
      ('', 'and', ' one'), ('word', '1', ' and')):
    codec = text.Codec(vocabulary, config_of(vocabulary, 'isolated'))
    request = codec.request(before + BLANK + after)
    target = codec.targets(request, hidden)[1:-1]
    place = request.ids.index(s[0])
    whole = [*request.ids[:place], *target, *request.ids[place + 1:-1]]
    if kind == 'cn' and ' ' in before + after:
      assert vocabulary.decode(whole) == before + hidden + after
    else:
      assert whole == vocabulary.encode(before + hidden + after), (before, hidden, after)


# Marks that were probably meant as blanks.

MEANT = ['<SPAN>', '＜span＞', '＜ＭＡＳＫ＞', '< span >', '<span/>', '<extra_id_0>', '<s_0>', '<mask>', '<|mask|>', '[MASK]',
         '[ blank ]', '【MASK】', '[gMASK]', '〈span〉']
ORDINARY = ['</span>', '<span class="x">', 'a < b > c', '[1]', '<s>', '</s>', '<pad>', '姓名：____', '<masked>', 'rows[mask]',
            '(mask)', '《面具》', 'blank', 'x (span) y', '<extra>', '']


def test_a_mark_that_was_meant_as_a_blank_is_told_once(load, capsys):
  assert [text.like_blank(f'今天{mark}好{BLANK}') for mark in MEANT] == MEANT
  assert [text.like_blank(f'今天 {mark} 好{BLANK}') for mark in ORDINARY] == [''] * len(ORDINARY)
  engine, heard = listen(load('letters'), 'isolated')
  for name, *arguments in (('generate', [f'一{BLANK}', '一<SPAN>', '[MASK]']), ('generate', '<mask>'), ('stream', '<mask>')):
    heard(name, *arguments)
  assert capsys.readouterr().err == ("warning: input: '<SPAN>' is read as plain text; a blank is written <span>. "
                                     '(2 inputs have such marks.)\n')
  engine, heard = listen(load('letters'), 'pairs')
  heard('generate', MEANT)
  assert capsys.readouterr().err == ''


def test_a_mark_that_was_meant_as_a_blank_is_noted_in_its_answer(load, tmp_path, capsys):
  path, config = tmp_path / 'in.txt', config_of(load('letters'), 'isolated')
  path.write_text('一<span>丁\n[MASK]丁\n\n一＜span＞\n')
  codec, out = text.Codec(load('letters'), config), io.StringIO()
  assert lines.check_file(path, 'in.txt', codec, config) == 4
  assert capsys.readouterr().err == ("warning: in.txt:2: '[MASK]' is read as plain text; a blank is written <span>. "
                                     '(2 lines have such marks.)\n')
  answer = engine_lib.Answer('七', ['七'], -1.0, 1, True, [7])
  engine = types.SimpleNamespace(config=config, answer_requests=lambda requests, *_: [answer] * len(requests),
                                 program=types.SimpleNamespace(told=lambda: ''))
  infer.answer_file(engine, lines.checked(lines.read_lines(path, str(path), 'text'), codec), 0, 4, out, infer.as_json)
  assert [json.loads(line).get('note') for line in out.getvalue().splitlines()] == [
      None, "'[MASK]' is read as plain text; a blank is written <span>.", 'empty line',
      "'＜span＞' is read as plain text; a blank is written <span>."]


# Pieces of an answer, and tokens without a piece.


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_streamed_adds_up_to_the_answer(load, kind):
  vocabulary = load(kind)
  octets = [token for token in range(vocabulary.size) if vocabulary.piece(token).startswith('<0x')]
  some = st.one_of(st.integers(0, vocabulary.size - 1), *([st.sampled_from(octets)] if octets else []))

  @settings(max_examples=50, deadline=None, database=None)
  @given(st.lists(some, max_size=10))
  def add_up(ids):
    shown = [vocabulary.decode(ids[:length]) for length in range(1, len(ids) + 1)]
    pieces = list(engine_lib.new_text(iter(shown)))
    assert ''.join(pieces) == vocabulary.decode(ids) and '' not in pieces

  add_up()


@pytest.mark.parametrize('kind', KINDS)
def test_an_unknown_id_is_written_in_one_way(load, kind):
  vocabulary = load(kind)
  unknown, known = vocabulary.unk_id, vocabulary.encode('七')
  assert vocabulary.decode([unknown]) == vocabulary.decode([vocabulary.size + 3]) == vocabulary.decode([-1]) == '<unk>'
  assert vocabulary.decode([*known, unknown]) == '七<unk>' and vocabulary.decode([unknown, *known[-1:]]) == '<unk>七'
  assert vocabulary.decode([unknown, unknown]).replace(' ', '') == '<unk><unk>'
  lost = report.differences('七\ue000', vocabulary.decode(vocabulary.encode('七\ue000')))
  assert all(name.startswith('no piece') for name, _ in lost)
  for line, ids in zip(MARKS, vocabulary.encode_batch(MARKS)):
    assert (unknown in ids) <= ('<unk>' in vocabulary.decode(ids)), line
    assert vocabulary.decode(ids).count('⁇') <= line.count('⁇')


# What a call takes.


def test_a_string_is_one_text_everywhere(load):
  engine, heard = listen(load('letters'), 'isolated')
  for name, one, several in (
      ('generate', ('一丁',), (['一丁'],)), ('encode', ('一丁',), (['一丁'],)),
      ('score', ('一丁', '七七'), (['一丁'], ['七七'])),
      ('score', (f'一{BLANK}丁{BLANK}', ['七七', '一']), ([f'一{BLANK}丁{BLANK}'], [['七七', '一']])),
      ('choose', ('一丁', ['七七', '一']), (['一丁'], [['七七', '一']]))):
    assert heard(name, *one) == heard(name, *several)
  assert engine.generate([]) == engine.score([], []) == engine.choose([], []) == engine.encode([]) == []


class Strange:
  def __repr__(self):
    raise RuntimeError


WRONG = [None, 1, 1.5, True, float('nan'), 10**400, b'ab', bytearray(b'a'), memoryview(b'a'), {}, {'a': 1}, set(), object(),
         Strange(), str, len, range(2), ROOT, (x for x in 'ab'), np.array(['a', 'b']), np.bytes_(b'a'), np.str_('a'),
         np.zeros((2, 2)), [], [1], [None], ['a', 1], [b'a'], [[]], [['a']], [[1]], [['a'], 'b'], [[['a']]], ('a',), ['a', 'b'],
         'a', '', '\ud83d', ['a\udc00'], [['\ud83d']], ['a' * 1_000_001], f'{BLANK}{BLANK}', BLANK * 300, [['<s_0>']]]


@pytest.mark.parametrize('objective', ['isolated', 'pairs'])
def test_what_is_no_text_is_refused_in_a_line(load, objective):
  engine, _ = listen(load('letters'), objective)
  calls = [(name, (value,)) for name in ('generate', 'encode', 'stream') for value in WRONG]
  print('seed 5')
  pairs = random.Random(5).sample(list(itertools.product(WRONG, WRONG)), 120)
  calls += [(name, pair) for name in ('score', 'choose') for pair in pairs]
  refused = 0
  for name, arguments in calls:
    try:
      list(getattr(engine, name)(*arguments))
    except ConfigError as error:
      said = str(error)
      assert '\n' not in said and len(said) < 500, said[:1000]
      refused += 1
    except HeardError:
      pass
  assert refused > 0.8 * len(calls)
  for name, arguments, message in (
      ('generate', ([1],), r'generate: texts\[0\] = 1 \(int\): expected a text'),
      ('generate', (None,), r'generate: texts = None \(NoneType\)'), ('generate', ({'a'},), r"texts = {'a'} \(set\)"),
      ('generate', ('a\ud83d',), 'half of a surrogate pair, U.D83D'),
      ('encode', (b'ab',), r"encode: texts = b'ab' \(bytes\): expected a text, or a list of texts"),
      ('encode', (np.array(['a']),), r'\(ndarray\)'), ('stream', (['a'],), 'stream: line .* expected one text'),
      ('score', (['a'], 'b'), 'because inputs is a list'), ('score', (['a', 'b'], ['c']), '2 inputs and 1 targets'),
      ('choose', ('a', []), 'choices is empty'), ('choose', (['a'], [[]]), r'choices\[0\] is empty'),
      ('choose', (['a'], ['bc']), r'choices\[0\] = .*list of texts to choose from'),
      ('choose', (['a'], []), '1 inputs and 0 lists')):
    with pytest.raises(ConfigError, match=message):
      getattr(engine, name)(*arguments)
  with pytest.raises(ConfigError, match='normalize = 1 .*True or False'):
    engine.choose('a', ['b'], normalize=1)


@pytest.mark.parametrize('field', ['rule', 'max_new_tokens', 'temperature', 'seed', 'beam_size', 'top_p', 'no_such_field'])
def test_a_field_of_decoding_that_cannot_be_is_refused(load, field):
  engine, _ = listen(load('letters'), 'isolated')
  for value in (*WRONG, -1, 2**70, -(2**70), float('inf'), 'greedy\n'):
    for name in ('generate', 'stream'):
      try:
        list(getattr(engine, name)('a', **{field: value}))
      except ConfigError as error:
        assert '\n' not in str(error).replace('greedy\n', '')
      except HeardError:
        pass


@pytest.mark.parametrize('call', [
    lambda value: inference.load(value), lambda value: inference.load('nowhere', step=value),
    lambda value: inference.load('nowhere', config=value), lambda value: t5x_cpm.load(value),
    lambda value: t5x_cpm.load('nowhere', step=value), lambda value: t5x_cpm.load('nowhere', config=value),
    lambda value: t5x_cpm.evaluate(value, 'task'), lambda value: t5x_cpm.evaluate('nowhere', value)])
def test_what_is_no_run_is_refused(call):
  for value in (*WRONG, 'a\0b'):
    with pytest.raises((ConfigError, TypeError)) as caught:
      call(value)
    said = str(caught.value)
    assert '\n' not in said and (isinstance(caught.value, ConfigError) or said.startswith('t5x_cpm.')), said
