"""The texts that ship with the project, and the generator of arithmetic stories."""

import collections
import doctest
import pathlib
import random
import re
import unicodedata

import pytest

from t5x_cpm.tasks import stories

CORPUS = pathlib.Path(__file__).resolve().parent.parent / 'tasks' / 'corpus'
HAN = re.compile(r'[\u4e00-\u9fff]')
CALCULATE = {'add': lambda a, b: a + b, 'subtract': lambda a, b: a - b, 'multiply': lambda a, b: a * b}
GOLDEN = {
  'en': 'On Monday morning, Ben made 14 waffles for a party. Anna and the other guests ate 6 of them. '
        'The guests left 8 waffles.',
  'zh': '星期五早上，小明看见村口有10只兔子，小狗一叫，跑掉了8只。留下来的有2只兔子。',
}


def _lines(name: str) -> list[str]:
  text = (CORPUS / name).read_bytes().decode('utf-8')
  assert text.endswith('\n')
  return text[:-1].split('\n')


def _han_share(text: str) -> float:
  return len(HAN.findall(text)) / len(text)


def _shingles(text: str) -> set[str]:
  units = text if _han_share(text) > 0.5 else re.findall(r"[\w']+", text.lower())
  size = 8 if _han_share(text) > 0.5 else 5
  return {' '.join(units[i:i + size]) for i in range(len(units) - size + 1)}


def _sample(count: int) -> list[int]:
  seed = random.SystemRandom().randrange(2**32)
  print(f'seed {seed}')
  return random.Random(seed).sample(range(10_000_000), count)


@pytest.mark.parametrize('name', ['zh.txt', 'en.txt', 'parallel.tsv'])
def test_files_are_clean_lines(name):
  lines = _lines(name)
  assert len(set(lines)) == len(lines)
  for line in lines:
    assert line and line == line.strip()
    assert unicodedata.is_normalized('NFC', line)
    odd = [c for c in line.replace('\t', '') if unicodedata.category(c)[0] == 'C' or c == '\ufffd']
    assert not odd, (odd, line)
    assert '  ' not in line


def test_enough_passages_of_the_right_length_and_language():
  zh, en = _lines('zh.txt'), _lines('en.txt')
  assert len(zh) >= 220 and len(en) >= 220 and len(zh) + len(en) >= 400
  for line in zh:
    assert 40 <= len(line) <= 160, line
    assert _han_share(line) > 0.6 and set(HAN.sub('', line)) <= set('，。、；：！？“”《》'), line
    assert line[-1] in '。！？”', line
  for line in en:
    assert 30 <= len(line.split()) <= 90, line
    assert line.isascii(), line
    assert line[-1] in '.!?"', line


@pytest.mark.parametrize('name', ['zh.txt', 'en.txt'])
def test_passages_are_no_near_duplicates(name):
  lines = _lines(name)
  owners = collections.defaultdict(list)
  for number, line in enumerate(lines):
    for shingle in _shingles(line):
      owners[shingle].append(number)
  shared = collections.Counter((a, b) for rows in owners.values() for i, a in enumerate(rows) for b in rows[i + 1:])
  for (a, b), count in shared.items():
    smaller = min(len(_shingles(lines[a])), len(_shingles(lines[b])))
    assert count / smaller < 0.1, (lines[a], lines[b])


def test_parallel_file_has_a_chinese_and_an_english_column():
  rows = [line.split('\t') for line in _lines('parallel.tsv')]
  assert len(rows) >= 150
  for row in rows:
    assert len(row) == 2, row
    zh, en = row
    assert _han_share(zh) > 0.7 and en.isascii(), row
    assert 1.0 <= len(en) / len(zh) <= 8.5, row
    assert ('？' in zh) == ('?' in en), row
  for column in zip(*rows):
    assert len(set(column)) == len(rows)


