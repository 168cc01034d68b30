"""Vocabularies: golden vectors, a plain reference with jieba itself, round trips, refusals."""

import functools
import json
import pathlib
import random
import time

import pytest

from t5x_cpm import vocabularies
from t5x_cpm.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = f'cpm2:{ROOT}/tasks/corpus/vocab.txt'
SENTENCE = '清华大学发布了CPM-2模型，参数量为110亿。'


class PlainCpm2:
  """The released tokenizers, one step after the other, on jieba; without their three bugs (see `vocabulary`)."""

  def __init__(self, path: pathlib.Path, bilingual: bool):
    pieces = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')
    self.ids = {piece: token for token, piece in enumerate(pieces)}
    self.bilingual = bilingual

  @staticmethod
  def is_chinese(piece: str) -> bool:
    return piece == '\u2582' or any('\u4e00' <= character <= '\u9fff' for character in piece)

  @staticmethod
  def half_width(text: str) -> str:
    out = ''
    for character in text:
      code = ord(character)
      if code == 0x3000:
        character = ' '
      elif 0xff00 <= code <= 0xff5e and character not in '，。！（）？、；：':
        character = chr(code - 0xfee0)
      out += character
    return out

  def tokens(self, word: str) -> list[str]:
    if len(word) > 200:
      return ['<unk>']
    out, start = [], 0
    while start < len(word):
      for end in range(len(word), start, -1):
        piece = word[start:end]
        if self.bilingual and start > 0 and not self.is_chinese(piece):
          piece = '##' + piece
        if piece in self.ids and not (start == 0 and self.bilingual and piece.startswith('##') and len(piece) > 2):
          out.append(piece)
          start = end
          break
      else:
        out.append('<unk>')
        start += 1
    return out

  def encode(self, text: str) -> list[int]:
    import jieba

    if not self.bilingual:
      text = self.half_width(text)
    out: list[str] = []
    for word in jieba.cut(text, cut_all=False):
      out += self.tokens(word.replace(' ', '\u2582').replace('\n', '\u2583'))
    if self.bilingual:
      kept = out[:1]
      for place in range(1, len(out)):
        inside = place < len(out) - 1
        if inside and out[place] == '\u2582' and not self.is_chinese(kept[-1]) and not self.is_chinese(out[place + 1]):
          continue
        kept.append(out[place])
      out = kept
    return [self.ids[piece] for piece in out]


@functools.cache
def load(spec: str) -> vocabularies.Vocabulary:
  return vocabularies.load(spec)


@pytest.fixture(scope='module')
def chinese(shared_data):
  return load(f'cpm2:{shared_data}/vocab/cpm2_bpe_cn/vocab.txt')


@pytest.fixture(scope='module')
def bilingual(shared_data):
  return load(f'cpm2:{shared_data}/vocab/cpm2_bpe_cn_en/vocab.txt')


def test_golden_vectors_of_the_chinese_vocabulary(chinese):
  assert (chinese.size, len(chinese.sentinels), chinese.sentinels[0]) == (26_240, 190, 26_050)
  assert (chinese.unk_id, chinese.bos_id, chinese.pad_id, chinese.eos_id) == (0, 1, 5, 7)
  assert chinese.encode(SENTENCE) == [5971, 1392, 21, 7460, 976, 54, 78, 2281, 16, 2667, 1739, 43, 4195, 1165, 12]
  assert chinese.encode('Hello world, this is a test.') == [
      21992, 10, 12950, 9, 10, 7738, 10, 3253, 10, 1007, 10, 12990, 1884, 42]
  for text in (SENTENCE, 'Hello world, this is a test.', '两行\n文字'):
    assert chinese.decode(chinese.encode(text)) == text


def test_golden_vectors_of_the_bilingual_vocabulary(bilingual):
  assert (bilingual.size, len(bilingual.sentinels), bilingual.sentinels[0], bilingual.eos_id) == (51_968, 185, 51_783, 8)
  assert bilingual.encode(SENTENCE) == [5972, 1393, 22, 7461, 27177, 55, 79, 2282, 17, 2668, 1740, 44, 4196, 1166, 13]
  assert bilingual.encode('Hello world') == [21993, 12951]
  assert bilingual.encode('模型') == [2282]  # once: the released code gives it twice
  assert bilingual.decode(bilingual.encode('Hello world, this is a test.')) == 'Hello world , this is a test .'


