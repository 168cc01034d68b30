"""`infer`: files in order, blanks, kill and restart, bad input, the prompt; and the engine behind it."""

import copy
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_data
import small_model

from t5x_cpm import files, inference, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import ConfigError
from t5x_cpm.inference import infer, prompt, text

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINES = ['一<span>丁', 'abc', '', '丂七<span>丄丅<span>', 'x<span>', '  ', 'the last']


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp('infer')


@pytest.fixture(scope='module')
def vocabulary(folder):
  return vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')


@pytest.fixture(scope='module')
def model_dir(folder, vocabulary) -> pathlib.Path:
  return small_model.model_dir(folder, vocabulary)


@pytest.fixture(scope='module')
def engine(model_dir):
  return inference.load(model_dir)


@pytest.fixture
def run(model_dir, engine, tmp_path, monkeypatch):
  """run(content, suffix, output, **InferConfig fields) -> records (of .txt, lines); the output file is in tmp_path."""
  monkeypatch.setattr(inference, 'load', lambda *args, config, **kwargs: with_config(engine, config))

  def call(content: bytes | str, suffix: str = '.txt', output: str = 'out.jsonl', **fields) -> list:
    path = tmp_path / f'in{suffix}'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    infer.run(config_of(model_dir, **fields), str(model_dir), str(path), str(tmp_path / output))
    lines = (tmp_path / output).read_text(encoding='utf-8').split('\n')
    assert lines.pop() == ''
    return lines if output.endswith('.txt') else [json.loads(line) for line in lines]

  return call


def config_of(model_dir, decode=None, **fields):
  config = run_directory.read_run(model_dir).config
  return dataclasses.replace(config, infer=dataclasses.replace(config.infer, **fields),
                             decode=dataclasses.replace(config.decode, **(decode or {})))


def with_config(engine, config):
  other = copy.copy(engine)
  other.config, other.codec = config, text.Codec(engine.vocabulary, config)
  return other


# Text in and out.


def test_inputs_and_answers_have_the_form_of_training(vocabulary, model_dir):
  codec = text.Codec(vocabulary, config_of(model_dir))
  s, eos, one = vocabulary.sentinels, vocabulary.eos_id, vocabulary.encode('一')
  request = codec.request('一<span>一<span>一')
  assert request.ids == [*one, s[0], *one, s[1], *one, s[2]]  # inputs of training end with a masked span
  assert (request.blanks, request.stop) == (2, (eos, s[2]))
  assert codec.request('一<span>').ids == codec.request('一').ids == [*one, s[0]]
  assert codec.targets(request, ['一', '']) == [s[0], *one, s[1], s[2]]
  a, b = vocabulary.encode('丁'), vocabulary.encode('七')
  assert codec.output(request, [s[0], *a, s[1], *b, *b, s[2], *a]) == ('一丁一七七一', ['丁', '七七'])
  assert codec.output(request, [*a, s[1], eos, *b]) == ('一丁一一', ['丁', ''])
  assert codec.output(request, [s[1], *b, s[0], *a]) == ('一丁一七一', ['丁', '七'])
  assert codec.output(codec.request('一'), [s[0], *a, eos]) == ('丁', ['丁'])
  forbidden = codec.forbidden(request)
  assert vocabulary.pad_id in forbidden and set(s[3:]) <= set(forbidden) and not {eos, *s[:3]} & set(forbidden)
  with pytest.raises(ConfigError, match='2 blanks'):
    codec.targets(request, 'one text')
  with pytest.raises(ConfigError, match='200 blanks'):
    codec.request('<span>' * 200)


def test_text_around_blanks_is_kept():
  assert text.fill('a <span> b<span>c', [' x ', 'y']) == 'a x byc'
  assert text.fill('<span>', ['']) == ''


