"""Tensors read and written slice by slice."""

import dataclasses
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import small_model
import test_tuning
from etils import epath

from t5x_cpm import inference, trees, vocabularies
from t5x_cpm.checkpoints import arrays, run_directory, tensors
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import ConfigError
from t5x_cpm.models import encoder_decoder


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tensors')
  moe = dataclasses.replace(test_tuning.EXPERTS, encoder_every=1)
  return small_model.model_dir(folder, vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}'), moe=moe)


def copied(source, target, stop=None, reader=None):
  """Copies a model slice by slice; stops after some slices. Returns how many were copied."""
  run = run_directory.read_run(source)
  reader = reader or tensors.CheckpointReader(source)
  leaves = jax.tree.leaves(encoder_decoder.build(run.config.model).leaves())
  count = 0
  with tensors.TensorWriter(target, run.config, run.info, leaves) as writer:
    for leaf in leaves:
      for index in tensors.indices(leaf):
        if not writer.has(leaf.name, index):
          if count == stop:
            raise KeyboardInterrupt
          writer.write(leaf.name, index, reader.read(leaf.name, index))
          count += 1
  return count


def test_a_model_is_copied_slice_by_slice(source, tmp_path):
  total = copied(source, tmp_path / 'copy')
  assert not (tmp_path / 'copy.partial').exists()
  run = run_directory.read_run(tmp_path / 'copy')
  old, new = (trees.named(arrays.load_params(folder)) for folder in (source, tmp_path / 'copy'))
  assert run.step == 0 and old.keys() == new.keys() and total > len(old)
  for name, value in old.items():
    np.testing.assert_array_equal(value, new[name], err_msg=name)
  digests = [run_directory.read_meta(folder, step)['arrays'] for folder, step in ((source, 3), (tmp_path / 'copy', 0))]
  assert {name: text for name, text in digests[0].items() if name.startswith('params/')} == {
      name: text for name, text in digests[1].items() if name.startswith('params/')}
  # Chunks are what a save of a run makes of them: slices.
  leaves = encoder_decoder.build(run.config.model).leaves()
  with Manager(tmp_path / 'saved', run.config, info=run.info) as manager:
    manager.save(0, {'step': jnp.int32(0), 'params': trees.nested(old)},
                 axes={'step': (), 'params': jax.tree.map(lambda leaf: leaf.axes, leaves)})
  for name, value in old.items():
    chunks = [tensors._store(tmp_path / folder / 'checkpoints' / '0' / 'state', f'params/{name}').chunk_layout.read_chunk.shape
              for folder in ('saved', 'copy')]
    assert chunks[0] == chunks[1], (name, value.shape)


def test_what_was_stopped_goes_on(source, tmp_path):
  target = tmp_path / 'copy'
  with pytest.raises(KeyboardInterrupt):
    copied(source, target, stop=7)
  journal = target.with_name('copy.partial') / tensors.JOURNAL
  journal.write_text(journal.read_text() + '["encoder/lay')  # as a kill may leave it
  assert not target.exists()
  with pytest.raises(KeyboardInterrupt):
    copied(source, target, stop=2)
  rest = copied(source, target)
  assert rest == copied(source, tmp_path / 'whole') - 9 and not (target / tensors.JOURNAL).exists()
  for folder in (target, tmp_path / 'whole'):
    arrays.load_params(folder)  # compares the digests
  words = vocabularies.load_saved(source / 'vocabulary')
  words.save(target / 'vocabulary')
  texts = ['一', '丁']
  np.testing.assert_allclose(inference.load(target).score(texts, texts), inference.load(source).score(texts, texts), rtol=1e-6)

  with pytest.raises(ConfigError, match='exists already'):
    copied(source, target)
  with pytest.raises(KeyboardInterrupt):
    copied(source, tmp_path / 'other', stop=1)
  identity = tmp_path / 'other.partial' / tensors.JOURNAL
  identity.write_text(json.dumps('f00d') + '\n')
  with pytest.raises(ConfigError, match='was begun by another command'):
    copied(source, tmp_path / 'other')


class Changed:
  """A reader one of whose tensors is another."""

  def __init__(self, reader, change):
    self.reader, self.change = reader, change

  def read(self, name, index=()):
    value = self.reader.read(name, index)
    return self.change(value) if name == 'lm_head' else value


@pytest.mark.parametrize('change, message', [
    (lambda x: x[:-1], 'lm_head[] is [15, '), (lambda x: x * np.nan, 'lm_head[] would have numbers that are not finite')])
def test_what_does_not_fit_is_refused(source, tmp_path, change, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    copied(source, tmp_path / 'copy', reader=Changed(tensors.CheckpointReader(source), change))
  assert not (tmp_path / 'copy').exists()


def test_a_changed_checkpoint_is_told(source):
  store = tensors._store(source / 'checkpoints' / '3' / 'state', 'params/lm_head')
  before = np.asarray(store.read().result())
  changed = before.copy()
  changed.view(np.uint32)[0, 0] ^= 1
  store.write(changed).result()
  try:
    with pytest.raises(ConfigError, match='lm_head in state is not what was saved'):
      tensors.CheckpointReader(source).read('lm_head')
  finally:
    store.write(before).result()
  np.testing.assert_array_equal(tensors.CheckpointReader(source).read('lm_head'), before)


def test_a_disk_that_is_too_small_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=2**30))
  tensors.check_room(epath.Path(tmp_path / 'a' / 'b'), 2**30 - 1, 'the new model')
  with pytest.raises(ConfigError, match='b: the new model takes about 2.0 GiB, and 1.0 are free there'):
    tensors.check_room(epath.Path(tmp_path / 'a' / 'b'), 2**31, 'the new model')