def test_cpm1(shared_data):
  cpm1 = load(f'cpm1:{shared_data}/vocab/cpm1_bpe_3w_new/chinese_vocab.model')
  assert (cpm1.size, cpm1.bos_id, cpm1.pad_id, cpm1.eos_id, cpm1.sentinels) == (30_000, 1, 5, 7, ())
  for text in ('清华大学发布了模型。', '两行\n文字 和空格'):
    assert cpm1.decode(cpm1.encode(text)) == text
  assert cpm1.encode('你好 \ud83d x') == cpm1.encode('你好 \ufffd x')


def documents(folder: pathlib.Path):
  """The texts of ../shared/data/pretrain, in parts of at most 20,000 characters."""
  for path in sorted(folder.rglob('*')):
    if path.is_file():
      lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
      texts = [json.loads(line)['text'] for line in lines] if path.suffix == '.jsonl' else [''.join(lines)]
      for text in texts:
        yield from (text[i:i + 20_000] for i in range(0, len(text), 20_000))


def compare(shared_data, chinese, bilingual, parts):
  plain = {
      chinese: PlainCpm2(shared_data / 'vocab/cpm2_bpe_cn/vocab.txt', False),
      bilingual: PlainCpm2(shared_data / 'vocab/cpm2_bpe_cn_en/vocab.txt', True)}
  for fast, reference in plain.items():
    for part, ids in zip(parts, fast.encode_batch(parts), strict=True):
      assert ids == reference.encode(part), part[:200]


def test_ids_of_a_sample_equal_those_of_the_plain_implementation(shared_data, chinese, bilingual):
  parts = list(documents(shared_data / 'pretrain'))
  print('seed 0')
  compare(shared_data, chinese, bilingual, random.Random(0).sample(parts, 12))


@pytest.mark.slow
def test_ids_of_a_fifth_of_the_texts_equal_those_of_the_plain_implementation(shared_data, chinese, bilingual):
  parts = list(documents(shared_data / 'pretrain'))
  print('seed 1')
  compare(shared_data, chinese, bilingual, random.Random(1).sample(parts, len(parts) // 5))


def random_texts(seed: int, count: int) -> list[str]:
  print(f'seed {seed}')
  rng = random.Random(seed)
  characters = list('abZX 09中文，,.\n\t\r#_%-▂▃▁é😀<>Ａ１')
  return [''.join(rng.choice(characters) for _ in range(rng.randint(0, 25))) for _ in range(count)]


def test_nothing_is_lost_with_byte_pieces():
  shipped = load(SHIPPED)
  texts = random_texts(1, 4000)
  texts += ['', ' ', 'a', '<s_0> </s> ##a <0x41> <unk>', 'emoji 👨‍👩‍👧 ok', 'x' * 300, '\r\n\u2028\x85 café naïve']
  texts += ['ＡＢＣ１２３，全角！']
  texts += (ROOT / 'tasks/corpus/zh.txt').read_text(encoding='utf-8').splitlines()
  texts += (ROOT / 'tasks/corpus/en.txt').read_text(encoding='utf-8').splitlines()
  special = {shipped.bos_id, shipped.pad_id, shipped.eos_id, shipped.unk_id, *shipped.sentinels}
  for text, ids in zip(texts, shipped.encode_batch(texts), strict=True):
    assert ids == shipped.encode(text)
    assert shipped.decode(ids) == text
    assert not special & set(ids), 'what is written in a text became a special token'


def test_blanks_become_sentinels_in_order(bilingual):
  for vocab in (bilingual, load(SHIPPED)):
    ids = vocab.encode_blanks('今天<span>很好 the <span> dog')
    assert [token for token in ids if token in vocab.sentinels] == list(vocab.sentinels[:2])
    assert vocab.encode_blanks('今天') == vocab.encode('今天')
  with pytest.raises(ConfigError, match='blanks'):
    load(SHIPPED).encode_blanks('<span>' * 51)


def test_saved_vocabulary_is_the_same(tmp_path):
  shipped = load(SHIPPED)
  shipped.save(tmp_path / 'v')
  again = vocabularies.load_saved(tmp_path / 'v')
  assert again.fingerprint == shipped.fingerprint and again.encode(SENTENCE) == shipped.encode(SENTENCE)
  with pytest.raises(ConfigError, match='vocabulary.json'):
    vocabularies.load_saved(tmp_path)


def test_plain_sentencepiece_counts_its_sentinels_from_the_end(tmp_path):
  import sentencepiece

  (tmp_path / 'text').write_text('\n'.join(f'word{i} and another one' for i in range(200)))
  sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'm'), vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1,
      unk_id=2, bos_id=-1, minloglevel=2)
  vocab = vocabularies.load(f'sentencepiece:{tmp_path}/m.model?extra_ids=10')
  assert (vocab.pad_id, vocab.bos_id, vocab.eos_id) == (0, 0, 1)
  assert vocab.sentinels == tuple(range(vocab.size - 1, vocab.size - 11, -1))
  ids = vocab.encode_blanks('word1 <span> one')
  assert vocab.size - 1 in ids and '<s_0>' in vocab.decode(ids)
  assert vocab.decode(vocab.encode('word1 and one')) == 'word1 and one'
  assert vocab.encode('word1 \ud83d one') == vocab.encode('word1 \ufffd one')  # half of a surrogate pair