def test_answers_of_pairs_are_texts(vocabulary, tmp_path):
  folder = small_model.model_dir(tmp_path, vocabulary, objective='pairs')
  codec = text.Codec(vocabulary, config_of(folder))
  request = codec.request('一丁')
  assert request.ids == [*vocabulary.encode('一丁'), vocabulary.eos_id] and request.blanks == 0
  assert codec.output(request, [*vocabulary.encode('七'), vocabulary.eos_id, 30]) == ('七', [])
  assert codec.targets(request, '七') == [*vocabulary.encode('七'), vocabulary.eos_id]
  assert codec.targets(request, '<s_0>') == [*vocabulary.encode('<s_0>'), vocabulary.eos_id]  # a text like any other
  answers = inference.load(folder).generate(['一丁'])
  assert len(answers) == 1


def test_truncation_keeps_what_was_asked(vocabulary, model_dir):
  codec = text.Codec(vocabulary, config_of(model_dir, input_length=10, truncate=True))
  request = codec.request('一' * 30)
  assert len(request.ids) == 10 and request.ids[-1] == vocabulary.sentinels[0]
  with pytest.raises(ConfigError, match='lose 1 of its 1 blanks'):
    codec.request('一' * 30 + '<span>' + '一' * 30)


# The engine.


def test_answers_do_not_depend_on_the_batch(engine):
  texts = [line for line in LINES * 2 if line.strip()][:8]
  order = [6, 3, 0, 1]
  for config in (engine.decode_config(), engine.decode_config(rule='sample', seed=3)):
    together = engine.answers(texts, config)
    other = engine.answer_requests([engine.codec.request(texts[i]) for i in order], config, rows=order)
    assert [answer.ids for answer in other] == [together[i].ids for i in order]
    np.testing.assert_allclose([a.score for a in other], [together[i].score for i in order], atol=1e-4)
    assert len({tuple(answer.ids) for answer in together}) > 2
    never = {engine.vocabulary.pad_id, engine.vocabulary.bos_id, engine.vocabulary.unk_id, *range(engine.vocabulary.size, 2000)}
    assert not never & {token for answer in together for token in answer.ids}


def test_overrides_are_checked(engine):
  with pytest.raises(ConfigError, match='no field of DecodeConfig'):
    engine.generate('a', beam=3)
  with pytest.raises(ConfigError, match='temperature'):
    engine.generate('a', temperature=0.0)


def test_streamed_pieces_are_the_answer(engine):
  assert ''.join(engine.stream('abc')) == engine.generate('abc')[0]
  for rule, line in (('greedy', 'abc'), ('greedy', '一<span>丁<span>'), ('beam', 'abc')):
    pieces, stream = [], engine.stream(line, rule=rule)
    try:
      while True:
        pieces.append(next(stream))
    except StopIteration as end:
      answer = end.value
    assert answer.ids == engine.answers([line], engine.decode_config(rule=rule))[0].ids
    shown = engine.codec.before_stop(engine.codec.request(line), answer.ids)
    if '<span>' not in line:
      shown = [token for token in shown if token != engine.vocabulary.sentinels[0]]
    assert ''.join(pieces) == engine.vocabulary.decode(shown)


def test_encode_gives_one_vector_for_each_token(engine):
  texts = ['一丁七', 'a', '一' * 50, '丁', '七']
  hidden = engine.encode(texts)
  assert [h.shape for h in hidden] == [(n, 16) for n in (3, 1, 50, 1, 1)]
  np.testing.assert_allclose(engine.encode(['a'])[0], hidden[1], atol=1e-5)


# Files.


def test_records_in_order_with_empty_lines(run, engine):
  records = run('\n'.join(LINES) + '\n')
  assert [record['input'] for record in records] == [line if line.strip() else '' for line in LINES]
  for line, record in zip(LINES, records):
    if line.strip():
      answer, = engine.answers([line], engine.decode_config())
      assert (record['output'], record['blanks']) == (answer.output, answer.blanks)
      assert record['score'] == pytest.approx(answer.score, abs=1e-4)
    else:
      assert record == {'input': '', 'output': '', 'blanks': [], 'score': None, 'note': 'empty line'}
  assert len(records[3]['blanks']) == 2 and records[3]['output'].startswith('丂七' + records[3]['blanks'][0] + '丄丅')


def test_jsonl_input_and_byte_order_mark(run):
  records = run('\ufeff{"q": "一<span>丁", "id": 7}\r\n{"q": "a\\nb"}', '.jsonl', text_field='q')
  assert [record['input'] for record in records] == ['一<span>丁', 'a\nb']


