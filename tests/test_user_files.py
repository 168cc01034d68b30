"""Files of text as users have them: every mode that reads such files takes the same, and refuses the rest alike."""

import codecs
import collections
import gzip
import json
import os
import pathlib
import random

import pytest
import small_data
import small_model

from t5x_cpm import user_files, vocabularies
from t5x_cpm.__main__ import main
from t5x_cpm.config import ConfigError, LocalTaskConfig
from t5x_cpm.data import cache
from t5x_cpm.data.cache import DataError
from t5x_cpm.inference import infer
from t5x_cpm.inference import lines as lines_lib
from t5x_cpm.tasks import text_files
from t5x_cpm.vocabularies import texts

TEXTS = ['一二 three, four', '五六七八，九十。']
PLAIN = '\n'.join(TEXTS) + '\n'
JSON = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in TEXTS)
TOOLS = ('tokenize', 'vocabulary', 'cache', 'infer')
CHINESE = '今天下午下雨了，我们就不去公园了。\n他把书放在桌子上。\n'

GOOD = {
    'plain.txt': PLAIN, 'json.jsonl': JSON, 'mark.txt': '\ufeff' + PLAIN, 'mark.jsonl': '\ufeff' + JSON,
    'blank.txt': f'\n{PLAIN.replace(chr(10), chr(10) * 3)} \n', 'blank.jsonl': '\n' + JSON.replace('\n', '\n\n \n'),
    'windows.txt': PLAIN.replace('\n', '\r\n'), 'windows.jsonl': JSON.replace('\n', '\r\n'), 'no_end.txt': PLAIN.rstrip(),
    'brackets[v1].txt': PLAIN, 'brackets[v1].jsonl': JSON, 'packed.txt.gz': gzip.compress(PLAIN.encode()),
    'packed.jsonl.gz': gzip.compress(('\ufeff' + JSON).encode()), 'two_parts.txt.gz': b''.join(
        gzip.compress(part.encode()) for part in PLAIN.splitlines(keepends=True))}

# Content, and what every mode says of it.
BAD = {
    'gbk.txt': (CHINESE.encode('gbk'), ':1: byte 1 of the line (0xbd) is not valid UTF-8; it looks like GBK: convert it to '
                'UTF-8 with `iconv -f GB18030 -t UTF-8`.'),
    'gbk.jsonl': (JSON.encode('gbk'), ':1: byte 13 of the line (0xb6) is not valid UTF-8; it looks like GBK'),
    'latin.txt': ('One\nLe café est fermé à présent\n'.encode('latin-1'), ':2: byte 7 of the line (0xe9) is not valid UTF-8.'),
    'cut.txt': (PLAIN.encode()[:-3], ':2: byte 22 of the line (0xe3) is not valid UTF-8'),
    'cut.jsonl': (JSON[:-5], ':2: malformed JSON (Unterminated string'),
    'array.jsonl': (json.dumps([{'text': text} for text in TEXTS]), ':1: a JSON array, where a JSON object with \'text\' is '
                    'expected: write one object a line'),
    'lines_of_array.jsonl': ('[\n' + JSON.strip().replace('\n', ',\n') + '\n]\n', ':1: a JSON array'),
    'array_from_line_1.jsonl': ('[' + JSON.strip().replace('\n', ',\n') + ']\n', ':1: a JSON array'),
    'pretty.jsonl': ('{\n "text": "a"\n}\n', ':1: a JSON object that does not end on its line: write one object a line'),
    'returns.txt': (PLAIN.replace('\n', '\r'), ': its lines end with CR alone'),
    'returns.jsonl': (JSON.replace('\n', '\r'), ': its lines end with CR alone'),
    'text.jsonl': (PLAIN, ':1: malformed JSON (Expecting value at column 1)'),
    'field.jsonl': ('{"body": "a"}\n', ":1: no field 'text' among ['body']"),
    'whole.json': (JSON, '.jsonl'), 'folder.txt': (None, 'is a folder'), 'named.txt.gz': (PLAIN, 'gz'),
    'half.txt.gz': (gzip.compress(PLAIN.encode() * 999)[:-9], 'gz'), 'broken.txt.gz': (gzip.compress(b'a')[:12] + b'aa', 'gz'),
    'unnamed.txt': (gzip.compress(PLAIN.encode()), 'is gzip data, not text'),
    'twice.txt.gz': (gzip.compress(gzip.compress(b'a')), 'gz'),
    'archive.txt': (b'PK\x03\x04\x14\x00\x00\x00\x08\x00' + bytes(range(200)), 'is a zip archive, not text'),
    'zeros.txt': (bytes(5000), 'is not text: it is full of NUL bytes'),
    'long.txt': ('a' * 3000, 'has a line of more than 2,000 bytes'),}
