"""The tables of tasks: names, the quickstart corpus, metrics."""

import collections
import dataclasses
import re
import subprocess
import sys

import pytest
import small_data

from t5x_cpm import tasks
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.tasks import caches, metrics, pretrain, quickstart
from t5x_cpm.tasks.table import MixtureRow


@pytest.mark.parametrize('name, hint', [
    ('quikstart', 'did you mean quickstart'), ('quickstart-zh', 'did you mean quickstart_zh'),
    ('zzzz', 'expected one of quickstart')])
def test_a_task_that_is_not_registered(tmp_path, name, hint):
  with pytest.raises(ConfigError, match=f"TaskConfig.name = '{name}' is not registered; {hint}"):
    caches.directory(small_data.make_config(tmp_path, name=name))


def test_a_changed_row_is_another_cache_also_of_its_mixtures(tmp_path, monkeypatch):
  config = small_data.make_config(tmp_path, name='wiki_zh_en')
  before = caches.directory(config)
  monkeypatch.setitem(tasks.ROWS, 'wiki_en', dataclasses.replace(tasks.ROWS['wiki_en'], source='wiki40b/en:1.4.0'))
  assert caches.directory(config) != before


def test_the_same_words_in_another_folder_are_another_cache(tmp_path, monkeypatch):
  plain = small_data.make_config(tmp_path, name='local')
  found = {}
  for folder, vocabulary, files in (('a', 'v.txt', 't.txt'), ('b', 'v.txt', 't.txt'), ('b', '../a/v.txt', '../a/t.txt'),
                                    ('b', '../a/v.txt', 't.txt'), ('b', 'v.txt', '../a/t.txt')):
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    config = dataclasses.replace(plain, task=dataclasses.replace(plain.task, vocabulary=f'cpm2:{vocabulary}'),
                                 local_task=LocalTaskConfig(files=files))
    found[folder, vocabulary, files] = caches.directory(config)
  a, b, a_from_b, *mixed = found.values()
  assert a == a_from_b and len({a, b, *mixed}) == 4


@pytest.mark.parametrize('vocabulary', ['vocab.txt', 'cpm2:'])
def test_a_vocabulary_that_is_none_is_not_taken_for_the_tasks_own(tmp_path, vocabulary):
  config = small_data.make_config(tmp_path, name='quickstart')
  found = {caches.directory(dataclasses.replace(config, task=dataclasses.replace(config.task, vocabulary=spec)))
           for spec in ('', vocabulary)}
  assert len(found) == 2


def test_a_task_of_an_edited_module_is_another_cache(tmp_path, monkeypatch):
  (tmp_path / 'my_corpus').mkdir()
  (tmp_path / 'my_corpus/__init__.py').write_text('import my_corpus.rates')
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  monkeypatch.setattr(tasks, '_registered', lambda: {'my_text'})
  found = []
  for text in ('RATE = 1', 'RATE = 2', 'RATE = 1'):
    (tmp_path / 'my_corpus/rates.py').write_text(text)
    monkeypatch.setattr(tasks, '_modules', {})
    for name in ('my_corpus', 'my_corpus.rates'):
      monkeypatch.delitem(sys.modules, name, raising=False)
    tasks.import_modules(['my_corpus'])
    found.append(caches.directory(small_data.make_config(tmp_path, name='my_text')))
  assert found[0] == found[2] != found[1]


@pytest.mark.parametrize('name', ['quickstart', 'wiki_zh_en', 'local', 'local:zh', 'tfds:x'])
def test_a_task_of_a_module_under_a_name_that_exists_is_refused(monkeypatch, name):
  monkeypatch.setattr(tasks, '_registered', lambda: {'my_text', name})
  with pytest.raises(ConfigError, match=f"--import=my_corpus: the task '{name}' that is registered there has the name of"):
    tasks.remember_modules(['my_corpus'])


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
  assert metrics.exact_match(['７个 苹果。', '-3.5'], ['7个苹果', '-3.5']) == {'exact_match': 1.0}
  assert metrics.exact_match(['-3', '3.5', '20%'], ['3', '35', '20']) == {'exact_match': 0.0}
  assert metrics.char_f1(['北京大学', ''], ['北京', '']) == {'char_f1': pytest.approx((2 / 3 + 1) / 2)}