def test_other_fields_of_a_line_are_passed_through(run, tmp_path):
  given = [{'id': 7, 'text': '一<span>丁', 'tags': ['a', {'b': None}], 'score': 'theirs', 'half': '\ud83d'},
           {'text': ' ', 'id': '空'}, {'id': 9, 'words': 'no text'}]
  records = run('\n'.join(json.dumps(line) for line in given), '.jsonl', skip_malformed=True)
  first, empty, refused = records
  assert (first['id'], first['tags'], first['half']) == (7, ['a', {'b': None}], '\ud83d')
  assert isinstance(first['score'], float) and first['input'] == '一<span>丁' and 'text' not in first  # our names win
  assert (empty['id'], empty['note'], empty['output']) == ('空', 'empty line', '')
  assert (refused['id'], refused['words']) == (9, 'no text') and "no field 'text'" in refused['note']
  assert '"空"' in (tmp_path / 'out.jsonl').read_text()  # readable where UTF-8 can write it


def test_plain_text_has_an_answer_a_line(run, engine, tmp_path, monkeypatch):
  outputs = [record['output'] for record in run('\n'.join(LINES))]
  assert run('\n'.join(LINES), output='out.txt') == outputs
  assert json.loads((tmp_path / 'out.txt.run.json').read_text())['form'] == 'text'
  whole = (tmp_path / 'out.txt').read_bytes()
  (tmp_path / 'out.txt').write_bytes(whole[:-3])
  assert run('\n'.join(LINES), output='out.txt') == outputs  # goes on like any output
  answer = engine.answers(['abc'], engine.decode_config())[0]
  monkeypatch.setattr(type(engine), 'answer_requests',
                      lambda *args: [dataclasses.replace(answer, output='a\r\nb\u2028c\\')])
  assert run('abc', output='other.txt') == ['a\\r\\nb\u2028c\\']


@pytest.mark.parametrize(('given', 'content'), [
    ('-', '一<span>丁\nabc'), ('-.jsonl', '{"text": "一<span>丁"}\n{"text": "abc"}\n')])
def test_standard_input_is_read_as_a_file(run, model_dir, tmp_path, monkeypatch, given, content):
  wanted = run('一<span>丁\nabc')

  def from_stdin(content: str, output: str) -> None:
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content.encode())))
    infer.run(config_of(model_dir), str(model_dir), given, str(tmp_path / output))

  from_stdin(content, 'piped.jsonl')
  assert [json.loads(line) for line in (tmp_path / 'piped.jsonl').read_text().splitlines()] == wanted
  with pytest.raises(ConfigError, match=r'^standard input:3: '):
    from_stdin(content.strip() + '\n' + ('{"words": 1}' if 'jsonl' in given else 'x' * 70), 'bad.jsonl')
  assert not (tmp_path / 'bad.jsonl').exists()
  with pytest.raises(ConfigError, match='made from something else'):
    from_stdin(content + 'more' if given == '-' else '{"text": "a"}', 'piped.jsonl')


@pytest.mark.parametrize(('content', 'suffix', 'message'), [
    (b'{"text": "a"}\n{"text": "b"\n', '.jsonl', r'in\.jsonl:2: malformed JSON \(.* at column 13\)'),
    (b'{"text": "a"}\n["a"]\n', '.jsonl', r'in\.jsonl:2: a JSON array, where a JSON object with .text. is expected'),
    (b'{"text": "a"}\n\n{"words": "a"}\n', '.jsonl', r'in\.jsonl:3: no field .text. among .*words.*InferConfig.text_field'),
    (b'{"text": "a"}\n{"text": "\\ud83d"}\n', '.jsonl', r'in\.jsonl:2: .text. holds half of a surrogate pair'),
    (b'{"text": "a"}\n{"text": "a", "id": ' + b'9' * 5000 + b'}\n', '.jsonl', r'in\.jsonl:2: .*number of too many digits'),
    (b'{"text": "a"}\n{"text": ' + b'[' * 100_000 + b'\n', '.jsonl', r'in\.jsonl:2: .*nested too deeply'),
    (b'abc\n\xff\xfe\n', '.txt', r'in\.txt:2: byte 1 of the line \(0xff\) is not valid UTF-8'),
    ('ok\n' + '一' * 61, '.txt', r'in\.txt:2: the input has 62 tokens and InferConfig.input_length = 60'),
])
def test_bad_lines_are_named_or_left_unanswered(run, tmp_path, content, suffix, message):
  with pytest.raises(ConfigError, match=message):
    run(content, suffix)
  assert not (tmp_path / 'out.jsonl').exists()
  records = run(content, suffix, skip_malformed=True)
  bad = [record for record in records if record.get('note') not in (None, 'empty line')]
  assert len(bad) == 1 and bad[0]['output'] == '' and records[0]['score'] is not None


