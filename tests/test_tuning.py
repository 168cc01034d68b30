"""A delta on a frozen base: what it computes against plain references, what is kept, and what is refused."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import small_model
import small_run
import test_step
from jax.extend.core import jaxprs_in_params

from t5x_cpm import inference, trees, tuning
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import digests, export, run_directory
from t5x_cpm.config import CheckpointConfig, Config, ConfigError, DeltaConfig, LocalTaskConfig, MeshConfig, MoEConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import PRODUCTS
from t5x_cpm.training import step
from t5x_cpm.training import train as training

ROOT = pathlib.Path(__file__).resolve().parent.parent
LORA = DeltaConfig(
    method='lora', base='base', rank=3, alpha=6.0, sites=('self', 'query', r'decoder\..*value', 'mlp.wi_0', 'wo'))
EXPERTS = MoEConfig(num_experts=4, encoder_every=2, decoder_every=2, shared_experts=1, dispatch='dropless', router='top_k')


def with_delta(config=test_step.CONFIG, delta=LORA, moe=None, **model) -> Config:
  model = dataclasses.replace(config.model, **model)
  if moe:
    model = dataclasses.replace(model, moe=moe)
  return dataclasses.replace(config, model=model, delta=delta)


def drawn(params, seed=0):
  """Parameters whose delta is no longer an identity."""
  print(f'seed {seed}')
  rng = np.random.default_rng(seed)
  changed = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params['delta'])
  return params | {'delta': changed}


def merged(params, config):
  """The plain reference: every matrix with its product of two small ones added."""
  flat, scale = dict(trees.named(params)), config.delta.alpha / config.delta.rank
  paths = {site: path for sites in PRODUCTS.values() for site, path in sites.items()}
  for name in [name for name in flat if name.startswith('delta/') and name.endswith('/lora/a')]:
    base, site = name.removeprefix('delta/').removesuffix('/lora/a').rsplit('/', 1)
    a, b = flat[name][:, 0], flat[name.removesuffix('a') + 'b'][:, 0]
    kernel = f'{base}/{paths[site]}'
    flat[kernel] = flat[kernel] + scale * jnp.einsum('LIr,LrO->LIO', a, b)
  return trees.nested({name: leaf for name, leaf in flat.items() if not name.startswith('delta/')})


SLOW = pytest.mark.slow


@pytest.mark.parametrize('options', [
    {}, pytest.param({'layer_loop': 'unroll', 'remat': 'full'}, marks=SLOW), pytest.param({'moe': EXPERTS}, marks=SLOW)],
    ids=['scan', 'unroll', 'experts'])
def test_lora_is_nothing_at_first_and_then_equals_merged_weights(options):
  config = with_delta(**options)
  model, plain = tuning.build_model(config), encoder_decoder.build(config.model)
  params = jax.jit(model.init)(jax.random.key(0))
  base = {name: tree for name, tree in params.items() if name != 'delta'}
  jax.tree.map(np.testing.assert_array_equal, base, jax.jit(plain.init)(jax.random.key(0)))
  assert len(jax.tree.leaves(params['delta'])) > 8
  batch = test_step.random_batch(config, 0)
  logits = jax.jit(lambda model, params: model.apply(params, batch)[0], static_argnums=0)
  np.testing.assert_array_equal(logits(model, params), logits(plain, base))

  changed = drawn(params)
  found, expected = logits(model, changed), logits(plain, merged(changed, config))
  assert np.abs(found - logits(plain, base)).max() > 0.1
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('loop', ['scan', pytest.param('unroll', marks=SLOW)])
def test_decoding_by_steps_equals_teacher_forcing(loop):
  config = with_delta(delta=dataclasses.replace(LORA, sites=('.*',)), layer_loop=loop)
  model, T = tuning.build_model(config), config.task.decoder_length
  params, batch = drawn(jax.jit(model.init)(jax.random.key(0))), test_step.random_batch(config, 1)
  expected = jax.jit(model.apply)(params, batch)[0]
  prepared, tokens = model.prepare(params), batch['decoder_input_tokens']
  cache = jax.jit(model.start, static_argnums=2)(prepared, batch, T)
  positions, forward = np.broadcast_to(np.arange(T), tokens.shape), jax.jit(model.step)
  for begin, end in ((0, 1), (1, T)):
    logits, cache = forward(prepared, cache, tokens[:, begin:end], positions[:, begin:end])
    np.testing.assert_allclose(logits, expected[:, begin:end], atol=1e-4)


def test_without_a_delta_a_hook_is_nothing():
  class Idle(tuning.methods.Delta):
    def weights(self, site):
      return {}

  models = (encoder_decoder.build(test_step.CONFIG.model),
            encoder_decoder.build(test_step.CONFIG.model, delta=Idle(LORA, test_step.CONFIG.model)))
  batch = test_step.random_batch(test_step.CONFIG, 0)
  traced = [str(jax.make_jaxpr(model.apply)(model.abstract()[0], batch)) for model in models]
  assert re.sub('0x[0-9a-f]+', '', traced[0]) == re.sub('0x[0-9a-f]+', '', traced[1])


def frozen_step(config, mesh=MeshConfig(data=1)):  # noqa: B008
  built = step.build(dataclasses.replace(config, mesh=mesh), mesh_lib.make_mesh(mesh, jax.devices()[:1]))
  params = jax.jit(built.model.init)(jax.random.key(7))
  base = jax.tree.map(lambda x, like: x.astype(like.dtype), {n: t for n, t in params.items() if n != 'delta'},
                      built.abstract_frozen['base'])
  return built, {'base': base}


@pytest.mark.parametrize('base_dtype, microbatches', [pytest.param('float32', 1, marks=SLOW), ('bfloat16', 2)])
def test_the_delta_alone_is_trained(base_dtype, microbatches):
  config = with_delta(delta=dataclasses.replace(LORA, base_dtype=base_dtype))
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=microbatches))
  built, frozen = frozen_step(config)
  kept = jax.device_get(frozen)
  state, batch, losses = built.init(jax.random.key(0), frozen), test_step.random_batch(config, 0), []
  assert set(state['params']) == {'delta'} and {leaf.dtype.name for leaf in jax.tree.leaves(state['params'])} == {'float32'}
  for _ in range(100):
    state, metrics = built.fn(state, frozen, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.8 * losses[0]
  for leaf, was in zip(jax.tree.leaves(frozen), jax.tree.leaves(kept), strict=True):
    assert leaf.dtype == was.dtype and np.asarray(leaf).tobytes() == was.tobytes()
  assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {base_dtype}


def test_no_gradient_of_the_base_is_computed():
  """Of three products of equal cost, forward and two backward, one is left out: that of the gradient of the weights."""
  flops = []
  for delta in (DeltaConfig(), DeltaConfig(method='lora', base='b', rank=1, sites=('encoder.self.query',))):
    config = with_delta(delta=delta, d_ff=512, layer_loop='unroll')
    mesh = mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    built = step.build(config, mesh)
    compiled = built.fn.lower(built.abstract_state, built.abstract_frozen, built.abstract_batch).compile()
    flops.append(compiled.cost_analysis()['flops'])
  print(f'{flops[1] / flops[0]:.3f} of the arithmetic of training all')
  assert flops[1] < 0.72 * flops[0]


def loops(jaxpr):
  """The scans of a program, and of those that it calls."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'scan':
      yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from loops(inner)


