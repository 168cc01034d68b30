"""LoRA and prompts in the files of peft: its figures with its files, ours back in its hands, and what is refused."""

import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import test_delta_mode
import test_parity

from t5x_cpm import trees, tuning
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import Config, ConfigError, DeltaConfig, ModelConfig, MoEConfig
from t5x_cpm.tuning import average, peft

LAYER = 'base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_B.weight'
golden = test_parity.golden
golden_peft = test_parity.tool('golden_peft')


@pytest.fixture(scope='module')
def theirs():
  with np.load(golden_peft.GOLDEN / 'peft.npz') as file:
    print(file['versions'])
    return dict(file)


@pytest.fixture(scope='module')
def base_dir(golden, tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('peft') / 'base'
  with Manager(path, Config(model=golden.config), info={'vocabulary': 'f00d'}) as manager:
    manager.save(0, {'step': jnp.int32(0), 'params': golden.params})
  return path


def written(folder: pathlib.Path, theirs, name: str, **changes) -> pathlib.Path:
  """A folder as peft saved it, but for some fields of its configuration."""
  folder.mkdir()
  tensors = {key.removeprefix(f'{name}/tensor/'): x for key, x in theirs.items() if key.startswith(f'{name}/tensor/')}
  safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)
  (folder / peft.CONFIG).write_text(json.dumps(json.loads(str(theirs[f'{name}/config'])) | changes))
  return folder


def our_logits(golden, saved: tuning.Saved) -> np.ndarray:
  model = tuning.build_model(Config(model=golden.config, delta=saved.config))
  axes = {name: leaf.axes.index('slot') for name, leaf in trees.named(model.leaves()['delta']).items()}
  delta = trees.nested({name: jnp.expand_dims(value, axes[name]) for name, value in saved.tensors.items()})
  batch, count = dict(golden.batch), saved.config.prompts
  before = np.broadcast_to(golden.config.vocab_size + np.arange(count), (len(batch['encoder_input_tokens']), count))
  batch['encoder_input_tokens'] = np.concatenate([before, batch['encoder_input_tokens']], axis=1)
  batch['encoder_segment_ids'] = np.concatenate([np.ones_like(before), batch['encoder_segment_ids']], axis=1)
  return jax.jit(model.apply)(golden.params | {'delta': delta}, batch)[0]


@pytest.mark.parametrize('name', ['rslora', 'prompt', pytest.param('lora', marks=pytest.mark.slow)])
def test_files_of_peft_give_its_logits_and_come_back_as_they_were(golden, theirs, base_dir, tmp_path, name):
  folder = written(tmp_path / 'theirs', theirs, name)
  assert main(['delta', 'from_peft', f'--peft={folder}', f'--base={base_dir}', f'--output={tmp_path / "ours"}']) == 0
  saved = tuning.read(tmp_path / 'ours')
  valid, want = np.asarray(golden.weights > 0), theirs[f'{name}/logits']
  assert np.abs(want - golden.file['logits'])[valid].max() > 1
  test_parity.assert_equal('logits', np.asarray(our_logits(golden, saved))[valid], want[valid])

  assert main(['delta', 'to_peft', f'--delta={tmp_path / "ours"}', f'--output={tmp_path / "back"}']) == 0
  before, after = (safetensors.numpy.load_file(path / peft.WEIGHTS) for path in (folder, tmp_path / 'back'))
  if name == 'prompt':
    before = {key: value[:4] for key, value in before.items()}  # the rest is of the decoder, and never read
  assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
  old, new = (json.loads((path / peft.CONFIG).read_text()) for path in (folder, tmp_path / 'back'))
  assert set(new) <= set(old)
  for key in ('peft_type', 'task_type', 'r', 'lora_alpha', 'use_rslora', 'num_virtual_tokens', 'token_dim'):
    assert new.get(key) == old.get(key)
  assert sorted(new.get('target_modules', ())) == sorted(old.get('target_modules', ()))


