"""tools/train_vocabulary.py and tools/tokenize_report.py, as a user runs them."""

import pathlib
import subprocess
import sys

from t5x_cpm import vocabularies
from t5x_cpm.tasks import stories

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / 'tasks' / 'corpus'


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, f'tools/{tool}.py', *arguments], cwd=ROOT, capture_output=True, text=True,
                        env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'})


def test_the_shipped_vocabulary_is_what_the_tool_makes(tmp_path):
  texts = [stories.story(index, language).text for index in range(2000) for language in stories.LANGUAGES]
  (tmp_path / 'stories.txt').write_text('\n'.join(texts) + '\n', encoding='utf-8')
  inputs = [f'--input={CORPUS}/{name}' for name in ('zh.txt', 'en.txt', 'parallel.tsv')] + [f'--input={tmp_path}/stories.txt']
  done = run('train_vocabulary', *inputs, '--size=3200', '--sentinels=50', '--byte_fallback', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'vocab.txt').read_bytes() == (CORPUS / 'vocab.txt').read_bytes()


def test_pieces_without_bytes_follow_the_bilingual_format(tmp_path):
  done = run('train_vocabulary', f'--input={CORPUS}/*.txt', '--size=2400', '--sentinels=20', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 0, done.stderr
  vocab = vocabularies.load(f'cpm2:{tmp_path}/vocab.txt')
  assert vocab.size == 2400 and len(vocab.sentinels) == 20 and vocab.sentinels[-1] == 2399
  pieces = [vocab.piece(token) for token in range(vocab.size)]
  assert any(piece.startswith('##') for piece in pieces) and '<0x00>' not in pieces
  text = 'The rain started just after breakfast'
  assert vocab.decode(vocab.encode(text)) == text


def test_a_size_that_the_text_does_not_give_is_refused(tmp_path):
  done = run('train_vocabulary', f'--input={CORPUS}/zh.txt', '--size=90000', f'--output={tmp_path}/vocab.txt')
  assert done.returncode != 0 and '--size=90000' in done.stderr
  assert not (tmp_path / 'vocab.txt').exists()
  done = run('train_vocabulary', f'--input={tmp_path}/*.txt', f'--output={tmp_path}/vocab.txt')
  assert done.returncode != 0 and 'matches no file' in done.stderr


def test_report_counts_what_is_lost(tmp_path):
  done = run('train_vocabulary', f'--input={CORPUS}/en.txt', '--size=700', '--sentinels=5', f'--output={tmp_path}/vocab.txt')
  assert done.returncode == 0, done.stderr
  (tmp_path / 'text.txt').write_text('The rain\nThe 雨\n', encoding='utf-8')
  done = run('tokenize_report', f'--vocabulary=cpm2:{tmp_path}/vocab.txt', f'--input={tmp_path}/text.txt')
  assert done.returncode == 0, done.stderr
  assert 'unknown tokens        1 ' in done.stdout and '1 of 2' in done.stdout and 'no piece: Lo' in done.stdout
