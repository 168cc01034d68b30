"""A larger model from a smaller one: what each growth keeps, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import small_model
import test_step

from t5x_cpm import inference, trees, vocabularies
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.inherit import vocabulary
from t5x_cpm.models import encoder_decoder

EXPERTS = ["--gin.InheritConfig.growth=('experts',)", '--gin.MoEConfig.num_experts=4']


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """An old vocabulary, and a new one in another order: without some pieces, with longer ones and more sentinels."""
  folder = tmp_path_factory.mktemp('words')
  old = vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')
  lines = [old.piece(token) for token in range(old.size)]
  special, plain = lines[:20], [line for line in lines[20:] if not line.startswith('<s_')]
  new = [*special, '一丁丁', '##一丁', 'qqq', *reversed(plain[:-30]), *(line for line in lines if line.startswith('<s_'))]
  (folder / 'new.txt').write_text(''.join(f'{line}\n' for line in new), encoding='utf-8')
  return old, vocabularies.load(f'cpm2:{folder / "new.txt"}')


@pytest.fixture(scope='module')
def source(words, tmp_path_factory):
  return small_model.model_dir(tmp_path_factory.mktemp('source'), words[0])


def inherit(capsys, source, model_dir, *flags, code=0):
  found = main(['inherit', f'--source={source}', f'--model_dir={model_dir}', *flags])
  out, error = capsys.readouterr()
  assert found == code, error
  return out if not code else error


def logits(model_dir, batch):
  run = run_directory.read_run(model_dir)
  return np.asarray(jax.jit(encoder_decoder.build(run.config.model).apply)(arrays.load_params(model_dir), batch)[0])


def test_each_piece_comes_from_itself_its_prefix_or_anywhere(words):
  old, new = words
  rows, counts = vocabulary.origins(old, new, new.size + 3, seed=0)
  ids = {old.piece(token): token for token in range(old.size)}
  pieces = {new.piece(token): token for token in range(new.size)}
  assert all(rows[pieces[piece]] == token for piece, token in ids.items() if piece in pieces)
  assert rows[pieces['一丁丁']] == ids.get('一丁', ids['一']) and rows[pieces['##一丁']] == ids.get('一丁', ids['一'])
  assert sum(counts.values()) == new.size + 3 and counts['prefix'] >= 2 and counts['padding'] == 3
  assert np.array_equal(rows, vocabulary.origins(old, new, new.size + 3, seed=0).rows)
  special = {old.pad_id, old.bos_id, old.eos_id, old.unk_id, *old.sentinels}
  assert rows[pieces['qqq']] in ({ids['q']} if 'q' in ids else set(range(old.size)) - special)


def test_the_published_vocabularies(shared_data):
  """Pieces 7 to 26,049 of the Chinese one have the next id in the bilingual one; sentinels and specials have their roles."""
  old, new = (vocabularies.load(f'cpm2:{shared_data}/vocab/cpm2_bpe_{name}/vocab.txt') for name in ('cn', 'cn_en'))
  rows, counts = vocabulary.origins(old, new, new.size, seed=0)
  assert (old.size, new.size) == (26240, 51968)
  np.testing.assert_array_equal(rows[8:26051], np.arange(7, 26050))
  np.testing.assert_array_equal(rows[-185:], np.arange(26050, 26050 + 185))
  assert (new.piece(26051 + 3949), old.piece(rows[30000])) == ('Wright', 'W') and counts['random'] < 0.03 * new.size


def test_a_new_vocabulary_keeps_what_old_pieces_mean(words, source, tmp_path, capsys):
  old, new = words
  told = inherit(capsys, source, tmp_path / 'grown', '--gin_file=gin/runs/inherit_vocabulary.gin',
                 f'--gin.TaskConfig.vocabulary={new.spec}')
  assert 'kept' in told and f'--init_from={tmp_path / "grown"}' in told
  run = run_directory.read_run(tmp_path / 'grown')
  assert run.config.model.vocab_size == new.size and run.info['vocabulary'] == new.fingerprint and run.step == 0
  config = dataclasses.replace(test_step.CONFIG, model=dataclasses.replace(test_step.CONFIG.model, vocab_size=old.size))
  batch = test_step.random_batch(config, 0)
  ids = {new.piece(token): token for token in range(new.size)}
  common = np.array([token for token in range(old.size) if old.piece(token) in ids])
  to_new = np.zeros(old.size, np.int32)
  to_new[common] = [ids[old.piece(token)] for token in common]
  for name in ('encoder_input_tokens', 'decoder_input_tokens'):
    batch[name] = common[batch[name] % len(common)].astype(np.int32)
  moved = batch | {name: to_new[batch[name]] for name in ('encoder_input_tokens', 'decoder_input_tokens')}
  expected, found = logits(source, batch), logits(tmp_path / 'grown', moved)
  np.testing.assert_allclose(found[..., to_new[common]], expected[..., common], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('router, exact', [
    ('random_projection', True), pytest.param('top_k', False, marks=pytest.mark.slow),
    pytest.param('top_k --gin.MoEConfig.renormalise=True', True, marks=pytest.mark.slow)])
def test_equal_experts_compute_what_one_network_does(source, tmp_path, capsys, router, exact):
  router, *more = router.split()
  flags = ['--gin_file=gin/runs/inherit_experts.gin', '--gin.MoEConfig.num_experts=4', f'--gin.MoEConfig.router={router}',
           '--gin.MoEConfig.decoder_every=2', *more]
  told = inherit(capsys, source, tmp_path / 'grown', *flags)
  assert ('function is that of the source' in told) == exact and 'each network 4 times' in told and 'drawn' in told
  texts = ['一', '丄丅']
  found, expected = (inference.load(folder).score([f'{text}<span>' for text in texts], texts)
                     for folder in (tmp_path / 'grown', source))
  assert np.allclose(found, expected, rtol=1e-5) == exact
  old, new = (trees.named(arrays.load_params(folder)) for folder in (source, tmp_path / 'grown'))
  np.testing.assert_array_equal(new['experts/decoder/wo'][0, 3], old['experts/decoder/wo'][1])
  np.testing.assert_array_equal(new['experts/decoder_dense/wo'][0], old['experts/decoder/wo'][0])
  inherit(capsys, source, tmp_path / 'noisy', *flags, '--gin.InheritConfig.expert_noise=0.1')
  noisy = trees.named(arrays.load_params(tmp_path / 'noisy'))['experts/encoder/wi_0']
  noise = np.asarray(noisy - old['experts/encoder/wi_0'][:, None])
  assert noise.std() == pytest.approx(0.1 * float(jnp.std(old['experts/encoder/wi_0'])), rel=0.1)
  assert not np.array_equal(noise[0, 0], noise[0, 1])


@pytest.mark.slow
def test_both_at_once_and_then_trained(words, source, tmp_path, capsys):
  flags = ['--gin_file=gin/runs/inherit_experts.gin', '--gin_file=gin/runs/inherit_vocabulary.gin',
           "--gin.InheritConfig.growth=('vocabulary', 'experts')", '--gin.MoEConfig.num_experts=4',
           f'--gin.TaskConfig.vocabulary={words[1].spec}']
  told = inherit(capsys, source, tmp_path / 'grown', '--dry_run', *flags)
  assert 'each network 4 times' in told and 'kept' in told and not list(tmp_path.glob('grown*'))
  inherit(capsys, source, tmp_path / 'grown', *flags)
  (tmp_path / 'text.txt').write_text('一丁丄丅丆\n' * 50)
  fields = {'TaskConfig.name': 'local', 'LocalTaskConfig.files': tmp_path / 'text.txt', 'TaskConfig.encoder_length': 32,
            'TaskConfig.decoder_length': 16, 'TaskConfig.cache_dir': tmp_path, 'TrainConfig.batch_size': 4,
            'TrainConfig.steps': 2, 'TrainConfig.eval_every': 0}
  flags = [f'--gin.{name}={value}' for name, value in fields.items()]
  assert main(['train', f'--init_from={tmp_path / "grown"}', '--gin_file=gin/runs/pretrain.gin',
               f'--model_dir={tmp_path / "run"}', *flags]) == 0


@pytest.mark.parametrize('flags, message', [
    ([], 'InheritConfig.growth = (): say what grows'),
    (["--gin.InheritConfig.growth=('expert',)"], 'Did you mean experts'),
    (["--gin.InheritConfig.growth=('experts',)"], 'set how many there are to be'),
    ([*EXPERTS, '--gin.MoEConfig.shared_experts=1'], 'count twice'),
    ([*EXPERTS, '--gin.ModelConfig.d_ff=48'], 'does not make the model that is described: ModelConfig.d_ff'),
    ([*EXPERTS, '--gin.ModelConfig.vocab_size=9000'], 'does not make the model that is described: ModelConfig.vocab_size'),
    (["--gin.InheritConfig.growth=('experts', 'experts')"], 'expected different names')])
def test_what_cannot_grow_is_refused(source, tmp_path, capsys, flags, message):
  error = inherit(capsys, source, tmp_path / 'grown', *flags, code=2)
  assert message in error and error.count('\n') == 1
  assert not (tmp_path / 'grown').exists() and not (tmp_path / 'grown.partial').exists()


def test_a_vocabulary_that_shares_nothing_is_refused(source, tmp_path, capsys):
  (tmp_path / 'other.txt').write_text(''.join(f'{piece}\n' for piece in (
      '<unk>', '<s>', '</s>', '▃', '<sep>', '<pad>', '<mask>', '<eod>', '▂', 'Ω', '<s_0>', '<s_1>')), encoding='utf-8')
  error = inherit(capsys, source, tmp_path / 'grown', '--gin_file=gin/runs/inherit_vocabulary.gin',
                  f'--gin.TaskConfig.vocabulary=cpm2:{tmp_path / "other.txt"}', code=2)
  assert 'shares no piece with' in error and error.count('\n') == 1, error
