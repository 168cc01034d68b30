"""Each way to grow: that it keeps of the function what it says, on text of the corpus, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm import inherit, trees, vocabularies
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import arrays, run_directory, tensors
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import Config, ConfigError, ModelConfig, MoEConfig, TaskConfig, gin
from t5x_cpm.inherit import run as inherit_run
from t5x_cpm.inherit import sources
from t5x_cpm.models import encoder_decoder

VOCABULARY = 'cpm2:tasks/corpus/vocab.txt'
DOMAINS = MoEConfig(num_experts=4, router='domain')
PROTOTYPES = MoEConfig(num_experts=4, router='prototypes', top_k=2, decoder_every=2)


def drawn(model, seed):
  """Parameters of no particular distribution, but norms near 1: drawn without a program that would have to be compiled."""
  rng = np.random.default_rng(seed)
  print(f'seed {seed}')
  return {leaf.name: rng.normal(leaf.name.endswith('scale'), 0.4, leaf.shape).astype(np.float32)
          for leaf in jax.tree.leaves(encoder_decoder.build(model).leaves())}


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  """(steps, fields of its ModelConfig) -> the model_dir of a small random model, made once."""
  made, words = {}, vocabularies.load(VOCABULARY)

  def source(steps=(1,), **fields):
    key = repr((steps, fields))
    if key not in made:
      made[key] = tmp_path_factory.mktemp('source')
      config = Config(task=TaskConfig(vocabulary=VOCABULARY), model=ModelConfig(
          vocab_size=words.size, d_model=16, d_ff=24, num_heads=2, head_dim=8, num_encoder_layers=1, layer_loop='scan',
          initializer='t5', **fields))
      with Manager(made[key], config, info={'vocabulary': words.fingerprint}) as manager:
        for step in steps:
          manager.save(step, {'step': jnp.int32(step), 'params': trees.nested(drawn(config.model, step))})
      words.save(made[key] / 'vocabulary')
    return str(made[key])

  return source


def plan(given, name, *overrides):
  """What `inherit` would make of one source or several by a gin file and flags."""
  given = [given] if isinstance(given, str) else given
  model = run_directory.read_run(given[0].partition('@')[0]).config.model
  config = gin.load([f'gin/runs/inherit_{name}.gin'], overrides, scope='train',
                    base=Config(model=model, task=TaskConfig(vocabulary=VOCABULARY)))
  return inherit_run.plan(config, given)[0]


def params_of(stage):
  """All parameters of what has grown, by name."""
  return {leaf.name: np.reshape([stage.read(leaf, index) for index in tensors.indices(leaf)], leaf.shape)
          for leaf in stage.leaves.values()}


def batch(domain=None):
  """The beginning of the corpus."""
  words, rows = vocabularies.load(VOCABULARY), []
  for file in ('zh', 'en'):
    with open(f'tasks/corpus/{file}.txt', encoding='utf-8') as lines:
      rows += [words.encode(next(lines)) for _ in range(2)]
  tokens = {stack: np.array([row[:length] for row in rows], np.int32) for stack, length in (('encoder', 16), ('decoder', 10))}
  given = {f'{stack}_input_tokens': value for stack, value in tokens.items()}
  given |= {f'{stack}_segment_ids': np.ones_like(value) for stack, value in tokens.items()}
  return given if domain is None else given | {'domain': np.full(len(rows), domain, np.int32)}


def logits(model, params, domain=None):
  return np.asarray(jax.jit(encoder_decoder.build(model).apply)(trees.nested(params), batch(domain))[0])


@functools.cache
def of_source(source):
  return logits(run_directory.read_run(source).config.model, trees.named(arrays.load_params(source)))


def assert_same(found, expected):
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_growths_compose(make):
  """Shared layers get their own parameters, then there are more layers, wider ones, and experts: one function all along."""
  source = make(share_layers=True)
  stage = plan(source, 'unshare_layers', "InheritConfig.growth=('unshare_layers', 'deepen', 'widen', 'experts')",
               'ModelConfig.num_encoder_layers=2', 'ModelConfig.num_decoder_layers=4', 'ModelConfig.d_ff=40',
               'ModelConfig.num_heads=3', "InheritConfig.deepen='interleave'", 'MoEConfig.num_experts=2',
               "MoEConfig.router='random_projection'", 'MoEConfig.decoder_every=2')
  assert len(stage.kept) == 4 and all('function is that of the source' in sentence for sentence in stage.kept), stage.kept
  params = params_of(stage)
  assert params['experts/decoder/wo'].shape == (2, 2, 40, 16) and params['decoder/relative_bias/table'].shape == (32, 3)
  assert_same(logits(stage.model, params), of_source(source))


EXPERTS = 'ModelConfig.d_ff=6', 'MoEConfig.num_experts=8'
MORE_LAYERS = 'ModelConfig.num_encoder_layers=3', 'ModelConfig.num_decoder_layers=4'
HEADS, UNITS = 'ModelConfig.num_heads=5', 'ModelConfig.d_ff=56'


@pytest.mark.slow
@pytest.mark.parametrize('fields, name, flags, exact', [
    ({'share_layers': True, 'moe': PROTOTYPES}, 'unshare_layers', (), True),
    ({}, 'deepen', MORE_LAYERS, True),
    ({'moe': PROTOTYPES}, 'deepen', ("InheritConfig.deepen='interleave'", 'ModelConfig.num_decoder_layers=6'), True),
    ({}, 'deepen', ("InheritConfig.new_layers='copy'", *MORE_LAYERS), False),
    ({}, 'widen', (HEADS, UNITS, 'InheritConfig.widen_noise=0.0'), True),
    ({}, 'widen', (HEADS,), True),
    ({}, 'widen', (UNITS, 'InheritConfig.widen_noise=0.1'), False),
    ({'share_layers': True}, 'fine_grained_experts', (*EXPERTS, "MoEConfig.decoder_router='loss_free'"), True),
    ({}, 'fine_grained_experts', ('ModelConfig.d_ff=12', 'MoEConfig.num_experts=6', "MoEConfig.router='top_2'",
                                  "MoEConfig.second_policy='all'"), True),
    ({}, 'fine_grained_experts', (*EXPERTS, 'MoEConfig.renormalise=False'), False),
    ({}, 'experts', ('MoEConfig.num_experts=4', 'InheritConfig.expert_reinit=0.25'), False)])
def test_it_keeps_what_it_says(make, fields, name, flags, exact):
  source = make(**fields)
  stage = plan(source, name, *flags)
  assert ('function is that of the source' in stage.kept[-1]) == exact, stage.kept
  found, expected = logits(stage.model, params_of(stage)), of_source(source)
  if exact:
    assert_same(found, expected)
  else:
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()


def test_parts_of_a_network_are_chosen_together(make):
  """Four small experts have the columns of a network among them, four times its output, and one score."""
  source = make()
  params, old = params_of(plan(source, 'fine_grained_experts', *EXPERTS)), trees.named(arrays.load_params(source))
  np.testing.assert_array_equal(np.concatenate(list(params['experts/decoder/wi_1'][1, 4:]), -1), old['experts/decoder/wi_1'][1])
  np.testing.assert_array_equal(np.concatenate(list(params['experts/decoder/wo'][1, :4]), 0), 4 * old['experts/decoder/wo'][1])
  scores = params['decoder/routers/kernel'].reshape(2, 16, 2, 4)
  assert (scores == scores[..., :1]).all() and (scores[..., 0, 0] != scores[..., 1, 0]).all()


@pytest.mark.parametrize('order, origins, added', [
    ('stack', [0, 1, 0, 1, 0], [2, 3, 4]), ('interleave', [0, 0, 0, 1, 1], [1, 2, 4])])
def test_new_layers_stand_where_the_order_says(make, order, origins, added):
  source = make()
  stage = plan(source, 'deepen', 'ModelConfig.num_decoder_layers=5', f"InheritConfig.deepen='{order}'")
  params, old = params_of(stage), trees.named(arrays.load_params(source))
  for name in ('decoder/layers/cross_attention/query', 'decoder/layers/mlp_norm/scale', 'experts/decoder/wi_0'):
    np.testing.assert_array_equal(params[name], np.asarray(old[name])[origins])
  for name in ('decoder/layers/attention/output', 'decoder/layers/cross_attention/output', 'experts/decoder/wo'):
    expected = np.asarray(old[name])[origins]
    expected[added] = 0
    np.testing.assert_array_equal(params[name], expected)
  np.testing.assert_array_equal(params['encoder/layers/attention/output'], old['encoder/layers/attention/output'])


def test_noise_is_on_copies_alone(make):
  source = make()
  stage = plan(source, 'widen', HEADS, UNITS, 'InheritConfig.widen_noise=0.1')
  params, old = params_of(stage), trees.named(arrays.load_params(source))
  for name, width in (('experts/decoder/wi_0', 24), ('decoder/layers/attention/key', 16)):
    np.testing.assert_array_equal(params[name][..., :width], old[name])
    copies = np.resize(np.arange(width), params[name].shape[-1])[width:]
    noise = params[name][..., width:] - np.asarray(old[name])[..., copies]
    assert noise.std() == pytest.approx(0.1 * float(np.std(old[name])), rel=0.2)
  assert not params['decoder/layers/attention/output'][:, 16:].any()


def test_some_hidden_units_are_drawn_anew(make):
  """The same ones in all matrices of an expert, others in each expert, with the mean and deviation of what was there."""
  source = make()
  stage = plan(source, 'experts', 'MoEConfig.num_experts=4', 'InheritConfig.expert_reinit=0.5')
  params, old = params_of(stage), trees.named(arrays.load_params(source))
  changed = {}
  for name, axis in (('wi_0', -2), ('wi_1', -2), ('wo', -1)):
    before, now = np.asarray(old[f'experts/decoder/{name}'])[:, None], params[f'experts/decoder/{name}']
    changed[name] = (before != now).all(axis=axis)  # [L, E, F]
    assert ((before != now).any(axis=axis) == changed[name]).all() and (changed[name].sum(-1) == 12).all()
    assert now.std() == pytest.approx(before.std(), rel=0.1)
  assert (changed['wi_0'] == changed['wi_1']).all() and (changed['wi_0'] == changed['wo']).all()
  assert (changed['wo'][0, 0] != changed['wo'][0, 1]).any()


@pytest.mark.parametrize('moe, count, flags, keep', [
    (DOMAINS, 2, ('InheritConfig.keep_experts=(3, 1)',), [3, 1]), (PROTOTYPES, 2, (), [0, 2]),
    (MoEConfig(num_experts=4, router='loss_free'), 3, (), [0, 1, 2])])
def test_experts_that_are_kept_stay_as_they_are(make, moe, count, flags, keep):
  source = make(moe=moe)
  stage = plan(source, 'prune_experts', f'MoEConfig.num_experts={count}', *flags)
  params, old = params_of(stage), {name: np.asarray(x) for name, x in trees.named(arrays.load_params(source)).items()}
  for name, value in params.items():
    if name.startswith('experts/') and value.ndim == 4:
      np.testing.assert_array_equal(value, old[name][:, keep])
    else:
      np.testing.assert_array_equal(value, old[name][..., keep] if '/routers/' in name else old[name])


@pytest.mark.slow
def test_the_domains_of_experts_that_are_kept_stay_what_they_were(make):
  source = make(moe=DOMAINS)
  stage = plan(source, 'prune_experts', 'MoEConfig.num_experts=2', 'InheritConfig.keep_experts=(3, 1)')
  assert 'The domains 3, 1 are now 0 to 1' in stage.kept[-1]
  expected = logits(run_directory.read_run(source).config.model, trees.named(arrays.load_params(source)), 3)
  assert_same(logits(stage.model, params_of(stage), 0), expected)


def test_the_mean_of_checkpoints(make):
  """Of a run, by their steps: the mean of each parameter, and of equal ones what each of them is."""
  source = make(steps=(3, 5, 8))
  stage = plan([f'{source}@3', f'{source}@5', source], 'average')
  three = [trees.named(arrays.load_params(source, step=step)) for step in (3, 5, 8)]
  for name, value in params_of(stage).items():
    np.testing.assert_allclose(value, np.mean([one[name] for one in three], axis=0), atol=1e-6)
  for name, value in params_of(plan([f'{source}@5'] * 3, 'average')).items():
    np.testing.assert_array_equal(value, three[1][name])
  assert set(stage.told.values()) == {'the mean of 3'}


def with_network(params, other):
  """A model whose feed-forward networks are those of another one."""
  return params | {name: value for name, value in other.items() if name.startswith('experts/')}


TWO_DOMAINS = 'MoEConfig.num_experts=2', "MoEConfig.router='domain'"


def test_several_models_become_experts(make):
  source = make(steps=(3, 5))
  stage = plan([f'{source}@3', f'{source}@5'], 'merge_models_into_experts', *TWO_DOMAINS)
  a, b = (trees.named(arrays.load_params(source, step=step)) for step in (3, 5))
  params = params_of(stage)
  for number, one in enumerate((a, b)):
    np.testing.assert_array_equal(params['experts/encoder/wo'][:, number], one['experts/encoder/wo'])
  np.testing.assert_allclose(params['lm_head'], (a['lm_head'] + b['lm_head']) / 2, atol=1e-6)
  assert 'a row of the domain of a source' in stage.kept[0] and stage.told['lm_head'] == 'the mean of 2'


@pytest.mark.slow
def test_by_their_domains_models_that_differ_in_networks_alone_stay_what_they_were(make):
  source = make(steps=(3, 5))
  stage = plan([f'{source}@3', f'{source}@5'], 'merge_models_into_experts', *TWO_DOMAINS)
  a, b = (trees.named(arrays.load_params(source, step=step)) for step in (3, 5))
  b, one = with_network(a, b), sources.find(source).stage
  first, second = (dataclasses.replace(one, read=lambda leaf, index, values=values: np.asarray(values[leaf.name][index]))
                   for values in (a, b))
  config = dataclasses.replace(Config(), model=stage.model)
  merged = inherit.GROWTH['merge_models_into_experts'](dataclasses.replace(first, others=(second,)), config, first.words)
  params = params_of(merged)
  for domain, values in enumerate((a, b)):
    assert_same(logits(stage.model, params, domain), logits(one.model, values))


@pytest.mark.parametrize('fields, name, flags, message', [
    ({}, 'unshare_layers', (), 'has its own parameters already'),
    ({'share_layers': True}, 'unshare_layers', ('ModelConfig.share_layers=True',), 'ModelConfig.share_layers: False is made'),
    ({}, 'deepen', (), 'say how many layers'),
    ({}, 'deepen', ('ModelConfig.num_decoder_layers=1',), 'ModelConfig.num_decoder_layers = 1: the source has 2'),
    ({'share_layers': True}, 'deepen', MORE_LAYERS, "put 'unshare_layers' before it"),
    ({'moe': PROTOTYPES}, 'deepen', ('ModelConfig.num_decoder_layers=3',), 'does not divide ModelConfig.num_decoder_layers'),
    ({}, 'widen', (), 'd_ff and num_heads are those of the source'),
    ({}, 'widen', ('ModelConfig.num_heads=1',), 'ModelConfig.num_heads = 1: the source has 2'),
    ({}, 'widen', (UNITS, 'ModelConfig.head_dim=16'), 'does not make the model that is described: ModelConfig.head_dim'),
    ({}, 'experts', ('ModelConfig.d_ff=7',), 'expected a divisor of 24'),
    ({}, 'experts', ('ModelConfig.d_ff=6', 'MoEConfig.num_experts=6'), 'expected a multiple of 4'),
    ({}, 'experts', ('ModelConfig.d_ff=6', 'MoEConfig.decoder_every=2'), 'decoder_every to 1'),
    ({}, 'prune_experts', (), 'the source has no experts'),
    ({'moe': DOMAINS}, 'prune_experts', (), 'expected fewer, and at least 2'),
    ({'moe': DOMAINS}, 'prune_experts', ('MoEConfig.num_experts=2', 'InheritConfig.keep_experts=(1,)'), 'expected as many'),
    ({'moe': DOMAINS}, 'prune_experts', ('MoEConfig.num_experts=2', 'InheritConfig.keep_experts=(1, 4)'), 'are 0 to 3'),
    ({'moe': PROTOTYPES}, 'prune_experts', ('MoEConfig.num_experts=2', 'InheritConfig.keep_experts=(0, 1)'),
     'expected 1 of the first group'),
    ({'moe': DOMAINS}, 'prune_experts', ('MoEConfig.num_experts=2', 'InheritConfig.keep_experts=(1, 1)'), 'different numbers'),
    ({}, 'average', (), 'needs --source=DIR two times or more'),
    ({}, 'average', ("InheritConfig.growth=('widen', 'average')",), 'comes first'),
    ({}, 'widen', (UNITS, 'InheritConfig.expert_reinit=0.5'), 'InheritConfig.expert_reinit = 0.5 is read by growth'),
    ({}, 'deepen', ("InheritConfig.deepen='top'",), "expected one of 'stack', 'interleave'")])
def test_what_does_not_fit_is_refused(make, fields, name, flags, message):
  with pytest.raises(ConfigError, match='.') as error:
    plan(make(**fields), name, *flags)
  assert message in str(error.value) and '\n' not in str(error.value), error.value


def test_sources_that_do_not_fit_each_other_are_refused(make):
  source = make(steps=(3, 5))
  for given, name, flags, message in (
      ([source, make(share_layers=True)], 'average', (), 'ModelConfig.share_layers: False in the first, True in this one'),
      ([source, f'{source}@4'], 'average', (), 'No checkpoint of step 4'),
      ([source, source], 'widen', (UNITS,), '--source is given 2 times'),
      ([f'{source}@3', source], 'merge_models_into_experts', ('MoEConfig.num_experts=3',), 'of which there are 2')):
    with pytest.raises(ConfigError) as error:
      plan(given, name, *flags)
    assert message in str(error.value) and '\n' not in str(error.value), error.value
  projected = make(steps=(3, 5), moe=MoEConfig(num_experts=2, router='random_projection'))
  with pytest.raises(ConfigError, match='r/routers/centroids is drawn once and never trained'):
    plan([f'{projected}@3', projected], 'average')


@pytest.mark.slow
def test_the_first_step_of_a_grown_model_has_the_loss_of_its_source(make, tmp_path, capsys):
  """By the commands: a model with shared layers, and what `inherit` makes of it, trained on the same batch."""
  source = make(share_layers=True)
  command = ['inherit', f'--source={source}@1', f'--model_dir={tmp_path / "new"}',
             '--gin_file=gin/runs/inherit_unshare_layers.gin']
  assert main([*command, '--dry_run']) == 0
  told = capsys.readouterr().out
  assert 'GiB of disk' in told and 'the state of the optimizer begins anew' in told and not (tmp_path / 'new').exists()
  assert main(command) == 0
  fields = {'TaskConfig.name': 'local', 'LocalTaskConfig.files': 'tasks/corpus/zh.txt', 'TaskConfig.encoder_length': 32,
            'TaskConfig.decoder_length': 16, 'TaskConfig.cache_dir': tmp_path, 'TrainConfig.batch_size': 4,
            'TrainConfig.steps': 1, 'TrainConfig.eval_every': 0, 'MetricsConfig.every': 1, 'MetricsConfig.tensorboard': False}
  losses = []
  for number, start in enumerate((source, tmp_path / 'new')):
    run = tmp_path / f'run{number}'
    assert main(['train', f'--init_from={start}', '--gin_file=gin/runs/pretrain.gin', f'--model_dir={run}',
                 *(f'--gin.{name}={value}' for name, value in fields.items())]) == 0
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    losses.append(next(record['loss'] for record in records if record['split'] == 'train'))
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)