@pytest.mark.parametrize('name, changes, message', [
    ('lora', {'use_dora': True}, 'use_dora = True'), ('lora', {'lora_bias': True}, 'lora_bias = True'),
    ('lora', {'bias': 'all'}, "bias = 'all'"), ('lora', {'modules_to_save': ['lm_head']}, "modules_to_save = ['lm_head']"),
    ('lora', {'rank_pattern': {'q': 4}}, 'rank_pattern'), ('lora', {'alpha_pattern': {'q': 4}}, 'alpha_pattern'),
    ('lora', {'fan_in_fan_out': True}, 'fan_in_fan_out'), ('lora', {'a_new_feature': 'on'}, "a_new_feature = 'on'"),
    ('lora', {'init_lora_weights': 'pissa'}, "'pissa' changes the base"), ('lora', {'peft_type': 'IA3'}, "peft_type = 'IA3'"),
    ('lora', {'task_type': 'CAUSAL_LM'}, "expected 'SEQ_2_SEQ_LM'"), ('lora', {'r': '3'}, "r = '3': expected a number"),
    ('lora', {'r': 2}, 'expected [2, 2, 24]'), ('prompt', {'num_virtual_tokens': 3}, 'of 3 x 2 rows')])
def test_what_has_no_counterpart_is_refused_by_name(theirs, base_dir, tmp_path, name, changes, message):
  folder = written(tmp_path / 'theirs', theirs, name, **changes)
  with pytest.raises(ConfigError) as error:
    peft.from_peft(str(folder), str(base_dir), str(tmp_path / 'ours'))
  assert message in str(error.value) and '\n' not in str(error.value)
  assert not (tmp_path / 'ours').exists()


@pytest.mark.parametrize('change, message', [
    (lambda tensors: tensors.pop(LAYER), f'there is no {LAYER}'),
    (lambda tensors: tensors.update({LAYER: tensors[LAYER][:, :2]}), 'different shapes'),
    (lambda tensors: tensors.update({LAYER: tensors[LAYER] * np.nan}), 'not finite'),
    (lambda tensors: tensors.update({'base_model.model.lm_head.lora_A.weight': tensors[LAYER]}), 'lm_head.lora_A'),
    (lambda tensors: tensors.update({'x.lora_magnitude_vector.weight': tensors[LAYER]}), 'x.lora_magnitude_vector.weight'),
    (lambda tensors: tensors.clear(), 'no tensor')])
def test_tensors_that_do_not_fit_are_refused(theirs, base_dir, tmp_path, change, message):
  folder = written(tmp_path / 'theirs', theirs, 'lora')
  tensors = safetensors.numpy.load_file(folder / peft.WEIGHTS)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)
  with pytest.raises(ConfigError) as error:
    peft.from_peft(str(folder), str(base_dir), str(tmp_path / 'ours'))
  assert message in str(error.value) and '\n' not in str(error.value)


def test_files_that_are_not_there_or_damaged_are_refused(theirs, base_dir, tmp_path):
  folder = written(tmp_path / 'theirs', theirs, 'lora')
  raw = (folder / peft.WEIGHTS).read_bytes()

  def refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
      peft.from_peft(str(folder), str(base_dir), str(tmp_path / 'ours'))
    assert '\n' not in str(error.value)

  halves = {name: jnp.asarray(value, jnp.bfloat16) for name, value in safetensors.numpy.load(raw).items()}
  safetensors.flax.save_file(halves, folder / peft.WEIGHTS)
  peft.from_peft(str(folder), str(base_dir), str(tmp_path / 'halves'))
  assert {value.dtype.name for value in tuning.read(tmp_path / 'halves').tensors.values()} == {'float32'}
  (folder / peft.WEIGHTS).write_bytes(raw[:100])
  refused('is damaged')
  (folder / peft.WEIGHTS).rename(folder / 'adapter_model.bin')
  refused('is a pickle')
  (folder / 'adapter_model.bin').unlink()
  refused('does not exist')
  (folder / peft.CONFIG).write_text('[]')
  refused('expected a JSON object')
  shutil.rmtree(folder)
  refused(f'there is no {peft.CONFIG}')
  (tmp_path / 'ours').mkdir()
  (tmp_path / 'ours' / 'file').write_text('')
  refused('exists already')