MARKS = {'utf-16-le': codecs.BOM_UTF16_LE, 'utf-16-be': codecs.BOM_UTF16_BE, 'utf-32-le': codecs.BOM_UTF32_LE,
         'utf-32-be': codecs.BOM_UTF32_BE}
for encoding, mark in MARKS.items():
  for shown, start in ((encoding[:6].upper(), mark), ((encoding[:6] + encoding[7:]).upper(), b'')):
    for kind, content in (('a.txt', PLAIN), ('b.jsonl', JSON), ('c.txt', CHINESE * 300), ('d.txt', 'One day.\n' * 999)):
      BAD[f'{shown}.{encoding}.{kind}'] = (start + content.encode(encoding),
                                           f'is text in {shown}: convert it to UTF-8 with `iconv -f {shown} -t UTF-8`.')


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('home')
  small_data.vocabulary_file(folder)
  return folder


@pytest.fixture(scope='module')
def model_dir(home) -> pathlib.Path:
  return small_model.without_parameters(home, vocabularies.load(f'cpm2:{home}/vocab.txt'))


@pytest.fixture
def use(home, model_dir, tmp_path, capsys):
  """use(tool, path) -> exit code, and what it printed to stdout and stderr."""

  def call(tool: str, path: pathlib.Path | str) -> tuple[int, str, str]:
    capsys.readouterr()
    flags = {
        'tokenize': [f'--vocabulary=cpm2:{home}/vocab.txt', f'--input={path}'],
        'vocabulary': [f'--input={path}', '--size=160', '--sentinels=5', f'--output={tmp_path}/made.txt'],
        'cache': ["--gin.TaskConfig.name='local'", f'--gin.TaskConfig.vocabulary=cpm2:{home}/vocab.txt',
                  f'--gin.LocalTaskConfig.files={path}', '--gin.LocalTaskConfig.validation_fraction=0',
                  f'--gin.TaskConfig.cache_dir={tmp_path}/cache'],
        'infer': [f'--model_dir={model_dir}', f'--input={path}', f'--output={tmp_path}/out.jsonl']}[tool]
    return main([tool, *flags]), *capsys.readouterr()

  return call


@pytest.mark.parametrize('name', GOOD)
def test_every_mode_reads_the_same_texts(use, home, tmp_path, name):
  path = tmp_path / name
  path.write_bytes(GOOD[name] if isinstance(GOOD[name], bytes) else GOOD[name].encode())
  (tmp_path / 'bracketsv.txt').write_text('Another text, which the name of the first would match as a glob.')
  code, out, err = use('tokenize', path)
  assert code == 0 and f'2 lines or documents, {sum(map(len, TEXTS))} characters' in out, err
  code, out, err = use('cache', path)
  assert code == 0, err
  described = cache.describe(pathlib.Path(out.strip()))
  assert described['splits']['train']['documents'] == 2
  assert use('cache', path)[:2] == (0, out)  # it is up to date
  assert list(texts.read([str(path)], 'text')) == TEXTS
  if path.suffix != '.gz':
    with infer.input_file(str(path)) as (file, shown):
      lines = list(lines_lib.read_lines(file, shown, 'text'))
    assert [line.text for line in lines if line.text] == TEXTS and not any(line.error for line in lines)


def test_a_return_within_an_object_is_a_space(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text":\r"a"\r}\r\n')
  assert list(texts.read([str(tmp_path / 'a.jsonl')], 'text')) == ['a']


@pytest.mark.parametrize('tool', TOOLS)
def test_every_mode_refuses_alike_in_a_line(use, tmp_path, monkeypatch, tool):
  monkeypatch.setattr(user_files, 'LONGEST', 2000)
  wrong = []
  for name, (content, complaint) in BAD.items():
    path = tmp_path / name
    if content is None:
      path.mkdir()
    else:
      path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = use(tool, path)
    if not (code == 2 and out == '' and err.startswith('error: ') and err.count('\n') == 1):
      wrong.append((name, code, out, err))
    elif complaint not in err or str(path) not in err:
      wrong.append((name, err, complaint))
  assert not wrong


@pytest.mark.parametrize('tool', TOOLS)
def test_paths_that_lead_to_no_text(use, tmp_path, monkeypatch, tool):
  (tmp_path / 'only_folders' / 'one').mkdir(parents=True)
  (tmp_path / 'a[v1]').mkdir()
  (tmp_path / 'a[v1]' / 'a.txt').write_text(PLAIN)
  (tmp_path / 'circle.txt').symlink_to(tmp_path / 'circle.txt')
  (tmp_path / 'nothing.txt').symlink_to(tmp_path / 'gone.txt')
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'marked.txt').write_text('\ufeff\n \n')
  (tmp_path / 'closed.txt').write_text(PLAIN)
  os.mkfifo(tmp_path / 'pipe.txt')
  is_glob = tool != 'infer'
  none = 'matches no file' if is_glob else 'does not exist'
  cases = {
      'gone.txt': none, 'gone/*.txt': none,
      'only_folders': "is a folder: for the files in it, write '" if is_glob else 'is a folder: expected a file',
      'circle.txt': 'cannot be read: Too many levels of symbolic links', 'x' * 300 + '.txt': '', 'x/' * 2500 + 'a.txt': '',
      'nothing.txt': f'is a link to {tmp_path}/gone.txt, which is not there', 'closed.txt': 'cannot be read: Permission denied'}
  if is_glob:
    cases |= {'only_folders/*': "matches only folders: for the files in them, write '", '?[a-z]rcle.t*': 'circle.txt (of ',
              'a[v1]/*.txt': "matches no file: in a glob, [v1] stands for one of the characters in it. For the brackets "
                             f"themselves write '{tmp_path}/a[[]v1]/*.txt'",
              'empty.txt': 'empty' if tool == 'cache' else 'there is no '}
    if tool != 'cache':
      cases['marked.txt'] = 'there is no '
  if tool not in ('tokenize', 'vocabulary'):  # which read a pipe
    cases['pipe.txt'] = 'is neither a file nor a folder'

  def refusing(path, *args, **kwargs):
    if str(path).endswith('closed.txt'):  # root may read any file, so that no mode of it would do
      raise PermissionError(13, 'Permission denied', str(path))
    return open(path, *args, **kwargs)

  monkeypatch.setattr(user_files, 'open', refusing, raising=False)
  for name, complaint in cases.items():
    code, out, err = use(tool, tmp_path / name)
    assert (code, out) == (2, '') and err.startswith('error: ') and err.count('\n') == 1 and len(err) < 1000, (name, err)
    assert complaint in err and name[:5] in err, (name, err)