def test_a_text_that_is_far_too_long_is_refused_before_it_is_cut_into_words(run, vocabulary, monkeypatch):
  monkeypatch.setattr(type(vocabulary), 'encode', lambda self, text: 1 / 0)
  with pytest.raises(ConfigError, match=r'in\.txt:1: the input has 1,000,001 characters, and InferConfig.input_length = 60'):
    run('a' * 1_000_001, truncate=True)


def test_input_and_output_that_cannot_be(run, tmp_path, model_dir):
  with pytest.raises(ConfigError, match=r'ends in \.txt or \.jsonl, or - or -\.jsonl for standard input'):
    run('a', '.csv')
  with pytest.raises(ConfigError, match='does not exist'):
    infer.run(config_of(model_dir), str(model_dir), str(tmp_path / 'none.txt'), str(tmp_path / 'out.jsonl'))
  with pytest.raises(ConfigError, match='needs --input'):
    infer.run(config_of(model_dir), str(model_dir), '', str(tmp_path / 'out.jsonl'))
  (tmp_path / 'file').write_text('')
  (tmp_path / 'in.txt').write_text('a')
  with pytest.raises(ConfigError, match='No checkpoint'):
    infer.run(config_of(model_dir), str(tmp_path / 'nowhere'), str(tmp_path / 'in.txt'))
  with pytest.raises(ConfigError, match='cannot be written'):
    infer.run(config_of(model_dir), str(model_dir), str(tmp_path / 'in.txt'), str(tmp_path / 'file' / 'out.jsonl'))


def test_records_are_printed_without_an_output(model_dir, engine, tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(inference, 'load', lambda *args, config, **kwargs: with_config(engine, config))
  (tmp_path / 'in.txt').write_text('abc\n\nx<span>')
  infer.run(config_of(model_dir), str(model_dir), str(tmp_path / 'in.txt'))
  assert [json.loads(line)['input'] for line in capfd.readouterr().out.splitlines()] == ['abc', '', 'x<span>']


# Restart.


def test_a_cut_file_is_continued_and_another_is_refused(run, tmp_path, capsys):
  content = '\n'.join(f'line {i}' + '<span>' * (i % 2) for i in range(11))
  run(content)
  out = tmp_path / 'out.jsonl'
  whole = out.read_bytes()
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord('\n')]
  for cut in (0, 5, ends[0], ends[3], ends[5] + 9, ends[9], ends[10]):
    out.write_bytes(whole[:cut])
    run(content)
    assert out.read_bytes() == whole, cut
  for line, place in ((1, 3), (5, ends[3] + 20), (11, ends[9] + 5)):  # a changed bit
    out.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    run(content)
    assert out.read_bytes() == whole and f'out.jsonl: line {line} is not as it was written' in capsys.readouterr().err
  (tmp_path / 'out.jsonl.crc').unlink()  # as an earlier version left it
  out.write_bytes(whole[:ends[4]])
  for change in ({'content': content + '\nmore'}, {'truncate': True}, {'decode': {'rule': 'sample'}}):
    with pytest.raises(ConfigError, match='made from something else'):
      run(**{'content': content, **change})
  run(content, batch_size=2)  # speed only
  assert len(out.read_text().splitlines()) == 11
  note = tmp_path / 'out.jsonl.run.json'
  good = note.read_bytes()
  for damaged in (b'', good[:40], b'\xff' * 20, b'[' * 100_000, b'[]', b'{"step": 1e999}',
                  good.replace(b'"step": 3', b'"step": 2'), good.replace(b'"step": 3', b'"step": -3'),
                  good.replace(b'"digest', b'"digesu'), None):
    note.unlink()
    note.write_bytes(damaged) if damaged is not None else note.symlink_to(note.name)
    with pytest.raises(ConfigError, match=r'out\.jsonl\.run\.json beside it.* is damaged.*Remove both'):
      run(content)
  note.unlink()
  with pytest.raises(ConfigError, match='is not a regular file'):
    infer.continue_or_start(pathlib.Path('/dev/null'), {}, 1, 1)
  with pytest.raises(ConfigError, match='not from `infer`'):
    run(content)


