"""Files that are complete or not there, and locks between processes."""

import os
import subprocess
import sys

import pytest
import small_data
from etils import epath

from t5x_cpm import files, vocabularies


def test_a_file_is_replaced_whole_and_an_error_leaves_nothing_behind(tmp_path):
  path = tmp_path / 'a.json'
  files.write_json(path, {'文': [1, None]})
  assert path.read_text(encoding='utf-8') == '{\n "文": [\n  1,\n  null\n ]\n}'
  with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
    file.write(b'half of')
    assert len(list(tmp_path.iterdir())) == 2 and path.stat().st_size > 10
    raise ZeroDivisionError
  with pytest.raises(FileNotFoundError):
    files.write_atomically(tmp_path / 'no folder' / 'b', b'')
  files.write_atomically(epath.Path(tmp_path) / 'b', b'c')
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a.json', 'b'] and (tmp_path / 'b').read_bytes() == b'c'


def test_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
  order = []
  monkeypatch.setattr(os, 'fsync', lambda number: order.append('sync'))
  real = os.replace
  monkeypatch.setattr(os, 'replace', lambda *names: (order.append('replace'), real(*names)))
  files.write_atomically(tmp_path / 'a', b'content')
  assert order == ['sync', 'replace']


def test_an_error_while_the_file_gets_its_name_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(number):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    files.write_atomically(tmp_path / 'a', b'content')
  assert not list(tmp_path.iterdir())


HOLD = """
import pathlib, sys
from t5x_cpm import files
with files.lock(pathlib.Path(sys.argv[1]), wait=False):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_lock_names_its_holder_and_is_free_when_that_is_killed(tmp_path):
  path = tmp_path / 'lock'
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  holder = subprocess.Popen([sys.executable, '-c', HOLD, str(path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  try:
    assert holder.stdout.readline() == b'held\n'
    with pytest.raises(files.LockedError, match=f'^process {holder.pid} on '), files.lock(path, wait=False):
      pass
  finally:
    holder.kill()
    holder.communicate()
  with files.lock(path, wait=True):
    assert path.read_text().startswith(f'process {os.getpid()} on ')


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
  def no_locks(*arguments):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(files.fcntl, 'flock', no_locks)
  with files.lock(tmp_path / 'lock', wait=False), files.lock(tmp_path / 'lock', wait=True):
    pass


def test_only_files_are_read(tmp_path):
  """A pipe would be waited for, and a device has no end."""
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'device').symlink_to('/dev/zero')
  (tmp_path / 'file').write_bytes(b'a')
  (tmp_path / 'link').symlink_to('file')
  for name in ('pipe', 'device'):
    with pytest.raises(OSError, match='not a regular file'):
      files.read_bytes(tmp_path / name)
  assert files.read_bytes(tmp_path / 'link') == b'a'


@pytest.mark.parametrize('place', ['pipe', 'device', 'loop'])
def test_a_vocabulary_is_saved_in_the_place_of_anything(tmp_path, place):
  file = small_data.vocabulary_file(tmp_path)
  vocabulary = vocabularies.load(f'cpm2:{file}')
  path = tmp_path / 'saved' / 'vocab.txt'
  path.parent.mkdir()
  os.mkfifo(path) if place == 'pipe' else path.symlink_to('/dev/zero' if place == 'device' else path.name)
  vocabulary.save(path.parent)
  assert path.read_bytes() == file.read_bytes() and not path.is_symlink()