@pytest.mark.parametrize('language', stories.LANGUAGES)
def test_stories_calculate_correctly(language):
  for index in _sample(4000):
    story = stories.story(index, language)
    result = CALCULATE[story.operation](*story.operands)
    assert 0 <= result <= 99 and all(1 <= operand <= 99 for operand in story.operands), (index, story)
    numbers = lambda text: sorted(map(int, re.findall(r'\d+', text)))  # noqa: E731
    assert numbers(story.question) == sorted(story.operands), (index, story)
    assert numbers(story.text) == sorted([*story.operands, result]), (index, story)
    assert numbers(story.answer) == [result] and story.answer in story.text, (index, story)
    assert int(re.findall(r'\d+', story.text)[-1]) == result, (index, story)


@pytest.mark.parametrize('language', stories.LANGUAGES)
def test_stories_are_clean_lines_of_their_language(language):
  for index in _sample(2000):
    story = stories.story(index, language)
    for text in (story.text, story.question):
      assert text.isprintable() and '{' not in text and '  ' not in text and text == text.strip(), (index, text)
      assert unicodedata.is_normalized('NFC', text) and len(text) < 256
      assert _han_share(text) > 0.6 if language == 'zh' else text.isascii(), (index, text)
    assert story.text[-1] in '。.' and story.question[-1] in '？?', (index, story)
    mark = '。' if language == 'zh' else '. '
    body = story.question[:story.question.rindex(mark) + 1]
    assert body == story.text[:story.text[:-1].rindex(mark) + 1], (index, story)
    assert all(re.search(rf'(?<!\d){operand}(?!\d)', body) for operand in story.operands), (index, story)


def test_english_stories_use_the_singular_after_one_only():
  after_one, after_more = set(), set()
  for index in _sample(20_000):
    for number, word in re.findall(r'(\d+) ([a-z]+)', stories.story(index, 'en').text):
      (after_one if number == '1' else after_more).add(word)
  assert after_one & after_more <= {'more', 'of', 'sheep', 'deer'}
  assert {'apple', 'mouse', 'passenger'} <= after_one and {'geese', 'scarves', 'days', 'boxes'} <= after_more


def test_chinese_stories_always_put_a_measure_word_before_a_noun():
  words = {word for index in _sample(20_000) for word in re.findall(r'\d+([^，。]+)', stories.story(index, 'zh').text)}
  assert {word[0] for word in words} == set('枚张支个把颗条块根只头匹棵本顶盏页位元公行天')
  measures = collections.defaultdict(set)
  for word in words:
    if word[1:] and word[0] != '行':  # rows may be of anything
      measures[word[1:]].add(word[0])
  assert measures['照片'] == {'张'} and measures['马'] == {'匹'} and measures['书'] == {'本'}
  assert all(len(options) == 1 for options in measures.values()), measures


@pytest.mark.parametrize('language', stories.LANGUAGES)
def test_stories_are_a_function_of_the_index_and_rarely_repeat(language):
  assert stories.story(3, language).text == GOLDEN[language]  # the same in every process and Python version
  sample = _sample(10_000)
  texts = {index: stories.story(index, language).text for index in sample}
  for index in reversed(sample[:500]):
    assert stories.story(index, language).text == texts[index]
  assert len(set(texts.values())) > 0.998 * len(sample)


def test_every_template_operation_and_difficulty_occurs():
  for language in stories.LANGUAGES:
    templates = stories.TEMPLATES[language]
    assert len(templates) >= 12 and {template.operation for template in templates} == set(stories.OPERATIONS)
    counts = collections.Counter()
    large = 0
    sample = _sample(5000)
    for index in sample:
      story = stories.story(index, language)
      counts[story.operation] += 1
      large += max(*story.operands, CALCULATE[story.operation](*story.operands)) > 20
    assert min(counts.values()) > 0.2 * len(sample), counts
    assert 0.15 < large / len(sample) < 0.3, large


def test_stories_refuse_other_languages_and_indices():
  with pytest.raises(ValueError, match="not in 'fr'"):
    stories.story(0, 'fr')
  with pytest.raises(ValueError, match='not -1'):
    stories.story(-1, 'en')
  with pytest.raises(TypeError):
    stories.story(1.5, 'en')  # type: ignore[arg-type]


def test_examples_in_the_documentation():
  result = doctest.testmod(stories)
  assert result.attempted >= 3 and not result.failed
