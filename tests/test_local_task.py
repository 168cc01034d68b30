"""Files of a user's own: documents, shards, and every way in which a file can be wrong."""

import collections
import dataclasses
import gzip
import json

import numpy as np
import pytest
import small_data

from t5x_cpm import tasks
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.data.cache import DataError
from t5x_cpm.tasks import caches, local, text_files


def read_all(path, *, fields=('text',), **options):
  config = LocalTaskConfig(files=str(path), **options)
  skipped: collections.Counter = collections.Counter()
  documents = [document for part in text_files.ranges([str(path)], config.text_document)
               for document in text_files.read(*part, config, fields, skipped)]
  return documents, dict(skipped)


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def config_for(folder, files, **options):
  config = small_data.make_config(folder, name='local')
  return dataclasses.replace(config, local_task=LocalTaskConfig(files=files, **options))


@pytest.mark.parametrize('document, expected', [
    ('line', ['one', 'two  ', 'three', 'four', ' five']), ('paragraph', ['one\ntwo  ', 'three\nfour', ' five']),
    ('file', ['one\ntwo  \n\n \nthree\nfour\n\n\n five'])])
def test_documents_of_a_text_file(tmp_path, document, expected):
  text = '\ufeffone\r\ntwo  \r\n\r\n \r\nthree\r\nfour\r\n\r\n\r\n five\r\n'
  if document == 'file':
    text = text.replace('\r', '')
  path = write(tmp_path / 'a.txt', text)
  assert read_all(path, text_document=document)[0] == [(text,) for text in expected]
  packed = tmp_path / 'a.txt.gz'
  packed.write_bytes(gzip.compress(path.read_bytes()))
  assert read_all(packed, text_document=document)[0] == [(text,) for text in expected]


@pytest.mark.parametrize('suffix, document', [('.txt', 'line'), ('.txt', 'paragraph'), ('.jsonl', 'line')])
def test_shards_hold_every_document_once(tmp_path, monkeypatch, suffix, document):
  seed = 8
  rng = np.random.default_rng(seed)
  texts = ['天地玄黄'[rng.integers(4)] * int(n) + str(i) for i, n in enumerate(rng.integers(0, 60, 300))]
  if suffix == '.jsonl':
    content = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts)
  elif document == 'line':
    content = ''.join(text + '\n' * rng.integers(1, 3) for text in texts)
  else:
    content = ''.join(text + '\nand more' + ['\n\n', '\n \n', '\n\n\n\n'][rng.integers(3)] for text in texts)
    texts = [text + '\nand more' for text in texts]
  path = write(tmp_path / f'a{suffix}', content)
  for size in (1, 7, 100, 3000):
    monkeypatch.setattr(text_files, 'UNIT_BYTES', size)
    assert len(text_files.ranges([str(path)], document)) > (1 if size < 3000 else 0)
    assert read_all(path, text_document=document)[0] == [(text,) for text in texts], f'seed {seed}, shards of {size} bytes'


@pytest.mark.parametrize('content, line, complaint', [
    ('{"text": "a"}\n\n{"text": "b"\n', 3, 'malformed JSON'),
    ('{"text": "a"}\n["b"]\n', 2, "a JSON array, where a JSON object with 'text' is expected"),
    ('{"text": "a"}\n{"body": "b"}\n', 2, "no field 'text' among \\['body'\\].*LocalTaskConfig.text_field"),
    ('{"text": 3}\n', 1, "'text' is not a text"),
    ('{"text": "a"}\n{"text": "\\ud800"}\n', 2, 'half of a surrogate pair'),
    (b'{"text": "a"}\n{"text": "b\xff"}\n', 2, 'byte 12 of the line \\(0xff\\) is not valid UTF-8'),
    ('{"text": "a"}\n{"text": ' + '[' * 100_000 + '\n', 2, 'malformed JSON'),
    ('{"text": "a"}\n{"text": "a", "id": ' + '9' * 5000 + '}\n', 2, 'number of too many digits'),
])
def test_a_malformed_line_is_named_or_skipped_if_told(tmp_path, content, line, complaint):
  path = write(tmp_path / 'a.jsonl', content)
  with pytest.raises(DataError, match=f'^{path}:{line}: .*{complaint}.*skip_malformed'):
    read_all(path)
  documents, skipped = read_all(path, skip_malformed=True)
  assert skipped == {'malformed': 1} and documents == [('a',)] * (line > 1)


def test_lines_are_counted_from_the_start_of_the_file_in_every_shard(tmp_path, monkeypatch):
  lines = [json.dumps({'text': 'x' * i}) for i in range(1, 200)]
  lines[150] = '{'
  path = write(tmp_path / 'a.jsonl', '\n'.join(lines))
  for size in (64, 1 << 20):
    monkeypatch.setattr(text_files, 'UNIT_BYTES', size)
    with pytest.raises(DataError, match=f'^{path}:151: '):
      read_all(path)