def test_modules_are_named_so_that_no_other_is_meant():
  """'wi' alone would mean the experts' matrices too, and 'q' alone those of the decoder."""
  experts = ModelConfig(
      vocab_size=20, d_model=8, d_ff=16, num_heads=2, head_dim=4, num_encoder_layers=2, num_decoder_layers=2,
      tie_embeddings=True, mlp_activation='relu',
      moe=MoEConfig(num_experts=2, encoder_every=2, decoder_every=2, router='switch'))
  query, wide = 'block.{}.layer.0.SelfAttention.q', 'block.0.layer.{}.mlp.wi'
  for sites, expected in (
      (('query',), ['q']), (('encoder.self.query',), [f'encoder.{query.format(layer)}' for layer in range(2)]),
      (('wi_0',), [f'decoder.{wide.format(2)}', f'encoder.{wide.format(1)}'])):
    config = DeltaConfig(method='lora', rank=2, sites=sites)
    tensors = {name: np.full(shape, len(name), np.float32) for name, shape in test_delta_mode.shapes(config, experts).items()}
    described, theirs = peft._lora_to_peft(tensors, config, experts)
    assert described['target_modules'] == expected
    back = peft._lora_from_peft(described, theirs, experts, 'here')
    assert test_delta_mode.shapes(back[0], experts).keys() == tensors.keys()
    assert all(np.array_equal(tensors[name], value) for name, value in back[1].items())


LIBRARY = pytest.mark.skipif(not all(map(importlib.util.find_spec, ('torch', 'transformers', 'peft'))),
                             reason="torch, transformers and peft are not installed: pip install -e '.[torch]'")


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
@LIBRARY
def test_peft_reads_a_lora_of_few_sites(golden, base_dir, tmp_path):
  import peft as library

  config = DeltaConfig(method='lora', rank=2, alpha=3.5, sites=('encoder.self.query', 'cross.value', 'wo'))
  delta = test_delta_mode.write(tmp_path / 'delta', base_dir, config)
  peft.to_peft(delta, str(tmp_path / 'theirs'))
  model = library.PeftModel.from_pretrained(golden_peft.base(golden.file), str(tmp_path / 'theirs')).eval()
  valid = np.asarray(golden.weights > 0)
  test_parity.assert_equal('logits', np.asarray(our_logits(golden, tuning.read(delta)))[valid],
                           golden_peft.logits(model, golden.file)[valid])


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
@LIBRARY
@pytest.mark.parametrize('name', ['lora', 'rslora', 'prompt'])
def test_peft_reads_our_files(golden, theirs, base_dir, tmp_path, name):
  """Live: made anew it is the golden file, and what `to_peft` wrote gives peft the same logits; also of an average."""
  import peft as library

  made = golden_peft.make(golden.file, name)
  np.testing.assert_allclose(made['logits'], theirs[f'{name}/logits'], atol=1e-4)
  ours, deltas = tmp_path / 'ours', [str(tmp_path / f'delta{number}') for number in range(2)]
  for delta in deltas:
    source = written(tmp_path / f'theirs{delta[-1]}', theirs, name)
    peft.from_peft(str(source), str(base_dir), delta)
  average.average(deltas, str(tmp_path / 'average'), '0.25,0.75')
  for delta, out in ((deltas[0], ours), (str(tmp_path / 'average'), tmp_path / 'averaged')):
    peft.to_peft(delta, str(out))
    model = library.PeftModel.from_pretrained(golden_peft.base(golden.file), str(out)).eval()
    found = golden_peft.logits(model, golden.file)
    np.testing.assert_allclose(found, made['logits'], atol=1e-4 * np.abs(made['logits']).max())
