"""Bundles: what is in their files, how they are made and read, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import small_data
import small_model

from t5x_cpm import files, inference, stored, vocabularies
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.cli import configure, modes, parse
from t5x_cpm.config import ConfigError, MoEConfig, OffloadConfig
from t5x_cpm.infmoe import about, bundle, formats, write
from t5x_cpm.models import encoder_decoder

MOE = MoEConfig(num_experts=4, group_size=8, router='top_2', decoder_router='switch', shared_experts=1)


def configured(model_dir, **fields):
  """The configuration of a run, with an OffloadConfig."""
  return dataclasses.replace(run_directory.read_run(model_dir).config, offload=OffloadConfig(**fields))


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bundles')
  return small_model.model_dir(folder, vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}'), moe=MOE)


@pytest.fixture(scope='module')
def made(model_dir):
  """A bundle in 'float32'."""
  write.write(configured(model_dir, format='float32'), model_dir, model_dir.parent / 'bundle')
  return model_dir.parent / 'bundle'


@pytest.fixture
def copy(made, tmp_path):
  """A bundle that may be damaged."""
  return pathlib.Path(shutil.copytree(made, tmp_path / 'copy'))


def opened(path):
  return bundle.Bundle(path, encoder_decoder.build(about.read_run(path).config.model))


@pytest.mark.parametrize('group', [0, 64, 128])
@pytest.mark.parametrize('name', list(formats.FORMATS))
def test_a_matrix_is_stored_within_the_error_of_its_format(name, group):
  """Relative errors of normal numbers, at most 10 % from those that others have measured for a matrix of this size."""
  errors = {'float32': 0, 'bfloat16': 0.0017, 'int8': 0.0087, 'int4': {0: 0.158, 64: 0.108, 128: 0.117}[group]}
  rng = np.random.default_rng(0)
  matrix, x = rng.normal(size=(4096, 64)).astype(np.float32), rng.normal(size=(5, 4096)).astype(np.float32)
  form = formats.FORMATS[name]
  parts = form.encode(matrix, group)
  assert {part: (value.shape, value.dtype) for part, value in parts.items()} == {
      part: tuple(kind) for part, kind in form.kinds(4096, 64, group).items()}
  decoded = form.decode(parts)
  error = np.sqrt(np.mean((decoded - matrix)**2))
  assert error == pytest.approx(errors[name], rel=0.1)
  got = form.product(jnp.asarray(x), jax.tree.map(jnp.asarray, parts))
  np.testing.assert_allclose(got, x @ decoded, rtol=1e-4, atol=2e-3)
  stored_bits = 8 * sum(value.nbytes for value in parts.values()) / matrix.size
  assert formats.bits_per_weight(name, 4096, 64, group) == stored_bits


def test_columns_of_zeros_and_sizes_that_do_not_divide():
  matrix = np.zeros((6, 3), np.float32)
  matrix[:, 1] = [7, -7, 1, 0, 3, -2]
  for name in ('int8', 'int4'):
    form = formats.FORMATS[name]
    np.testing.assert_allclose(form.decode(form.encode(matrix, 0)), matrix, atol=0.03)
  with pytest.raises(ConfigError, match='groups of 64 inputs, and one has 6'):
    formats.FORMATS['int4'].kinds(6, 3, 64)


def test_the_library_reads_the_files_and_experts_begin_with_pages(model_dir, made):
  params = arrays.load_params(model_dir)
  found = {}
  for file in made.glob('*.safetensors'):
    found |= {f'{file.stem}/{name}': value for name, value in safetensors.numpy.load_file(file).items()}
  layer = np.asarray(params['experts']['decoder']['wi_1'])
  assert (found['decoder-001/experts/3/wi_1/kernel'] == layer[1, 3]).all()
  assert (found['decoder-001/shared/wo'] == np.asarray(params['experts']['decoder_shared']['wo'])[1]).all()
  assert (found['rest/token_embedder/embedding'] == np.asarray(params['token_embedder']['embedding'])).all()
  stored_count = sum(value.size for name, value in found.items() if '/padding/' not in name)
  assert stored_count == sum(leaf.size for leaf in jax.tree.leaves(params))
  one = opened(made)
  for entries in one.entries.values():
    assert all(entry.begin % bundle.ALIGNED == 0 for entry in entries.values() if entry.leaf)
  for place in one.places:
    assert [one.begin(place, expert) % bundle.PAGE for expert in range(4)] == [0] * 4


def test_a_bundle_says_of_which_run_it_is(model_dir, made, capsys):
  run, there = about.read_run(made), run_directory.read_run(model_dir)
  assert (run.step, run.steps, run.config.model) == (3, [3], there.config.model)
  with pytest.raises(ConfigError, match='a bundle of step 3, and has no step 5'):
    about.read_run(made, 5)
  write.verify(made)
  assert f'{made} is intact: 4 files' in capsys.readouterr().out


def flip(file, at):
  content = bytearray(file.read_bytes())
  content[at] ^= 16
  file.write_bytes(content)


@pytest.mark.parametrize('name', ['experts/2/wo/kernel', 'block/attention/query'])
def test_a_flipped_bit_is_found_where_it_is_read(copy, name):
  place = bundle.Place('decoder', 0)
  flip(copy / place.file, opened(copy).entries[place.file][name].begin + 5)
  for read in (lambda: write.verify(copy), lambda: list(inference.load(copy).program.run.store.take(place, range(4)))):
    with pytest.raises(ConfigError, match=f'decoder-000.safetensors is damaged .the tensor {name} is not what was written'):
      read()


def test_what_is_damaged_is_named_when_a_bundle_is_opened(copy):
  file, told = copy / 'encoder-000.safetensors', (copy / 'bundle.json').read_bytes()

  def check(words):
    with pytest.raises(ConfigError, match=words):
      opened(copy)

  flip(file, 100)
  check('encoder-000.safetensors is damaged .its header')
  flip(file, 100)
  content = file.read_bytes()
  file.write_bytes(content[:-1])
  check('it has [0-9,]+ bytes, and had')
  file.unlink()
  check('encoder-000.safetensors is damaged .No such file')
  file.write_bytes(content)
  flip(copy / 'bundle.json', 200)
  check('bundle.json is damaged')
  value = json.loads(told)
  del value['digest']
  stored.write(copy / 'bundle.json', value | {'version': 2, 'code_version': '9.9'})
  check('has version 2, written by t5x_cpm 9.9')
  stored.write(copy / 'bundle.json', value | {'files': {}})
  check('lists other files')
  (copy / 'bundle.json').unlink()
  with pytest.raises(ConfigError, match='No checkpoint in .*copy'):
    inference.load(copy)


def run_mode(*arguments):
  modes.run(parse.parse(arguments, modes.MODES))


def test_what_cannot_be_bundled_is_told(model_dir, made, tmp_path):
  with pytest.raises(ConfigError, match='exists already'):
    write.write(configured(model_dir), model_dir, made)
  vocabulary = vocabularies.load_saved(pathlib.Path(str(model_dir)) / 'vocabulary')
  dense = small_model.model_dir(tmp_path, vocabulary)
  with pytest.raises(ConfigError, match='has no experts, which a bundle is for: `infer` runs a dense model'):
    write.write(configured(dense), dense, tmp_path / 'new')
  with pytest.raises(ConfigError, match='in groups of 64 inputs, and one has 16'):
    write.write(configured(model_dir, format='int4'), model_dir, tmp_path / 'new')
  with pytest.raises(ConfigError, match='it is a bundle, which `infer` and `eval` read'):
    write.write(configured(model_dir), made, tmp_path / 'new')
  for flags, words in (((), 'needs --output=DIR'), (('--verify', '--output=x'), 'leave --output out'),
                       (('--output=x', '--gin.OffloadConfig.format=int5'), "'int8'")):
    with pytest.raises(ConfigError, match=words):
      run_mode('bundle', f'--model_dir={model_dir}', *flags)
  with pytest.raises(ConfigError, match='it is a bundle'):
    configure.origin(str(made), '')
  assert not (tmp_path / 'new').exists() and not (tmp_path / 'new.partial').exists()


def test_making_one_goes_on_where_it_was_killed(model_dir, made, tmp_path, monkeypatch):
  config, replacing, begun = configured(model_dir, format='float32'), files.replacing, []

  def killed(path):
    begun.extend([path.name] if path.suffix == '.safetensors' else [])
    if len(begun) == 3:
      raise KeyboardInterrupt
    return replacing(path)

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(files, 'replacing', killed)
    write.write(config, model_dir, tmp_path / 'new')
  partial = tmp_path / 'new.partial'
  assert not (tmp_path / 'new').exists() and len(list(partial.glob('*.safetensors'))) == 2
  with open(partial / write.JOURNAL, 'a') as journal:
    journal.write('["decoder-000.safete')  # cut short
  with pytest.raises(ConfigError, match='was begun by another command'):
    write.write(configured(model_dir, format='int8'), model_dir, tmp_path / 'new')
  with files.lock(partial / '.lock', wait=False), pytest.raises(ConfigError, match='is in use: process'):
    write.write(config, model_dir, tmp_path / 'new')
  first = (partial / begun[0]).stat().st_mtime_ns
  write.write(config, model_dir, tmp_path / 'new')
  assert not partial.exists() and (tmp_path / 'new' / begun[0]).stat().st_mtime_ns == first
  for file in made.iterdir():
    if file.is_file():
      assert (tmp_path / 'new' / file.name).read_bytes() == file.read_bytes(), file
  assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == sorted(path.name for path in made.iterdir())


def test_a_disk_too_small_is_told_first(model_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, 1000))
  with pytest.raises(ConfigError, match='the bundle takes about .* GiB, and 0.0 are free'):
    write.write(configured(model_dir), model_dir, tmp_path / 'new')
  assert not list((tmp_path / 'new.partial').glob('*.safetensors'))
