"""`convert hf`: which files it takes, which it refuses in a line, and what it says."""

import gzip
import itertools
import json
import pathlib
import pickle
import random
import re

import numpy as np
import pytest
import sentencepiece
import small_tensors
from small_tensors import to_params

from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import arrays, huggingface
from t5x_cpm.config import ConfigError, ModelConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = 'shared.weight'


@pytest.fixture(scope='module')
def spiece(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('spiece')
  sentencepiece.SentencePieceTrainer.train(
      input=str(ROOT / 'tasks/corpus/en.txt'), model_prefix=str(path / 'spiece'), vocab_size=300, pad_id=0, eos_id=1, unk_id=2,
      bos_id=-1, minloglevel=2)
  return path / 'spiece.model'


@pytest.fixture(scope='module')
def model():
  return ModelConfig(vocab_size=512, d_model=8, d_ff=12, num_heads=2, head_dim=4, num_buckets=8, max_distance=16)


@pytest.fixture(scope='module')
def tensors(model):
  return small_tensors.from_params(model, small_tensors.random_params(model))


@pytest.fixture
def folder(tmp_path, model):
  (tmp_path / 'hf').mkdir()
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(huggingface.write_config(model)))
  return tmp_path / 'hf'


def convert_in(folder: pathlib.Path, *flags: str) -> int:
  return main(['convert', 'hf', str(folder), str(folder.parent / 'run'), *flags])


def test_the_vocabulary_beside_the_weights_is_taken_and_it_says_what_it_wrote(folder, tensors, spiece, capsys):
  small_tensors.write(folder, tensors)
  assert convert_in(folder) == 2
  assert f'{folder} has no spiece.model and no vocabulary/: give --vocabulary=KIND:FILE' in capsys.readouterr().err
  (folder / 'spiece.model').write_bytes(spiece.read_bytes())
  assert convert_in(folder) == 0
  out = capsys.readouterr().out
  number = sum(value.size for value in tensors.values())
  assert out.count('\n') == 1 and f'step 0 with {number:,} parameters' in out and f'sentencepiece:{folder}/spiece.model' in out
  assert (folder.parent / 'run' / 'vocabulary' / 'spiece.model').read_bytes() == spiece.read_bytes()
  assert main(['convert', 'to_hf', str(folder.parent / 'run'), str(folder.parent / 'back')]) == 0
  out = capsys.readouterr().out
  assert f'{number:,} parameters of step 0, in README.md, config.json, model.safetensors, spiece.model' in out


@pytest.mark.parametrize('names', [
    huggingface.TABLES, huggingface.TABLES[:1], huggingface.TABLES[1:2], huggingface.TABLES[2:], huggingface.TABLES[1:]])
def test_the_embedding_table_is_found_under_any_of_its_names(model, tensors, names):
  others = {name: value for name, value in tensors.items() if name != TABLE}
  given = others | dict.fromkeys(names, tensors[TABLE])
  np.testing.assert_array_equal(to_params(model, given)[1]['token_embedder']['embedding'], tensors[TABLE])
  if len(names) > 1:
    with pytest.raises(ConfigError, match=f'{names[0]} and {names[-1]} differ'):
      to_params(model, given | {names[-1]: tensors[TABLE] + 1})
  with pytest.raises(ConfigError, match=r'shared\.weight: missing'):  # a head alone may be another table
    to_params(model, others | {'lm_head.weight': tensors[TABLE]})


class Program:
  """What a pickle may hold instead of tensors."""

  def __reduce__(self):
    return print, ('this program ran',)