def test_a_list_in_place_of_a_glob_is_told(tmp_path, capsys):
  (tmp_path / 'a.gin').write_text("LocalTaskConfig.files = ['a.txt', 'b.txt']")
  for flag in (f'--gin_file={tmp_path}/a.gin', "--gin.LocalTaskConfig.files=['a.txt', 'b.txt']",
               "--gin.LocalTaskConfig.validation_files=('a.txt', 'b.txt')"):
    assert main(['cache', flag]) == 2
    error = capsys.readouterr().err
    assert "'b.txt'" in error and 'list; expected one path, or a dict of name -> path.' in error and error.count('\n') == 1


def read_as_vocabulary(path) -> list[str]:
  return list(texts.read([str(path)], 'text'))


def read_as_task(path) -> list[str]:
  config, skipped = LocalTaskConfig(files=str(path)), collections.Counter()
  found = [document for part in text_files.ranges([str(path)], 'line')
           for document, in text_files.read(*part, config, ('text',), skipped)]
  if not found:
    raise ConfigError(f'{path} is empty')  # as `documents` and the cache say
  return found


def read_as_infer(path) -> list[str]:
  lines = list(lines_lib.read_lines(path, str(path), 'text'))
  wrong = [line.error for line in lines if line.error] or ['is empty'] * (not any(line.text for line in lines))
  if wrong:
    raise ConfigError(f'{path}: {wrong[0]}')
  return [line.text for line in lines if line.text]


def read_or_refuse(path, reader) -> list[str] | str:
  try:
    return reader(path)
  except (ConfigError, DataError) as error:
    assert str(path) in str(error) and '\n' not in str(error)
    return 'refused'


def test_any_bytes_are_texts_or_a_refusal(tmp_path):
  """Files in any encoding with a few bytes changed, left out or put in: all read the same, or all refuse."""
  seed = random.randrange(1 << 30)
  print(f'seed {seed}')
  rng, read, refused = random.Random(seed), 0, 0
  for number in range(400):
    suffix = rng.choice(('.txt', '.jsonl', '.txt.gz', '.jsonl.gz'))
    content = bytearray((rng.choice((PLAIN, CHINESE)) if 'txt' in suffix else JSON).encode(
        rng.choice(('utf-8', 'utf-8', 'utf-8-sig', 'gbk', 'utf-16', 'utf-32-le'))))
    if suffix.endswith('.gz'):
      content = bytearray(gzip.compress(content, 1))
    for _ in range(rng.randrange(3)):
      at = rng.randrange(len(content))
      content[at:at + rng.randrange(3)] = rng.choice((b'', b'\n', b'\0', b'\xff', b'[', rng.randbytes(2)))
    path = tmp_path / f'{number}{suffix}'
    path.write_bytes(content)
    readers = [read_as_vocabulary, read_as_task] + [read_as_infer] * (path.suffix != '.gz')  # which `infer` does not take
    answers = [read_or_refuse(path, reader) for reader in readers]
    assert all(answer == answers[0] for answer in answers), (number, bytes(content))
    read, refused = read + (answers[0] != 'refused'), refused + (answers[0] == 'refused')
  assert read > 10 and refused > 10  # about 90 and 310