@pytest.mark.parametrize('remat', ['full', 'none'])
def test_no_copy_of_the_weights_is_kept_for_the_backward_pass(remat):
  """The loop over layers gives back what the backward pass reads: activations, but no weights, which lie there anyway."""
  config = with_delta(layer_loop='scan', remat=remat, d_ff=40)
  built = step.build(config, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  traced = built.fn.trace(built.abstract_state, built.abstract_frozen, built.abstract_batch)
  kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(built.abstract_frozen['base']) if len(leaf.shape) == 3}
  assert (config.model.d_model, 40) in kernels
  kept = {tuple(out.aval.shape) for one in loops(traced.jaxpr.jaxpr) for out in one.outvars}
  assert len(kept) > 4 and not {shape for shape in kept if shape[-2:] in kernels}


@pytest.fixture(scope='module')
def base_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tuning')
  config = small_data.make_config(folder)
  vocabulary = small_data.vocabularies.load(config.task.vocabulary)
  return small_model.model_dir(folder, vocabulary, steps=(3, 5), objective='pairs')


def tuned(base_dir, delta=LORA, steps=4, **fields) -> Config:
  """A run that tunes on pairs."""
  pairs = base_dir.parent / 'pairs.jsonl'
  pairs.write_text(''.join(json.dumps({'inputs': chr(0x4E00 + i), 'targets': chr(0x4E00 + i) * 2}) + '\n' for i in range(40)))
  run = run_directory.read_run(base_dir).config
  return dataclasses.replace(
      run, task=dataclasses.replace(run.task, name='local', cache_dir=str(base_dir.parent)),
      local_task=LocalTaskConfig(files=str(pairs), validation_fraction=0.2),
      train=dataclasses.replace(run.train, batch_size=4, steps=steps), mesh=MeshConfig(data=1, cpu_devices=1),
      checkpoint=CheckpointConfig(every=2), delta=dataclasses.replace(delta, base=str(base_dir)), **fields)


def weights(model_dir):
  return {name: text for name, text in run_directory.read_meta(run_directory.resolve(model_dir), 4)['arrays'].items()
          if name.startswith('params/')}