def test_files_that_are_something_else_are_refused_in_a_line(folder, tensors, spiece, capsys):
  small_tensors.write(folder, tensors)
  (folder / 'spiece.model').write_bytes(spiece.read_bytes())
  described = (folder / 'config.json').read_text()
  for file in ('config.json', 'model.safetensors', 'spiece.model'):
    path = folder / file
    good = path.read_bytes()
    kinds: list = [b'', gzip.compress(good), good[:len(good) // 2], b'[1]', 'folder', folder / 'gone', path]
    if file == 'config.json':
      kinds += [described.encode(codec) for codec in ('utf-16', 'utf-32-be')] + [
          described.replace('t5', '今天').encode('gbk'), b'[' * 100_000, b'{"d_model": ' + b'9' * 5000 + b'}', b'null']
    for kind in kinds:
      path.unlink()
      if kind == 'folder':
        path.mkdir()
      elif isinstance(kind, bytes):
        path.write_bytes(kind)
      else:
        path.symlink_to(kind)
      assert convert_in(folder) == 2, (file, kind)
      error = capsys.readouterr().err
      assert error.startswith('error: ') and error.count('\n') == 1 and str(path) in error, (file, kind, error)
      path.rmdir() if kind == 'folder' else path.unlink()
      path.write_bytes(good)
  (folder / 'config.json').write_text('\ufeff' + described)
  assert convert_in(folder) == 0
  capsys.readouterr()
  (folder / 'circle').symlink_to(folder / 'circle')
  for output in ('config.json', 'config.json/x', 'circle', 'x' * 300):
    assert main(['convert', 'to_hf', str(folder.parent / 'run'), str(folder / output)]) == 2
    error = capsys.readouterr().err
    assert re.match(f'error: (DIR=)?{folder}/{output[:9]}.* (cannot be|exists)', error) and error.count('\n') == 1, error


def test_any_value_in_config_json_is_taken_or_refused_in_a_line(model):
  good = huggingface.write_config(model)
  names = [*good, 'num_experts', 'num_sparse_encoder_layers', 'router_bias', 'router_jitter_noise', 'scale_decoder_outputs']
  values = (None, True, -1, 0, 1.5, 'x', '512', [], [1], {}, 10**30, float('inf'), float('nan'))
  refused = 0
  for base in (good, good | {'model_type': huggingface.SWITCH, 'dense_act_fn': 'relu', 'num_experts': 2}):
    for name, value in itertools.product(names, values):
      try:
        huggingface.read_config(base | {name: value}).validate()
      except ConfigError as error:
        assert '\n' not in str(error)
        refused += 1
  assert refused > 200


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_pickles_are_refused_in_a_line(folder, tensors, spiece, capsys):
  torch = pytest.importorskip('torch')
  (folder / 'spiece.model').write_bytes(spiece.read_bytes())
  path, seed = folder / 'pytorch_model.bin', random.randrange(1 << 30)
  print(f'seed {seed}')
  rng = random.Random(seed)
  bad = [pickle.dumps(Program()), pickle.dumps({'a': Program()}), pickle.dumps({'a': 1}), pickle.dumps([1]), b'', b'x' * 100]
  for value in (Program(), {'a': Program()}, {'a': 1}, [torch.zeros(3)], torch.zeros(3)):
    for new_form in (True, False):
      torch.save(value, path, _use_new_zipfile_serialization=new_form)
      bad.append(path.read_bytes())
  small = {name: torch.zeros(3) for name in ('a', 'b')}
  for new_form in (True, False):
    torch.save(small, path, _use_new_zipfile_serialization=new_form)
    assert set(small_tensors.read(folder)) == {'a', 'b'}
    good = path.read_bytes()
    bad += [good[:rng.randrange(len(good))] for _ in range(20)]
    for _ in range(60):  # which may still be tensors, of other names and values
      at = rng.randrange(len(good))
      bad.append(good[:at] + rng.randbytes(rng.choice((1, 8))) + good[at + 1:])
  refused = 0
  for data in bad:
    path.write_bytes(data)
    code, (out, error) = convert_in(folder), capsys.readouterr()
    assert code == 2 and 'this program ran' not in out, data
    assert error.startswith('error: ') and 'Traceback' not in error
    if 'holds more than tensors' in error:
      refused += 1
      assert error.count('\n') == 1
  assert refused > 40
  torch.save({name: torch.from_numpy(value.copy()) for name, value in tensors.items()}, path)
  assert convert_in(folder) == 0
  np.testing.assert_array_equal(arrays.load_params(folder.parent / 'run')['token_embedder']['embedding'], tensors[TABLE])


def test_damaged_safetensors_are_refused_in_a_line(folder, tensors, spiece, capsys):
  (folder / 'spiece.model').write_bytes(spiece.read_bytes())
  small_tensors.write(folder, tensors)
  path, seed = folder / 'model.safetensors', random.randrange(1 << 30)
  print(f'seed {seed}')
  rng, good, refused = random.Random(seed), path.read_bytes(), 0
  header = int.from_bytes(good[:8], 'little')
  for number in range(300):
    data = bytearray(good)
    if number % 3:
      data[rng.randrange(8 + header)] ^= 1 << rng.randrange(8)  # in the values it could not be noticed
    else:
      del data[rng.randrange(len(data)):]
    path.write_bytes(data)
    try:
      small_tensors.read(folder)  # a changed name or space is still a file; whether it fits is seen later
    except ConfigError:
      refused += 1
  assert refused > 120
  path.write_bytes(good[:-1])
  assert convert_in(folder) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {path} is damaged') and error.count('\n') == 1
