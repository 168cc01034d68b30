"""`vocabulary` and `tokenize`, as a user runs them."""

import pathlib
import subprocess
import sys

import pytest

from t5x_cpm import vocabularies
from t5x_cpm.config import ConfigError
from t5x_cpm.tasks import stories
from t5x_cpm.vocabularies import texts, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / 'tasks' / 'corpus'


def run(mode: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', 't5x_cpm', mode, *arguments], cwd=ROOT, capture_output=True, text=True,
                        env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'})


def test_the_shipped_vocabulary_is_what_the_mode_makes(tmp_path):
  texts = [stories.story(index, language).text for index in range(2000) for language in stories.LANGUAGES]
  (tmp_path / 'stories.txt').write_text('\n'.join(texts) + '\n', encoding='utf-8')
  inputs = [f'--input={CORPUS}/{name}' for name in ('zh.txt', 'en.txt', 'parallel.tsv')] + [f'--input={tmp_path}/stories.txt']
  done = run('vocabulary', *inputs, '--size=3200', '--sentinels=50', '--byte_fallback', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'vocab.txt').read_bytes() == (CORPUS / 'vocab.txt').read_bytes()


def test_pieces_without_bytes_follow_the_bilingual_format(tmp_path):
  done = run('vocabulary', f'--input={CORPUS}/*.txt', '--size=2400', '--sentinels=20', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 0, done.stderr
  vocab = vocabularies.load(f'cpm2:{tmp_path}/vocab.txt')
  assert vocab.size == 2400 and len(vocab.sentinels) == 20 and vocab.sentinels[-1] == 2399
  pieces = [vocab.piece(token) for token in range(vocab.size)]
  assert any(piece.startswith('##') for piece in pieces) and '<0x00>' not in pieces
  text = 'The rain started just after breakfast'
  assert vocab.decode(vocab.encode(text)) == text


def test_a_size_that_the_text_does_not_give_is_refused(tmp_path):
  done = run('vocabulary', f'--input={CORPUS}/zh.txt', '--size=90000', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 2 and '--size=90000: a vocabulary of this text has at most' in done.stderr
  done = run('vocabulary', f'--input={CORPUS}/zh.txt', '--size=200', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 2 and '--size=200: a vocabulary of this text has at least' in done.stderr
  assert not (tmp_path / 'vocab.txt').exists()
  done = run('vocabulary', f'--input={tmp_path}/*.txt', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 2 and 'matches no file' in done.stderr
  (tmp_path / 'bytes.txt').write_bytes(b'ok\n\xff\n')
  (tmp_path / 'lines.jsonl').write_text('{"text": "a"}\n{"text": 3}\n')
  (tmp_path / 'not.txt.gz').write_bytes(b'plain')
  for name, message in (('bytes.txt', r'bytes.txt:2: byte 1 of the line \(0xff\)'), ('not.txt.gz', 'not in gzip format'),
                        ('lines.jsonl', "lines.jsonl:2: 'text' is not a text .--field")):
    with pytest.raises(ConfigError, match=message):
      list(texts.read([str(tmp_path / name)], 'text'))
  with pytest.raises(ConfigError, match='--sentinels=0: expected at least 1'):
    train.run([f'{CORPUS}/zh.txt'], str(tmp_path / 'vocab.txt'), sentinels=0)
  with pytest.raises(ConfigError, match='--sentinels=70000000: expected fewer than there are pieces, --size=8000'):
    train.run([f'{CORPUS}/zh.txt'], str(tmp_path / 'vocab.txt'), sentinels=70_000_000)


def test_an_output_that_cannot_be_written_is_told_before_the_text_is_read(tmp_path):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'circle').symlink_to(tmp_path / 'circle')
  for name in ('', 'file/x', 'circle/x', 'x' * 300, 'y/' * 2500 + 'z'):
    with pytest.raises(ConfigError, match='^--output=.* cannot be written: ') as error:
      train.run([f'{tmp_path}/gone'], f'{tmp_path}/{name}')
    assert '\n' not in str(error.value)


def test_bytes_make_room_for_few_pieces_of_many_characters(tmp_path):
  train.run([f'{CORPUS}/zh.txt'], str(tmp_path / 'vocab.txt'), size=700, byte_fallback=True)
  vocab = vocabularies.load(f'cpm2:{tmp_path}/vocab.txt')
  assert vocab.size == 700
  assert vocab.decode(vocab.encode('今天下雨，齉')) == '今天下雨，齉'


def test_an_extended_vocabulary_keeps_the_pieces_and_cuts_old_text_as_before(tmp_path):
  old, new, other = (tmp_path / name for name in ('zh.txt', 'both.txt', 'other.txt'))
  train.run([f'{CORPUS}/zh.txt'], str(old), size=1500, sentinels=30, byte_fallback=True)
  train.run([f'{CORPUS}/en.txt'], str(new), size=2200, sentinels=40, byte_fallback=True, extends=str(old))
  before, after = (path.read_text(encoding='utf-8').split('\n')[:-1] for path in (old, new))
  assert after[:1500 - 286] == before[:-286] and len(after) == len(set(after)) == 2200 and after[-1] == '<s_39>'
  first, second = (vocabularies.load(f'cpm2:{path}') for path in (old, new))
  texts = (CORPUS / 'zh.txt').read_text(encoding='utf-8').splitlines()
  pieces = [[[vocab.piece(token) for token in vocab.encode(text)] for text in texts] for vocab in (first, second)]
  same = sum(a == b for a, b in zip(*pieces))
  assert same >= 0.95 * len(texts)  # others have English words, which have pieces now
  assert len(second.encode('The rain started after breakfast')) < len(first.encode('The rain started after breakfast'))
  other.write_text('\n'.join(before[:-1] + ['x', before[-1]]) + '\n', encoding='utf-8')
  with pytest.raises(ConfigError, match="the piece 'x' stands after bytes or sentinels"):
    train.run([f'{CORPUS}/en.txt'], str(new), size=2200, extends=str(other))
  for content in (None, b'\xff\n', b'x' * 1000):
    if content is not None:
      other.write_bytes(content)
    with pytest.raises(ConfigError, match=r'Check --extends\.$'):
      train.kept_pieces(str(tmp_path / 'no.txt' if content is None else other))


def test_report_counts_what_is_lost(tmp_path):
  done = run('vocabulary', f'--input={CORPUS}/en.txt', '--size=700', '--sentinels=5', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 0, done.stderr
  (tmp_path / 'text.txt').write_text('The rain\nThe 雨\n', encoding='utf-8')
  done = run('tokenize', f'--vocabulary=cpm2:{tmp_path}/vocab.txt', f'--input={tmp_path}/text.txt')
  assert done.returncode == 0, done.stderr
  assert 'unknown tokens        1 ' in done.stdout and '1 of 2' in done.stdout and 'no piece: Lo' in done.stdout
