"""The tasks that ship with the project: a small bilingual corpus, and generated stories from which a model can learn."""

import os
import pathlib
from collections.abc import Iterator

from t5x_cpm.tasks import stories
from t5x_cpm.tasks.documents import Documents
from t5x_cpm.tasks.table import MixtureRow, Row

CORPUS = pathlib.Path(os.path.abspath(__file__)).parent / 'corpus'
VOCABULARY = f'cpm2:{CORPUS / "vocab.txt"}'
STORIES = {'train': range(15_000), 'validation': range(1_000_000, 1_000_200)}
HELD_OUT = 20  # every 20th passage is for validation

ROWS = (
    MixtureRow('quickstart', 'Chinese, English and parallel passages and arithmetic stories',
               {'quickstart_zh': 1, 'quickstart_en': 1, 'quickstart_parallel': 1, 'quickstart_stories': 6},
               vocabulary=VOCABULARY),
    Row('quickstart_zh', 'short Chinese passages', 'quickstart', 'zh', vocabulary=VOCABULARY),
    Row('quickstart_en', 'short English passages', 'quickstart', 'en', vocabulary=VOCABULARY),
    Row('quickstart_parallel', 'Chinese sentences with their translation', 'quickstart', 'parallel', vocabulary=VOCABULARY),
    Row('quickstart_stories', 'generated arithmetic stories in both languages', 'quickstart', 'stories',
        vocabulary=VOCABULARY),
    Row('quickstart_arithmetic', 'the question of a story as inputs, its answer as targets', 'quickstart', 'arithmetic',
        vocabulary=VOCABULARY, pairs=True, metrics=('exact_match',)),
)


def _file(source: str) -> str:
  name = {'zh': 'corpus/zh.txt', 'en': 'corpus/en.txt', 'parallel': 'corpus/parallel.tsv'}.get(source, 'stories.py')
  return str(CORPUS.parent / name)


def _read(source: str, split: str) -> Iterator[tuple[str, ...]]:
  if source in ('stories', 'arithmetic'):
    for index in STORIES[split]:
      for language in stories.LANGUAGES:
        story = stories.story(index, language)
        yield (story.text,) if source == 'stories' else (story.question, story.answer)
    return
  lines = pathlib.Path(_file(source)).read_text(encoding='utf-8').splitlines()
  for number, line in enumerate(line for line in lines if line.strip()):
    if (number % HELD_OUT == HELD_OUT - 1) == (split == 'validation'):
      sides = line.split('\t')
      yield ('\n'.join(sides if number % 2 else sides[::-1]),)


def documents(row: Row) -> Documents:
  """The documents of one row: texts, or inputs and targets."""
  features = ['inputs', 'targets'] if row.pairs else ['targets']
  return Documents(lambda split, shard, skipped: _read(row.source, split), {'train': 1, 'validation': 1}, features,
                   [_file(row.source)])