@pytest.mark.parametrize('document, line', [('line', 4), ('paragraph', 4), ('file', 4)])
def test_invalid_utf8_in_text(tmp_path, document, line):
  path = write(tmp_path / 'a.txt', b'good\n\nfine\nab' + '中'.encode('gbk') + b'\nlast\n')
  with pytest.raises(DataError, match=f'{path}:{line}: byte 3 of the line .0xd6. is not valid UTF-8'):
    read_all(path, text_document=document)


def test_damaged_gzip(tmp_path):
  good = gzip.compress(b'{"text": "a"}\n' * 1000)
  for content, complaint in ((good[:-20], 'is damaged: compressed file ended'), (b'no gzip at all', 'is not in gzip format')):
    path = write(tmp_path / 'a.jsonl.gz', content)
    with pytest.raises((DataError, ConfigError), match=f'^{path} {complaint}'):
      read_all(path)


def test_pairs_and_empty_sides(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"inputs": "a", "targets": "b"}\n{"inputs": "c", "targets": " "}\n')
  documents, skipped = read_all(path, fields=('inputs', 'targets'))
  assert documents == [('a', 'b')] and skipped == {'empty': 1}


@pytest.mark.parametrize('files, complaint', [
    ('', "needs files: set LocalTaskConfig.files"),
    ('/nowhere/*.txt', "LocalTaskConfig.files = '/nowhere/\\*.txt' matches no file"),
    ('{folder}/*.csv', 'a.csv ends in none of .txt, .jsonl'),
    ('{folder}/empty.txt', 'every file that matches is empty'),
])
def test_globs_that_cannot_be_read(tmp_path, files, complaint):
  write(tmp_path / 'a.csv', 'x')
  write(tmp_path / 'empty.txt', '')
  with pytest.raises(ConfigError, match=complaint):
    tasks.get(config_for(tmp_path, files.format(folder=tmp_path)))


@pytest.mark.parametrize('files, validation_files, complaint', [
    ('/x/*.txt', {'a': '/y/*.txt'}, "validation_files = {'a': '/y/\\*.txt'}: expected one glob, as LocalTaskConfig.files"),
    ({'a': '/x/*.txt', 'b': '/y/*.txt'}, {'a': '/v', 'c': '/w'}, r"validation_files names \['c'\], .*files names \['a', 'b'\]"),
])
def test_validation_files_that_fit_no_files_are_refused(files, validation_files, complaint):
  with pytest.raises(ConfigError, match=complaint):
    LocalTaskConfig(files=files, validation_files=validation_files).validate()


def test_pairs_need_jsonl(tmp_path):
  path = write(tmp_path / 'a.txt', 'x')
  with pytest.raises(ConfigError, match="a.txt: TaskConfig.objective = 'pairs' reads .jsonl"):
    local.find(str(path), 'files', pairs=True)


def test_the_held_out_part_is_a_function_of_the_text():
  documents = [(f'document {i}',) for i in range(4000)]
  chosen = [document for document in documents if text_files.held_out(document, 0.1)]
  assert 320 < len(chosen) < 480
  assert set(chosen) <= {document for document in documents if text_files.held_out(document, 0.2)}
  assert not any(text_files.held_out(document, 0.0) for document in documents)


def test_the_cache_of_a_task_is_named_by_what_determines_its_tokens(tmp_path):
  config = config_for(tmp_path, {'a': '/x/*.txt', 'b': '/y/*.txt'}, rates={'a': 1.0, 'b': 2.0})

  def folder(config, **changes):
    return caches.directory(dataclasses.replace(config, **{
        part: dataclasses.replace(getattr(config, part), **fields) for part, fields in changes.items()}))

  part = {'task': {'name': 'local:a'}}
  assert folder(config) == folder(config, task={'encoder_length': 64, 'objective': 't5', 'mean_span_length': 9.0})
  assert folder(config) != folder(config, local_task={'rates': {'a': 1.0, 'b': 3.0}})
  assert folder(config, **part) == folder(config, **part, local_task={'files': {'a': '/x/*.txt', 'b': '/z/*'}})
  assert folder(config, **part) != folder(config, **part, local_task={'text_document': 'file'})
  assert len({folder(config), folder(config, task={'objective': 'pairs'}), folder(config, task={'vocabulary': 'cpm2:other'}),
              folder(config, **part)}) == 4
  with pytest.raises(ConfigError, match="TaskConfig.name = 'local:c': LocalTaskConfig.files has \\['a', 'b'\\]"):
    folder(config, task={'name': 'local:c'})