@pytest.mark.parametrize('content, message', [
    (b'\xff\xfe', 'UTF-8'), (b'<unk>\n<s>\n<s>\n', 'line 2'), (b'<unk>\n\n', ':2'), (b'a\nb\n', '<unk>')])
def test_a_bad_file_is_refused_with_its_place(tmp_path, content, message):
  (tmp_path / 'vocab.txt').write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    vocabularies.load(f'cpm2:{tmp_path}/vocab.txt')


def test_time_and_memory_grow_with_the_length_alone(tmp_path):
  """A word without end, and a run of characters that are words each; a vocabulary of one long line is refused."""
  for unit in ('a', '\U00020000', '%.'):
    took = []
    for length in (30_000, 240_000):
      begin = time.process_time()
      load(SHIPPED).encode(unit * (length // len(unit)))
      took.append(time.process_time() - begin)
    assert took[1] < 24 * took[0] + 0.5, (unit, took)  # a square would be 64 times as long
  content = (ROOT / 'tasks/corpus/vocab.txt').read_text(encoding='utf-8')
  for length, refused in ((256, False), (257, True), (100_000, True)):
    (tmp_path / 'vocab.txt').write_text(content + 'y' * length + '\n', encoding='utf-8')
    if refused:
      with pytest.raises(ConfigError, match=f'a piece of {length:,} characters; expected one piece of at most 256 a line'):
        vocabularies.load(f'cpm2:{tmp_path}/vocab.txt')
    else:
      assert len(vocabularies.load(f'cpm2:{tmp_path}/vocab.txt').encode('y' * length)) == 1


def test_a_gap_in_the_sentinels_is_refused(tmp_path):
  text = (ROOT / 'tasks/corpus/vocab.txt').read_text(encoding='utf-8').replace('<s_7>\n', '')
  (tmp_path / 'vocab.txt').write_text(text, encoding='utf-8')
  with pytest.raises(ConfigError, match='<s_7>'):
    vocabularies.load(f'cpm2:{tmp_path}/vocab.txt')


@pytest.mark.parametrize('spec, message', [
    ('cpm3:x', 'Did you mean'), ('vocab.txt', 'cpm2:FILE'), ('cpm2:/nowhere/vocab.txt', 'cannot be read|not found')])
def test_a_bad_spec_is_refused(spec, message):
  with pytest.raises(ConfigError, match=message):
    vocabularies.load(spec)
