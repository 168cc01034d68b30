"""`inspect`: what a checkpoint of any format holds, and in what two differ."""

import re

import numpy as np
import pytest
import small_data
import small_model
import small_tensors

from t5x_cpm import vocabularies
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import export, run_directory


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('inspect')
  run = small_model.model_dir(folder, vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}'))
  export.to_huggingface(str(run), str(folder / 'hf'))
  return run, folder / 'hf'


def said(capsys, *words) -> str:
  assert main(['inspect', *map(str, words)]) == 0
  return capsys.readouterr().out


def test_a_run_and_what_is_made_of_it(source, capsys):
  run, hf = source
  out = said(capsys, run)
  assert 'a run of t5x_cpm\n  step 3 of 3; task' in out and '1 + 2 layers, d_model 16, d_ff 24, 2 x 8 heads' in out
  for name, text in run_directory.read_meta(run_directory.resolve(run), 3)['arrays'].items():
    if name.startswith('params/'):
      assert re.search(rf'^{name.removeprefix("params/")} .* {text.rpartition(" ")[2]}$', out, re.MULTILINE), name
  there = said(capsys, hf)
  assert 'a folder of transformers\n  model_type t5: 1 + 2 layers' in there
  assert re.search(r'^shared\.weight +\[\d+, 16\] +float32 ', there, re.MULTILINE)
  assert out.splitlines()[-1].split(' tensors, ')[1] == there.splitlines()[-1].split(' tensors, ')[1]  # numbers and bytes
  assert said(capsys, hf / 'model.safetensors').splitlines()[1:] == there.splitlines()[2:]


def test_differences(source, tmp_path, capsys):
  run, hf = source
  assert re.fullmatch(r'\d+ tensors are equal\n', said(capsys, run, f'--diff={hf}'))
  tensors = {name: value.copy() for name, value in small_tensors.read(hf).items()}
  tensors['shared.weight'][3, 1] += 0.5
  tensors['lm_head.weight'] = tensors['lm_head.weight'][:-1]
  tensors['new'] = tensors.pop('encoder.final_layer_norm.weight')
  small_tensors.write(tmp_path, tensors)
  out = said(capsys, hf, f'--diff={tmp_path / "model.safetensors"}')
  assert 'shared.weight: differs by up to 0.5\n' in out
  assert re.search(r'lm_head\.weight: \[\d+, 16\] and \[\d+, 16\]\n', out)
  assert f'encoder.final_layer_norm.weight: only in {hf}, [16]\n' in out
  assert f'new: only in {tmp_path}/model.safetensors, [16]\n' in out
  assert out.endswith(f'{len(tensors) - 3} tensors are equal, 1 only in the first, 1 only in the second, 1 of other shapes, '
                      '1 of other values\n')


def test_what_is_no_checkpoint_is_told(source, tmp_path, capsys):
  damaged = tmp_path / 'damaged.safetensors'
  damaged.write_bytes((source[1] / 'model.safetensors').read_bytes()[:-1])
  (tmp_path / 'text.txt').write_text('x')
  for path, message in ((damaged, 'is damaged'), (tmp_path, 'incomplete'), (tmp_path / 'gone', 'does not exist'),
                        (tmp_path / 'text.txt', 'expected the model_dir of a run')):
    if path == tmp_path:
      damaged.unlink()
      message = 'expected the model_dir of a run'
    assert main(['inspect', str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
  assert main(['inspect', str(source[1]), '--step=3']) == 2
  assert 'has no --step' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_files_of_torch_and_of_cpm2(tmp_path, capsys):
  torch = pytest.importorskip('torch')
  values = {'a': torch.arange(6.0).reshape(2, 3).bfloat16(), 'b': torch.ones(2, dtype=torch.int64)}
  torch.save({'module': values, 'step': 3}, tmp_path / 'x.pt')
  out = said(capsys, tmp_path / 'x.pt')
  assert 'beside the tensors: step' in out and re.search(r'^a +\[2, 3\] +bfloat16 +12 ', out, re.MULTILINE)
  small_tensors.write(tmp_path, {'a': np.arange(6, dtype=np.float32).reshape(2, 3)})
  assert said(capsys, tmp_path / 'model.safetensors', f'--diff={tmp_path / "x.pt"}') == (
      f'b: only in {tmp_path}/x.pt, [2]\n1 tensors are equal, 1 only in the second\n')
  for rank in range(2):
    (tmp_path / 'cpm2').mkdir(exist_ok=True)
    torch.save({'module': {'a': values['a']}, 'iteration': 7}, tmp_path / 'cpm2' / f'mp_rank_0{rank}_model_states.pt')
  out = said(capsys, tmp_path / 'cpm2')
  assert 'files of CPM-2\n  2 files in' in out and 'iteration 7' in out and 'mp_rank_01: a ' in out