def test_what_a_file_is_made_from_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(files, 'write_atomically', lambda path, data: written.append((path.name, json.loads(data or 'null'))))
  run('a')
  assert [name for name, _ in written] == ['out.jsonl.run.json', 'out.jsonl.crc'] and written[0][1]['step'] == 3


def command(model_dir, *flags):
  return [sys.executable, '-m', 't5x_cpm', 'infer', f'--model_dir={model_dir}', *flags]


def test_kill_and_restart(model_dir, engine, run, tmp_path):
  content = '\n'.join(f'第{i}行<span>' for i in range(240))
  (tmp_path / 'killed.txt').write_text(content)
  out = tmp_path / 'killed.jsonl'
  flags = [f'--input={tmp_path / "killed.txt"}', f'--output={out}']
  process = subprocess.Popen(command(model_dir, *flags), cwd=ROOT, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and not (out.exists() and out.read_bytes().count(b'\n') >= 8):
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait(30)
  answered = out.read_bytes().count(b'\n')
  assert 8 <= answered < 240
  done = subprocess.run(command(model_dir, *flags), cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert 'going on from there' in done.stderr
  assert [json.loads(line) for line in out.read_text().splitlines()] == run(content)


# Command line.


def test_an_answer_needs_no_tensorflow(model_dir, tmp_path):
  (tmp_path / 'in.txt').write_text('一<span>丁\n')
  code = ('import sys; from t5x_cpm.__main__ import main; code = main(sys.argv[1:]); '
          'heavy = {"tensorflow", "seqio", "torch"} & set(sys.modules); sys.exit(str(heavy) if heavy else code)')
  flags = command(model_dir, f'--input={tmp_path / "in.txt"}', f'--output={tmp_path / "out.jsonl"}')[3:]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(tmp_path)}
  del environment['XLA_FLAGS']  # as a user has it
  result = subprocess.run([sys.executable, '-c', code, *flags], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False)
  assert result.returncode == 0, result.stderr
  assert json.loads((tmp_path / 'out.jsonl').read_text())['input'] == '一<span>丁'


def test_import_is_light():
  code = 'import sys, t5x_cpm.inference; sys.exit(bool({"jax", "numpy", "tensorflow"} & set(sys.modules)))'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


def test_an_empty_line_at_the_prompt_is_answered_by_how_to_end(engine, capsys, monkeypatch):
  typed = iter(['', '   ', '\u3000', '\t'])

  def ask(prompt_text):
    try:
      return next(typed)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr('builtins.input', ask)
  monkeypatch.setattr(engine, 'stream', None)  # nothing is asked of the model
  prompt.interact(engine, io.BytesIO(), True)
  assert capsys.readouterr() == ('\n', 4 * f'{prompt.HOW_TO_END}\n')


def test_piped_prompt_answers_line_by_line(engine, capsys):
  lines = [b'\xe4\xb8\x80<span>a', b'', b'abc', b'\xff', b'x' * 70]
  prompt.interact(engine, io.BytesIO(b'\n'.join(lines)), False)
  out, err = capsys.readouterr()
  first, third = (engine.answers([line], engine.decode_config())[0].output for line in ('一<span>a', 'abc'))
  assert out == f'{first}\n\n{third}\n\n\n'  # one line out for each line in
  assert 'line 4: byte 1 of the line (0xff) is not valid UTF-8' in err and 'line 5: the input has 71 tokens' in err
