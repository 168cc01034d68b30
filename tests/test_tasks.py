"""The tables of tasks: names, the quickstart corpus, metrics."""

import collections
import dataclasses
import re
import subprocess
import sys

import pytest
import small_data

from t5x_cpm import tasks
from t5x_cpm.config import ConfigError
from t5x_cpm.data import cache
from t5x_cpm.tasks import metrics, pretrain, quickstart
from t5x_cpm.tasks.table import MixtureRow


@pytest.mark.parametrize('name, hint', [
    ('quikstart', 'did you mean quickstart'), ('quickstart-zh', 'did you mean quickstart_zh'),
    ('zzzz', 'expected one of quickstart')])
def test_a_task_that_is_not_registered(tmp_path, name, hint):
  with pytest.raises(ConfigError, match=f"TaskConfig.name = '{name}' is not registered; {hint}"):
    cache.directory(small_data.make_config(tmp_path, name=name))


def test_a_changed_row_is_another_cache_also_of_its_mixtures(tmp_path, monkeypatch):
  config = small_data.make_config(tmp_path, name='wiki_zh_en')
  before = cache.directory(config)
  monkeypatch.setitem(tasks.ROWS, 'wiki_en', dataclasses.replace(tasks.ROWS['wiki_en'], source='wiki40b/en:1.4.0'))
  assert cache.directory(config) != before


def test_listing_names_every_task():
  names = tasks.listing()
  assert {'quickstart', 'quickstart_arithmetic', 'pretrain_zh_en', 'local'} <= set(names) and all(names.values())


def test_listing_tasks_imports_no_tensorflow():
  code = 'import sys; from t5x_cpm import tasks; tasks.listing(); sys.exit(bool({"tensorflow", "seqio"} & set(sys.modules)))'
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('part', ['zh', 'en', 'parallel', 'stories', 'arithmetic'])
def test_quickstart_documents(part):
  row = tasks.ROWS[f'quickstart_{part}']
  source = quickstart.documents(row)
  found = {split: [document for batch in source.texts(split, [0], collections.Counter()) for document in batch]
           for split in ('train', 'validation')}
  assert not set(found['train']) & set(found['validation']) or part in ('stories', 'arithmetic')  # stories may repeat
  assert len(found['train']) > 100 and len(found['validation']) >= 8
  for document in found['train'] + found['validation']:
    assert len(document) == len(source.features) and all(text.strip() and '\t' not in text for text in document)
    assert part != 'parallel' or document[0].count('\n') == 1


def test_every_mixture_names_rows():
  for row in tasks.ROWS.values():
    if isinstance(row, MixtureRow):
      assert set(row.rates) <= set(tasks.ROWS) and row.name not in row.rates


def test_layout_marks_of_wiki40b_are_removed():
  text = '\n_START_ARTICLE_\n天\n_START_SECTION_\n地\n_START_PARAGRAPH_\n玄_NEWLINE_黄'
  for pattern, replacement in pretrain.CLEAN['wiki40b']:
    text = re.sub(pattern, replacement, text)
  assert text == '天\n地\n玄\n黄'


def test_metrics_of_chinese_answers():
  assert metrics.exact_match(['７个 苹果。', '-3.5'], ['7个苹果', '-3.5']) == {'exact_match': 100.0}
  assert metrics.exact_match(['-3', '3.5', '20%'], ['3', '35', '20']) == {'exact_match': 0.0}
  assert metrics.char_f1(['北京大学', ''], ['北京', '']) == {'char_f1': pytest.approx((2 / 3 + 1) * 50)}
