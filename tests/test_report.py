"""What is cut, dropped or skipped is told, and the numbers are those of plain counting."""

import dataclasses
import json
import re

import numpy as np
import pytest
import small_data

from t5x_cpm.cli import modes
from t5x_cpm.cli.parse import Arguments
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.data import report
from t5x_cpm.data.cache import DataError
from t5x_cpm.tasks import caches

FILES = {'good': '天地玄黄\n宇宙洪荒\n日月盈昃\n', 'short': '天\n地\n', 'nothing': '', 'blanks': '\n \n\t\n',
         'blanks after a mark': '\ufeff\n\n'}
CR_FILES = {'a.txt': 'ab\rcd\r', 'b.txt': 'ab\rcd', 'c.jsonl': '{"text": "ab"}\r{"text": "cd"}\r', 'd.txt': '\rab\r\rcd\r\n'}


def config_for(folder, files, **options):
  config = small_data.make_config(folder, name='local', cache_processes=1, encoder_length=32, decoder_length=16)
  return dataclasses.replace(config, local_task=LocalTaskConfig(files=files, validation_fraction=0.0, **options))


def numbers(line: str) -> dict[str, int]:
  """The word after each number of a line, and the number."""
  return {word: int(number.replace(',', '')) for number, word in re.findall(r'(\d[\d,]*) (\w+)', line)}


@pytest.mark.parametrize('objective', ['isolated', 't5', 'cpm2', 'pairs'])
def test_each_objective_tells_what_it_cuts_and_leaves_out(tmp_path, objective):
  for seed in range(2):
    rng, folder = np.random.default_rng(seed), tmp_path / str(seed)
    folder.mkdir()
    sizes = rng.integers(1, rng.integers(3, 120), (2, 60))
    documents = {name: small_data.random_documents(rng, lengths) for name, lengths in zip(('inputs', 'targets'), sizes)}
    config = small_data.make_config(folder, objective=objective, encoder_length=32, decoder_length=8)
    small_data.fill(config, {'train': documents if objective == 'pairs' else {'targets': documents['targets']}})
    (line,) = report.of_cache(caches.build(config), config)
    found, lengths = numbers(line), sizes[1]
    what = f'seed {seed}: {line}'
    if objective == 'pairs':
      assert found.pop('pairs') == 60, what
      cut = {'inputs': (sizes[0] > 31).sum(), 'targets': (lengths > 7).sum()}
      assert dict(re.findall(r'the (\w+) of (\d+) cut', line)) == {side: str(n) for side, n in cut.items() if n}, what
      continue
    assert found['documents'] == 60, what
    if objective == 'cpm2':
      assert found.get('of', 0) == (lengths < 10).sum() or 'joined' not in line, what
      read = small_data.open_reader(config, 'train')
      part = read.components[0]
      assert found['windows' if part.rows_per_epoch > 1 else 'window'] == part.rows_per_epoch, what
      cut = re.search(r'the targets of (\d+) cut', line)
      assert (int(cut[1]) if cut else 0) == read.statistics()['tasks']['wiki_zh']['truncated'], what
    else:
      end = int(objective == 'isolated')
      assert found.get('too', 0) == (lengths + end < 2).sum(), what
      longest = int(re.search(r'at most (\d+) tokens', line)[1])
      assert found['pieces'] == sum(-(-(n + end) // longest) for n in lengths if n + end > 1), what


def test_every_kind_of_file_is_told(tmp_path):
  """Each kind alone, and all together, each a number of times: told in a line, or refused where nothing can be trained."""
  seed = 3
  rng = np.random.default_rng(seed)
  for number, (kind, text) in enumerate(FILES.items()):
    times = int(rng.integers(1, 4))
    for i in range(times):
      (tmp_path / f'{number}{i}.txt').write_text(text)
    config = config_for(tmp_path, str(tmp_path / f'{number}?.txt'))
    if kind in ('good', 'short'):
      assert report.of_cache(caches.build(config, progress=False), config)[0].startswith(f'{times * text.count(chr(10))} docu')
    else:
      with pytest.raises(ConfigError, match='every file that matches is empty|no document to train on: 0 documents'):
        report.of_cache(caches.build(config, progress=False), config)
  config = config_for(tmp_path, str(tmp_path / '??.txt'))
  lines = report.of_cache(caches.build(config, progress=False), config)
  count = {kind: len(list(tmp_path.glob(f'{number}?.txt'))) for number, kind in enumerate(FILES)}
  blank = count['blanks'] + count['blanks after a mark']
  files = 'file' if blank == 1 else 'files'
  documents = 3 * count['good'] + 2 * count['short']
  assert lines[0].startswith(f'{documents} documents ({blank} {files} of blanks left out), '), lines
  assert lines[1].startswith(f'{count["nothing"]} of {sum(count.values())} files'), lines


def test_lines_that_end_with_cr_alone_are_not_one_document(tmp_path):
  for name, text in CR_FILES.items():
    for document in ('line', 'paragraph', 'file'):
      (tmp_path / name).write_bytes(text.encode())
      config = config_for(tmp_path, str(tmp_path / name), text_document=document, skip_malformed=True)
      if document == 'file' and name != 'c.jsonl':
        assert report.of_cache(caches.build(config, progress=False), config)[0].startswith('1 document')
      else:
        with pytest.raises(DataError, match=f'{name}: its lines end with CR alone'):
          caches.build(config, progress=False)


def test_cache_says_in_words_what_it_holds(tmp_path, capsys):
  lines = [json.dumps({'text': '天' * n}, ensure_ascii=False) for n in (0, 5, 9, 200)]
  (tmp_path / 'a.jsonl').write_text('\n'.join([*lines, '{broken', '["x"]']))
  config = config_for(tmp_path, str(tmp_path / 'a.jsonl'), skip_malformed=True)
  modes.cache(Arguments(modes.MODES['cache'], {}, []), config)
  printed = capsys.readouterr()
  assert printed.out == f'{caches.directory(config)}\n'
  assert 'data: 3 documents (2 malformed and 1 empty left out), 8 pieces of at most 35 tokens\n' in printed.err
  assert 'data: validation' not in printed.err
  config = dataclasses.replace(config, local_task=dataclasses.replace(config.local_task, validation_fraction=0.001))
  modes.cache(Arguments(modes.MODES['cache'], {}, []), config)
  assert "data: validation: task 'local' has no documents in split 'validation'" in capsys.readouterr().err


def test_a_task_of_a_mixture_without_anything_to_read_is_told_or_refused(tmp_path):
  (tmp_path / 'a.txt').write_text('天地玄黄\n' * 3)
  (tmp_path / 'b.txt').write_text('宇宙洪荒\n')
  (tmp_path / 'c.txt').write_text('\n')
  both = {name: str(tmp_path / f'{name}.txt') for name in 'ab'}
  config = config_for(tmp_path, both, validation_files={'a': both['a'], 'b': str(tmp_path / 'c.txt')})
  lines = report.of_cache(caches.build(config, progress=False), config)
  assert [line.split(' document')[0] for line in lines[:3]] == ['local:a: 3', 'local:b: 1', 'validation: local:a: 3']
  assert lines[3].startswith('validation: local:b has nothing to read: 0 documents (1 file of blanks left out)')
  config = config_for(tmp_path, both | {'b': str(tmp_path / 'c.txt')})
  with pytest.raises(ConfigError, match="task 'local:b' has no document to train on: 0 documents .1 file of blanks left out"):
    report.of_cache(caches.build(config, progress=False), config)
