"""`convert to_hf`: complete or not there, continued after a kill, with all that transformers needs beside the weights."""

import json

import numpy as np
import pytest
import small_data
import small_model
import small_tensors
import test_convert

from t5x_cpm import inference, vocabularies
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import convert, export, huggingface, run_directory
from t5x_cpm.config import ConfigError

spiece = test_convert.spiece


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('export')
  return small_model.model_dir(folder, vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}'))


def stop_after(monkeypatch, count: int, kind: type = huggingface.Exported) -> None:
  """Interrupts the reading of tensors, once."""
  read, left = kind.read, [count]

  def counted(self, *given):
    left[0] -= 1
    if not left[0]:
      raise KeyboardInterrupt
    return read(self, *given)

  monkeypatch.setattr(kind, 'read', counted)


def test_what_was_killed_goes_on(run, tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    stop_after(patched, 9)
    with pytest.raises(KeyboardInterrupt):
      export.to_huggingface(str(run), str(tmp_path / 'hf'), limit=4000)
  partial = tmp_path / 'hf.partial'
  written = {file: file.stat().st_mtime_ns for file in partial.glob('model-*.safetensors')}
  assert written and not (tmp_path / 'hf').exists()
  export.to_huggingface(str(run), str(tmp_path / 'hf'), limit=4000)
  assert not partial.exists() and not (tmp_path / 'hf' / export.BEGUN).exists()
  assert {tmp_path / 'hf' / file.name: time for file, time in written.items()}.items() <= {
      file: file.stat().st_mtime_ns for file in (tmp_path / 'hf').iterdir()}.items()
  export.to_huggingface(str(run), str(tmp_path / 'whole'))
  whole, parts = (small_tensors.read(tmp_path / name) for name in ('whole', 'hf'))
  assert whole.keys() == parts.keys()
  for name, value in whole.items():
    np.testing.assert_array_equal(parts[name], value, err_msg=name)

  # Back again, stopped on the way, all tensors are equal.
  with monkeypatch.context() as patched:
    stop_after(patched, 9, huggingface.Source)
    with pytest.raises(KeyboardInterrupt):
      convert.from_huggingface(str(tmp_path / 'hf'), str(tmp_path / 'back'))
  assert (tmp_path / 'back.partial').exists() and not (tmp_path / 'back').exists()
  convert.from_huggingface(str(tmp_path / 'hf'), str(tmp_path / 'back'))
  metas = [run_directory.read_meta(run_directory.resolve(folder), step)['arrays']
           for folder, step in ((run, 3), (tmp_path / 'back', 0))]
  assert metas[0].items() >= {name: text for name, text in metas[1].items() if name.startswith('params/')}.items()
  texts = ['一', '丁']
  np.testing.assert_array_equal(inference.load(tmp_path / 'back').score(texts, texts), inference.load(run).score(texts, texts))


def test_what_lies_in_the_way_and_a_full_disk_are_told(run, tmp_path, monkeypatch):
  (tmp_path / 'hf.partial').mkdir()
  (tmp_path / 'hf.partial' / 'mine').write_text('x')
  with pytest.raises(ConfigError, match=r'hf\.partial is in the way'):
    export.to_huggingface(str(run), str(tmp_path / 'hf'))
  assert (tmp_path / 'hf.partial' / 'mine').exists()
  monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), {'free': 1 << 10}))
  with pytest.raises(ConfigError, match=r'the model takes about 0\.0 GiB, and 0\.0 are free'):
    export.to_huggingface(str(run), str(tmp_path / 'other'))
  assert not (tmp_path / 'other.partial').exists()


def test_a_card_says_what_the_model_is(run, tmp_path):
  export.to_huggingface(str(run), str(tmp_path / 'small'))
  card = (tmp_path / 'small' / 'README.md').read_text()
  for text in ('# small\n', 'step 3 of', '| layers | 1 + 2 |', "T5ForConditionalGeneration.from_pretrained('small')",
               "load_saved('small/vocabulary')", 'python -m t5x_cpm convert hf small runs/small'):
    assert text in card, text


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_transformers_answers_as_we_do(tmp_path, spiece, capsys):
  """From transformers here, a step of training, and to transformers: tokens, answers, and what training left as it was."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  import test_parity

  config = transformers.T5Config(**test_parity.golden_t5.CONFIG | {'vocab_size': 400})
  model = transformers.T5ForConditionalGeneration(config).eval()
  test_parity.golden_t5.draw(model, np.random.default_rng(3))
  model.save_pretrained(tmp_path / 'theirs', max_shard_size='40KB')
  (tmp_path / 'theirs' / 'spiece.model').write_bytes(spiece.read_bytes())
  assert main(['convert', 'hf', str(tmp_path / 'theirs'), str(tmp_path / 'run')]) == 0

  pairs = tmp_path / 'pairs.jsonl'
  pairs.write_text(''.join(json.dumps({'inputs': f'She saw {n}', 'targets': 'a dog'}) + '\n' for n in range(8)))
  step = ['train', f'--init_from={tmp_path / "run"}', f'--model_dir={tmp_path / "tuned"}',
          '--gin_file=gin/runs/finetune.gin',
          f'--gin.LocalTaskConfig.files={pairs}', f'--gin.LocalTaskConfig.validation_files={pairs}',
          '--gin.TrainConfig.steps=1',
          '--gin.TrainConfig.batch_size=8', f'--gin.TaskConfig.cache_dir={tmp_path}', "--gin.TaskConfig.name='local'",
          "--gin.TaskConfig.objective='pairs'"]
  assert main(step) == 0, capsys.readouterr().err
  for name in ('run', 'tuned'):
    assert main(['convert', 'to_hf', str(tmp_path / name), str(tmp_path / f'{name}_hf')]) == 0
  back, tuned = (transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / f'{name}_hf').eval()
                 for name in ('run', 'tuned'))
  assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
  changed = {name for name, value in model.state_dict().items() if not torch.equal(value, tuned.state_dict()[name])}
  assert 'encoder.block.0.layer.0.SelfAttention.q.weight' in changed
  np.testing.assert_array_equal(tuned.shared.weight[310:390].detach(), model.shared.weight[310:390].detach())  # never seen

  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'tuned_hf')
  words = vocabularies.load_saved(tmp_path / 'tuned' / 'vocabulary')
  engine = inference.load(tmp_path / 'tuned')
  for text in ('She opened the window and looked outside.', 'a  b'):
    ids = tokenizer(text).input_ids
    assert ids == [*words.encode(text), words.eos_id]
    answer = tuned.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, num_beams=1)[0].tolist()
    assert words.decode(answer[1:]) == engine.generate([text], max_new_tokens=12)[0]
