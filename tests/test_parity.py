"""The same weights give the same figures and tokens as transformers' T5, and survive the way there and back."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tensors
from small_tensors import from_params, to_params

from t5x_cpm import vocabularies
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import arrays, huggingface, run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import Config, ConfigError, ModelConfig, TaskConfig
from t5x_cpm.inference import decode
from t5x_cpm.models import attention, encoder_decoder
from t5x_cpm.training import losses

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELATIVE = 1e-4  # of the largest entry of a tensor, and of its norm


def tool(name: str) -> Any:
  """A module of the folder tools/."""
  spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


golden_t5 = tool('golden_t5')


class Reference:
  """What transformers computed, and our model with its weights; routed as in training with these fields of MoEConfig."""

  def __init__(self, file: dict[str, np.ndarray], **training: Any):
    self.file, self.train = file, bool(training)
    print(file['versions'])
    config = huggingface.read_config(json.loads(str(file['config'])))
    self.config, params = to_params(config, self.part('weight/'))
    self.config = dataclasses.replace(self.config, moe=dataclasses.replace(self.config.moe, **training))
    self.model = encoder_decoder.build(self.config)
    self.params = jax.tree.map(jnp.asarray, params)
    labels = file['labels']
    self.weights = jnp.asarray(labels >= 0, jnp.float32)
    self.targets = jnp.maximum(labels, 0)
    self.batch = {
        'encoder_input_tokens': file['input_ids'], 'encoder_segment_ids': file['attention_mask'],
        'decoder_input_tokens': file['decoder_input_ids'], 'decoder_segment_ids': self.weights.astype(jnp.int32)}

  def part(self, prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix):]: value for name, value in self.file.items() if name.startswith(prefix)}

  @functools.cached_property
  def computed(self) -> tuple[Any, Any, Any]:
    """Our logits, mean loss and gradients."""

    def loss(params: Any) -> tuple[Any, Any]:
      logits = self.model.apply(params, self.batch, train=self.train)[0]
      return losses.cross_entropy(logits, self.targets, self.weights, 0.0)[0] / self.weights.sum(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)
    return logits, value, gradients

  def generate(self, rule: decode.Rule) -> decode.Output:
    """Tokens by our search, from the padded encoder inputs of the reference."""
    rows = self.file['input_ids'].shape[0]
    encoder = {name: value for name, value in self.batch.items() if name.startswith('encoder')}

    @jax.jit
    def run(params: Any) -> decode.Output:
      cache = self.model.start(params, encoder, rule.max_new_tokens)
      return decode.while_loop(
          functools.partial(self.model.step, params), cache, rule, jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), 1),
          take=attention.take)

    return run(self.params)


def assert_equal(name: str, got: Any, want: Any) -> None:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, name
  difference = got - want
  assert np.abs(difference).max() <= RELATIVE * np.abs(want).max(), name
  assert np.linalg.norm(difference) <= RELATIVE * np.linalg.norm(want), name


def check_figures(reference: Reference) -> None:
  logits, loss, gradients = reference.computed
  valid = np.asarray(reference.weights > 0)
  want = reference.file['logits']
  assert want[valid].std() >= 1
  assert_equal('logits', np.asarray(logits)[valid], want[valid])
  assert_equal('loss', loss, reference.file['loss'])
  own = from_params(reference.config, gradients)
  theirs = reference.part('gradient/')
  assert set(own) == set(theirs)
  for name, value in theirs.items():
    assert np.abs(value).max() > 0, f'{name}: its gradient shows nothing'
    assert_equal(name, own[name], value)


def check_tokens(reference: Reference) -> None:
  def compare(rule: decode.Rule, want: np.ndarray) -> decode.Output:
    got = reference.generate(rule)
    padded = np.pad(want, ((0, 0), (0, got.tokens.shape[1] - want.shape[1])))  # theirs ends with the longest row
    np.testing.assert_array_equal(got.tokens, padded)
    return got

  compare(decode.Greedy(max_new_tokens=golden_t5.GREEDY['max_new_tokens']), reference.file['greedy'])
  for index in range(len(golden_t5.BEAMS)):
    settings = json.loads(str(reference.file[f'beam/{index}/settings']))
    rule = decode.Beam(width=settings.pop('num_beams'), **settings)
    got = compare(rule, reference.file[f'beam/{index}/tokens'])
    assert_equal('scores', got.score, reference.file[f'beam/{index}/scores'])


@pytest.fixture(scope='module')
def golden() -> Reference:
  with np.load(ROOT / 'tests' / 'golden' / 't5_parity.npz') as file:
    return Reference(dict(file))


def test_golden_logits_loss_and_gradients(golden):
  check_figures(golden)


def test_golden_greedy_and_beam_tokens(golden):
  assert len({str(golden.file[f'beam/{i}/tokens'].tolist()) for i in range(len(golden_t5.BEAMS))}) > 1
  check_tokens(golden)


@pytest.fixture(scope='module')
def switch() -> Reference:
  with np.load(ROOT / 'tests' / 'golden' / 'switch_parity.npz') as file:
    return Reference(dict(file))


def check_auxiliary_losses(reference: Reference) -> None:
  """Theirs are sums over encoder and decoder, ours means over layers; each stack has one layer with experts."""
  losses = reference.model.apply(reference.params, reference.batch)[1]
  for ours, theirs in (('balance_loss', 'aux'), ('router_z_loss', 'z')):
    assert_equal(ours, 2 * losses[ours], sum(reference.file[f'{stack}_{theirs}_loss'] for stack in ('encoder', 'decoder')))


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_switch_transformers(switch):
  assert switch.config.moe.num_experts == 4
  check_figures(switch)
  check_tokens(switch)
  check_auxiliary_losses(switch)


def test_switch_transformers_there_and_back(switch, tmp_path):
  there = from_params(switch.config, switch.params)
  assert set(there) == set(switch.part('weight/'))
  jax.tree.map(np.testing.assert_array_equal, to_params(switch.config, there)[1], switch.params)
  assert huggingface.read_config(huggingface.write_config(switch.config)) == switch.config
  routed = dataclasses.replace(switch.config, moe=dataclasses.replace(switch.config.moe, router='top_k'))
  with pytest.raises(ConfigError, match="router = 'top_k'.*SwitchTransformers"):
    huggingface.write_config(routed)
  for wrong in (lambda: huggingface.write_config(dataclasses.replace(switch.config, tie_embeddings=False)),
                lambda: huggingface.read_experts({'tie_word_embeddings': False})):
    with pytest.raises(ConfigError, match='an embedding table each'):
      wrong()
  with pytest.raises(ConfigError, match='num_sparse_encoder_layers = 3 does not divide num_layers = 4'):
    huggingface.read_experts({'num_layers': 4})


def test_weights_and_configuration_there_and_back(golden):
  there = from_params(golden.config, golden.params)
  assert {name: value.shape for name, value in there.items()} == {
      name: value.shape for name, value in golden.part('weight/').items()}
  back = to_params(golden.config, there)[1]
  jax.tree.map(np.testing.assert_array_equal, back, golden.params)
  for config in (golden.config, dataclasses.replace(golden.config, mlp_activation='gelu', tie_embeddings=True)):
    assert huggingface.read_config(huggingface.write_config(config)) == config


def test_tensors_that_do_not_fit_are_named(golden):
  weights = golden.part('weight/')
  weights['encoder.block.1.layer.0.SelfAttention.k.weight'] = np.zeros((3, 2), np.float32)
  weights['decoder.block.9.layer.0.layer_norm.weight'] = weights.pop('decoder.final_layer_norm.weight')
  with pytest.raises(ConfigError) as error:
    to_params(golden.config, weights)
  for part in ('block.1.layer.0.SelfAttention.k.weight: [3, 2], expected [24, 32]', 'decoder.final_layer_norm.weight: missing',
               'decoder.block.9.layer.0.layer_norm.weight: not of'):
    assert part in str(error.value)
  described = json.loads(str(golden.file['config']))
  for wrong in (described | {'model_type': 'bart'}, described | {'feed_forward_proj': 'gelu'}):
    with pytest.raises(ConfigError, match=r'config\.json: (model_type|feed_forward_proj) = '):
      huggingface.read_config(wrong)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('scaled', [True, False])
def test_every_kind_of_head_gives_their_logits(golden, tied, scaled):
  """Their output is head(x * scale); ours is either tied and scaled or neither."""
  weights = golden.part('weight/')
  if tied:
    del weights['lm_head.weight']
  head = weights['shared.weight' if tied else 'lm_head.weight']
  config, params = to_params(dataclasses.replace(golden.config, tie_embeddings=scaled), weights)
  x = np.random.default_rng(5).standard_normal((1, 2, config.d_model)).astype(np.float32)
  got = encoder_decoder.build(config).logits(params, jnp.asarray(x))
  want = x * (config.d_model**-0.5 if scaled else 1) @ head.T
  assert config.tie_embeddings == (tied and scaled)
  assert_equal('logits', got, want)


def small_vocabulary(folder: pathlib.Path) -> str:
  specials = ['<unk>', '<s>', '</s>', '\u2583', '<sep>', '<pad>', '<mask>', '<eod>', '\u2581', ',', '\u2582']
  pieces = specials + list('的一是不了人我在有他') + [f'<s_{i}>' for i in range(20)]
  (folder / 'vocab.txt').write_text('\n'.join(pieces) + '\n', encoding='utf-8')
  return f'cpm2:{folder / "vocab.txt"}'


def test_export_and_import_keep_a_model(tmp_path, capsys):
  words = vocabularies.load(small_vocabulary(tmp_path))
  model = ModelConfig(vocab_size=words.size, d_model=8, d_ff=12, num_heads=2, head_dim=4, num_buckets=8, max_distance=16)
  config = Config(model=model, task=TaskConfig(vocabulary=words.spec))
  params = jax.jit(encoder_decoder.build(model).init)(jax.random.key(2))
  with Manager(tmp_path / 'run', config, info={'vocabulary': words.fingerprint}) as manager:
    words.save(tmp_path / 'run' / 'vocabulary')
    manager.save(3, {'step': jnp.int32(3), 'params': params})
  assert main(['convert', 'to_hf', f'{tmp_path / "run"}', f'{tmp_path / "hf"}']) == 0
  described = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert (described['decoder_start_token_id'], described['eos_token_id'], described['pad_token_id']) == (1, 7, 5)
  assert main(['convert', 'hf', f'{tmp_path / "hf"}', f'{tmp_path / "back"}']) == 0
  jax.tree.map(np.testing.assert_array_equal, arrays.load_params(tmp_path / 'back'), params)
  assert run_directory.read_run(tmp_path / 'back').info['vocabulary'] == words.fingerprint
  assert main(['convert', 'to_hf', f'{tmp_path / "run"}', f'{tmp_path / "hf"}']) == 2
  assert 'exists already' in capsys.readouterr().err


def test_large_models_are_written_in_parts(tmp_path, golden):
  small_tensors.write(tmp_path, from_params(golden.config, golden.params), limit=20_000)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  files = sorted(file.name for file in tmp_path.glob('*.safetensors'))
  assert len(files) > 3 and sorted(set(index['weight_map'].values())) == files and not list(tmp_path.glob('part-*'))
  for name, value in small_tensors.read(tmp_path).items():
    np.testing.assert_array_equal(value, golden.part('weight/')[name])


def test_folders_that_cannot_be_read_are_refused(tmp_path, golden, capsys):
  words = small_vocabulary(tmp_path)
  flags = ['convert', 'hf', f'{tmp_path}', f'{tmp_path / "new"}', f'--vocabulary={words}']

  def told() -> str:
    assert main(flags) == 2
    return capsys.readouterr().err

  assert 'there is no config.json in it' in told()
  for text, message in (('{', 'config.json: malformed JSON'), ('[]', 'config.json: expected a JSON object')):
    (tmp_path / 'config.json').write_text(text)
    assert message in told()
  (tmp_path / 'config.json').write_text(str(golden.file['config']))
  assert 'has no model*.safetensors' in told()
  (tmp_path / 'model.safetensors').write_bytes(b'x' * 20)
  assert 'model.safetensors is damaged' in told()
  assert main([*flags, '--step=3']) == 2 and main(['convert', 'to_hg', *flags[2:]]) == 2
  error = capsys.readouterr().err
  assert '--step is not a flag of convert hf' in error and 'Did you mean to_hf?' in error
  assert not (tmp_path / 'new').exists()


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
@pytest.mark.parametrize('seed, changes', [
    (11, {}),
    (12, {'feed_forward_proj': 'relu', 'tie_word_embeddings': True}),
    (13, {'feed_forward_proj': 'gated-silu', 'num_layers': 2, 'relative_attention_num_buckets': 16}),
])
def test_live_against_transformers(seed, changes):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  reference = Reference(golden_t5.make(golden_t5.CONFIG | changes, seed))
  check_figures(reference)
  check_tokens(reference)


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_live_against_switch_transformers():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  reference = Reference(golden_t5.make(golden_t5.SWITCH_CONFIG, 14))
  check_figures(reference)
  check_tokens(reference)
  check_auxiliary_losses(reference)


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_switch_transformers_leaves_the_same_tokens_behind():
  """An expert takes 4 of the 24 tokens of a row, where 6 come on average: the first, on both sides."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  file = golden_t5.make(golden_t5.SWITCH_CONFIG | {'expert_capacity': 4}, 15, S=24, T=24)
  reference = Reference(file, dispatch='einsum', group_size=24, capacity_factor=4 / 6)
  check_figures(reference)
  metrics = reference.model.apply(reference.params, reference.batch, train=True)[2]
  left, tokens = metrics['encoder/left_behind']
  assert float(left.sum()) > 0.1 * float(tokens.sum())


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
@pytest.mark.parametrize('file', golden_t5.GOLDEN)
def test_golden_file_is_what_transformers_computes(file):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  live = golden_t5.make(*golden_t5.GOLDEN[file])
  for name, value in np.load(ROOT / 'tests' / 'golden' / f'{file}_parity.npz').items():
    if name.endswith(('tokens', 'greedy', 'settings', 'config', 'ids', 'mask', 'labels')):
      np.testing.assert_array_equal(live[name], value)
    elif name != 'versions':
      assert_equal(name, live[name], value)