@pytest.fixture(scope='module')
def whole(base_dir, tmp_path_factory):
  """A run of a delta, and what it said."""
  path, said = tmp_path_factory.mktemp('whole') / 'run', io.StringIO()
  before = {file: file.read_bytes() for file in base_dir.rglob('*') if file.is_file()}
  with contextlib.redirect_stdout(said):
    training.run(tuned(base_dir), str(path))
  assert before == {file: file.read_bytes() for file in base_dir.rglob('*') if file.is_file()}
  return path, said.getvalue()


def test_a_run_of_a_delta(base_dir, whole):
  path, told = whole
  config = tuned(base_dir)
  built = step.build(config, mesh_lib.make_mesh(config.mesh, jax.devices()[:1]))
  count = sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state['params']))
  assert f'{count:,} parameters are trained' in told and 'at step 5' in told
  assert all(name.startswith('params/delta/') for name in weights(path))

  saved = tuning.read(path)
  assert saved.about['step'] == 4 and saved.about['base']['step'] == 5 and saved.config.rank == 3
  assert sorted(file.name for file in (path / 'delta').iterdir()) == ['delta.json', 'weights-4.safetensors']
  again = digests.of_tree({name: value[:, None] for name, value in saved.tensors.items()})
  assert again == {name.removeprefix('params/delta/'): text for name, text in weights(path).items()}

  # It scores as its base with merged weights would.
  engine = inference.load(path)
  base = tuning.load(tuning.find(base_dir), {n: t for n, t in built.model.abstract()[0].items() if n != 'delta'})
  delta = trees.nested({name: jnp.asarray(value)[:, None] for name, value in saved.tensors.items()})
  plain = inference.load(base_dir)
  plain.program.params = plain.program.functions.prepare(merged(base | {'delta': delta}, config))
  texts = ['一', '二三']
  np.testing.assert_allclose(engine.score(texts, texts), plain.score(texts, texts), rtol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(base_dir, whole, tmp_path):
  run = tmp_path / 'run'
  training.run(tuned(base_dir, steps=2), str(run))
  training.run(tuned(base_dir), str(run))
  assert weights(whole[0]) == weights(run)
  shutil.rmtree(run / 'delta')  # as if the run had been killed before it was written
  training.run(tuned(base_dir), str(run))
  assert tuning.read(run).about['weights_digest'] == tuning.read(whole[0]).about['weights_digest']


def test_a_delta_belongs_to_its_base(base_dir, whole, tmp_path, capsys):
  # Of a base that has trained on, or moved, the same weights are found; of another one they are not.
  run, other = whole[0], tmp_path / 'moved'
  shutil.copytree(base_dir, other)
  assert tuning.find(other, tuning.read(run).about['base']['fingerprint']).step == 5
  moved = dataclasses.replace(inference_config(run), delta=dataclasses.replace(LORA, base=str(other)))
  assert inference.load(run, config=moved).config.delta.base == str(other)
  shutil.rmtree(other / 'checkpoints' / '5')
  with pytest.raises(ConfigError, match='was trained on a base with the fingerprint'):
    inference.load(run, config=moved)
  allowed = dataclasses.replace(moved, delta=dataclasses.replace(moved.delta, allow_other_base=True))
  inference.load(run, config=allowed)
  prints = [tuning.find(folder).fingerprint for folder in (base_dir, other)]
  assert re.search(f'{prints[0]}.*{prints[1]} at step 3: it is used all the same', capsys.readouterr().err)
  with pytest.raises(ConfigError, match='another vocabulary .* --allow_other_base does not allow'):
    tuning.find(other, prints[0], allow_other=True, vocabulary='f00d')
  with pytest.raises(ConfigError, match='give --base=DIR'):
    training.run(dataclasses.replace(tuned(base_dir), delta=dataclasses.replace(LORA, base='')), str(tmp_path / 'twice'))
  source = dataclasses.replace(tuned(base_dir).train, init_from=str(run))
  started = dataclasses.replace(tuned(base_dir), train=source, delta=DeltaConfig())
  twice = str(tmp_path / 'twice')
  for use in (lambda: training.run(tuned(run), twice), lambda: training.run(started, twice),
              lambda: export.to_huggingface(run, twice)):
    with pytest.raises(ConfigError, match='holds no model, but a delta'):
      use()
  assert not (tmp_path / 'twice').exists()


def inference_config(model_dir):
  return dataclasses.replace(run_directory.read_run(model_dir).config, mesh=MeshConfig())


@pytest.mark.parametrize('fields, message', [
    ({'method': 'lara'}, 'Did you mean lora'), ({'method': 'lora+lora'}, 'several different ones'), ({'method': '+'}, 'joined'),
({'method': ''}, 'DeltaConfig.method'), ({'sites': ('quary',)}, 'Did you mean query'),
    ({'sites': ('(',)}, 'regular expression'), ({'rank': 9}, 'at most 8'), ({'rank': 0}, 'at least 1'),
    ({'base_dtype': 'int8'}, "'bfloat16'")])
def test_what_cannot_work_is_refused(fields, message):
  config = with_delta(delta=dataclasses.replace(LORA, **{'sites': ('cross.query', 'mlp.wo')} | fields),
                      head_dim=4)
  with pytest.raises(ConfigError, match=re.escape(message)):
    config.validate()
    tuning.build_model(config)


def test_a_method_of_ones_own(base_dir):
  def make(config):
    return tuning.Method(
        lambda site: {'scale': Weight((site.sizes[1],), (site.axes[1],), lambda key, shape: jnp.ones(shape))}
        if site.name == 'self' else {},
        lambda weights, x, y: y * weights['scale'][:, None].astype(y.dtype))

  tuning.register('scaled', make)
  try:
    config = with_delta(delta=DeltaConfig(method='lora+scaled', base='b'))
    model = tuning.build_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    named = [name for name in trees.named(params) if name.endswith('/scaled/scale')]
    assert named == ['delta/decoder/layers/self/scaled/scale', 'delta/encoder/layers/self/scaled/scale']
    batch = test_step.random_batch(config, 0)
    plain = encoder_decoder.build(config.model).apply({n: t for n, t in params.items() if n != 'delta'}, batch)[0]
    np.testing.assert_array_equal(model.apply(params, batch)[0], plain)
    assert np.abs(model.apply(drawn(params), batch)[0] - plain).max() > 0.01
    with pytest.raises(ConfigError, match='that is not'):
      tuning.register('scaled', make)
  finally:
    del tuning.METHODS['scaled']


def test_files_that_were_changed_are_refused(whole, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(whole[0] / 'delta', run / 'delta')
  files = {file: file.read_bytes() for file in (run / 'delta').iterdir()}
  print('seed 0')
  rng = np.random.default_rng(0)
  for file, raw in files.items():
    for number in range(30):
      place = int(rng.integers(len(raw)))
      flipped = bytearray(raw)
      flipped[place] ^= 1 << int(rng.integers(8))
      for changed in (bytes(flipped), raw[:place], raw + b'x'):
        file.write_bytes(changed)
        if changed.strip() == raw.strip():
          continue
        with pytest.raises(ConfigError) as error:
          tuning.read(run)
        assert str(pathlib.Path(run)) in str(error.value) and '\n' not in str(error.value), number
      file.write_bytes(raw)
    file.unlink()
    with pytest.raises(ConfigError):
      tuning.read(run)
    file.write_bytes(raw)
  assert tuning.read(run).about['step'] == 4


MESHES = """
import dataclasses, sys
sys.path.insert(0, 'tests')
import jax, numpy as np
import test_prompt, test_step, test_tuning
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import MeshConfig
from t5x_cpm.training import step

delta = dataclasses.replace(test_tuning.LORA, method='prompt+lora+prefix', prompt_length=5, prefix_length=3, lora_dropout=0.1,
                            token_ids=(3, 5), modules_to_save=('final_norm', 'lm_head'), sites=('experts', 'query'))
config = test_tuning.with_delta(delta=delta, dropout_rate=0.1, moe=test_tuning.EXPERTS)
batch = test_prompt.with_prompt(test_step.random_batch(config, 0), config.model.vocab_size)
wanted = None
for sizes, sharding in (((1, 1, 1), 'none'), ((2, 2, 2), 'full')):
  mesh_config = MeshConfig(data=sizes[0], model=sizes[1], expert=sizes[2], sharding=sharding)
  mesh = mesh_lib.make_mesh(mesh_config, jax.devices()[:sizes[0] * sizes[1] * sizes[2]])
  built = step.build(dataclasses.replace(config, mesh=mesh_config), mesh)
  base = {name: tree for name, tree in jax.jit(built.model.init)(jax.random.key(7)).items() if name != 'delta'}
  frozen = {'base': jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), base,
                                 built.abstract_frozen['base'])}
  state, losses = built.init(jax.random.key(0), frozen), []
  for _ in range(2):
    state, metrics = built.fn(state, frozen, batch)
    losses.append(float(metrics['loss']))
  found = losses, jax.device_get(state['params'])
  wanted = wanted or found
  np.testing.assert_allclose(losses, wanted[0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[1], wanted[1])
  print('ok', sizes, losses, flush=True)
"""


@pytest.mark.slow
def test_every_mesh_trains_the_same_delta():
  done = small_run.python(MESHES, XLA_FLAGS='--xla_force_host_platform_device_count=8')
  print(done.stdout)
  assert done.stdout.count('ok') == 2, done.stderr[-3000:]