def read_by_transformers(folder: pathlib.Path, reference: Reference, kind: str) -> Any:
  """Their model of the files that we write, after its loss has been compared."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  (folder / 'config.json').write_text(json.dumps(huggingface.write_config(reference.config) | {
      'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0}))
  small_tensors.write(folder, from_params(reference.config, reference.params))
  model = getattr(transformers, f'{kind}ForConditionalGeneration').from_pretrained(folder).eval()
  with torch.no_grad():
    out = model(**{name: torch.from_numpy(reference.file[name]).long() for name in ('input_ids', 'attention_mask', 'labels')})
  assert_equal('loss', out.loss.numpy(), reference.file['loss'])
  return model


@pytest.mark.slow
@pytest.mark.xdist_group('torch')
def test_transformers_reads_what_is_exported(tmp_path, golden, switch):
  for name in ('t5', 'switch'):
    (tmp_path / name).mkdir()
  read_by_transformers(tmp_path / 'switch', switch, 'SwitchTransformers')
  model = read_by_transformers(tmp_path / 't5', golden, 'T5')

  import torch
  torch.save(model.state_dict(), tmp_path / 't5' / 'pytorch_model.bin')
  (tmp_path / 't5' / 'model.safetensors').unlink()
  jax.tree.map(np.testing.assert_array_equal, to_params(golden.config, small_tensors.read(tmp_path / 't5'))[1], golden.params)


def test_golden_files_are_small():
  assert sum(file.stat().st_size for file in (ROOT / 'tests' / 'golden').iterdir()) < 1_500_000
