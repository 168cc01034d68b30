"""Checkpoints: bit for bit, in parts, on any mesh, and intact whatever happens during a save."""

import concurrent.futures
import os
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import INFO, abstract, assert_same, config, python, saved, small_state, tmpfs

from t5x_cpm import mesh as mesh_lib
from t5x_cpm.checkpoints import arrays
from t5x_cpm.checkpoints.arrays import load_params
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.checkpoints.run_directory import CheckpointError, read_run
from t5x_cpm.config import Config, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TaskConfig, TrainConfig
from t5x_cpm.training import step


def test_restores_bit_for_bit(tmp_path):
  states = {step: small_state(step) for step in (1, 2)}
  with Manager(tmp_path / 'run', config(), info=INFO) as manager:
    assert manager.latest_step() is None
    for step, state in states.items():
      manager.save(step, state)
    manager.save(2, small_state(9))  # a second save of one step, as after SIGTERM, changes nothing
    manager.wait()
    assert manager.latest_step() == 2
    assert_same(manager.restore(abstract(states[2])), states[2])
    assert_same(manager.restore(abstract(states[1]), 1), states[1])
    with pytest.raises(CheckpointError, match='No checkpoint of step 7 in .*: it has 1, 2'):
      manager.restore(abstract(states[1]), 7)


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  step = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
  state = {'params': {'w': jnp.zeros((64, 1024, 64))}}  # 16 MiB: still being written when the next steps run
  with Manager(tmp_path, config(), info={}) as manager:
    for number in (1, 2):
      manager.save(number, state)
      for _ in range(3):
        state = step(state)
    shape = {'params': {'w': jax.ShapeDtypeStruct((64, 1024, 64), jnp.float32, sharding=state['params']['w'].sharding)}}
    manager.wait()
    assert (manager.restore(shape, 1)['params']['w'] == 0).all()
    assert (manager.restore(shape, 2)['params']['w'] == 3).all()


def test_relative_model_dir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Manager('a/run', config(), info=INFO) as manager:
    monkeypatch.chdir('/')
    manager.save(1, small_state(1))
  assert read_run(tmp_path / 'a' / 'run').steps == [1]


def test_keeps_the_newest_and_the_best(tmp_path):
  metrics = {step: {'eval/loss': loss} for step, loss in {1: 3.0, 2: 1.0, 4: 2.0, 6: 5.0}.items()}
  cfg = config(keep=2, keep_best=1)
  assert saved(tmp_path / 'a', (1, 2, 3, 4), cfg, metrics) == [2, 3, 4]
  assert saved(tmp_path / 'a', (5, 6), cfg, metrics) == [2, 5, 6]  # the metric of a checkpoint survives a restart
  assert saved(tmp_path / 'b', (1, 2, 4, 6), config(keep=1, keep_best=1, best_mode='max'), metrics) == [6]
  assert saved(tmp_path / 'c', (1, 2, 3), config(keep=0)) == [1, 2, 3]
  assert not list((tmp_path / 'a' / 'checkpoints').glob('.deleted/*'))


def test_two_runs_in_one_directory(tmp_path):
  with Manager(tmp_path, config(), info=INFO) as manager:
    with pytest.raises(CheckpointError, match=f'is in use: process {os.getpid()} on .* trains there'):
      Manager(tmp_path, config(), info=INFO)
    manager.save(1, small_state(1))
  with Manager(tmp_path, config(), info=INFO) as manager:
    assert manager.latest_step() == 1


def test_damaged_description_of_a_checkpoint(tmp_path):
  saved(tmp_path, (1, 2), config())
  (tmp_path / 'checkpoints/2/meta/metadata').write_text('')  # as a power cut leaves it
  for read in (read_run, load_params, lambda path: Manager(path, config(), info=INFO)):
    with pytest.raises(CheckpointError, match=r'checkpoints/2 is damaged: meta/metadata: .* to use that of step 1'):
      read(tmp_path)


def test_disk_full_during_a_save(tmp_path, capfd):
  with tmpfs(tmp_path / 'disk', 'size=3m') as path:
    state = {'params': {'w': jax.random.normal(jax.random.key(0), (1024, 512))}}  # 2 MiB that do not compress
    manager = Manager(path, config(), info=INFO)
    manager.save(1, state)
    manager.save(2, state)  # returns before it is written
    with pytest.raises(CheckpointError) as error:
      manager.save(3, state)
    assert 'no space left on the device. Those up to step 1 are intact' in str(error.value)
    assert 'CheckpointConfig.keep' in str(error.value)
    manager.close()
    assert manager.latest_step() == 1
    assert_same(manager.restore(abstract(state)), state)
    assert [p.name for p in (path / 'checkpoints').iterdir()] == ['1']  # what it had written of step 2 is freed
    assert 'Traceback' not in capfd.readouterr().err
    with pytest.raises(CheckpointError, match='no space left'), Manager(path, config(), info=INFO) as manager:
      manager.save(2, state)  # an error after the last save is raised on the way out


def test_half_written_checkpoints_are_ignored(tmp_path, capsys):
  saved(tmp_path, (1, 2))
  root = tmp_path / 'checkpoints'
  (root / '3.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (root / '4' / 'state').mkdir(parents=True)  # a final name without the mark of a finished one
  (root / '.deleted' / '0').mkdir(parents=True)
  assert read_run(tmp_path).step == 2
  assert_same(load_params(tmp_path), small_state(2)['params'])
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1 and said[0].endswith(f'is being written, or was damaged: {root / "4"}')  # only the run itself can tell
  with Manager(tmp_path, config(), info=INFO) as manager:
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines] == [str(root / '3.orbax-checkpoint-tmp'), str(root / '4')]
    assert all('half-written' in line for line in lines)
    assert manager.latest_step() == 2
    manager.save(4, small_state(4))
  assert read_run(tmp_path).steps == [1, 2, 4]
  Manager(tmp_path, config(), info=INFO).close()
  assert not capsys.readouterr().err  # said once
  assert sorted(path.name for path in root.iterdir()) == ['1', '2', '4', 'incomplete-4']


# A read of Orbax that is still under way when another one has failed reports to a closed event loop.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_checkpoint_is_named(tmp_path):
  saved(tmp_path)
  for path in (tmp_path / 'checkpoints' / '1' / 'state').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:10])
  with pytest.raises(CheckpointError, match=r'checkpoints/1 is damaged'):
    load_params(tmp_path)
  time.sleep(0.2)


def test_another_shape_or_dtype_is_named(tmp_path):
  saved(tmp_path)
  manager = Manager(tmp_path, config(), info=INFO)
  message = r'  params/encoder/layers/attention/query: \[3, 4, 4\] in the checkpoint, \[3, 5, 5\] in the model'
  with pytest.raises(CheckpointError, match=message):
    manager.restore(abstract(small_state(size=5)))
  wrong = abstract(small_state())
  wrong['params']['lm_head'] = jax.ShapeDtypeStruct((4, 7), jnp.float32, sharding=wrong['params']['lm_head'].sharding)
  wrong['opt_state']['inner']['nu'] = wrong['step']
  with pytest.raises(CheckpointError) as error:
    manager.restore(wrong)
  assert 'opt_state/inner/nu: not in the checkpoint' in str(error.value)
  assert 'params/lm_head: bfloat16 in the checkpoint, float32 in the model' in str(error.value)
  manager.close()


def test_load_params(tmp_path):
  saved(tmp_path, (1, 2))
  params = small_state(2)['params']
  assert_same(load_params(tmp_path), params)
  assert_same(load_params(tmp_path, step=1), small_state(1)['params'])
  wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
  assert_same(load_params(tmp_path, into=wide), jax.tree.map(lambda x: x.astype(jnp.float32), params))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  assert_same(load_params(tmp_path, shardings=device), params)
  assert_same(load_params(tmp_path, shardings=jax.tree.map(lambda _: device, params)), params)


def test_load_params_with_renames(tmp_path):
  saved(tmp_path)
  params = small_state(1)['params']
  rename = {'encoder': 'stack/deep', 'encoder/layers/mlp_norm': 'norms', 'lm_head': None}
  expected = {
      'token_embedder': params['token_embedder'], 'experts': params['experts'],
      'stack': {'deep': {'layers': {'attention': params['encoder']['layers']['attention']}}},
      'norms': params['encoder']['layers']['mlp_norm']}
  assert_same(load_params(tmp_path, rename=rename), expected)
  assert_same(load_params(tmp_path, rename=rename, into=abstract(expected)), expected)


@pytest.mark.parametrize('rename, change, message', [
    ({}, lambda p: p.pop('lm_head'), r'lm_head: in the checkpoint, but not in the model'),
    ({}, lambda p: p.update(head=p['lm_head']), r'head: not in the checkpoint'),
    ({}, lambda p: p.update(lm_head=jax.ShapeDtypeStruct((4, 9), jnp.float32)),
     r'lm_head: \[4, 7\] in the checkpoint, \[4, 9\] in the model'),
    ({'decoder': 'x'}, lambda p: None, r"no parameter 'decoder'. It has .*lm_head"),
    ({'lm_head': 'token_embedder/embedding'}, lambda p: None, r'two parameters of the checkpoint .* one name')])
def test_load_params_names_what_does_not_fit(tmp_path, rename, change, message):
  saved(tmp_path)
  into = abstract(small_state()['params'])
  change(into)
  with pytest.raises(CheckpointError, match=message):
    load_params(tmp_path, into=into, rename=rename)


def test_one_layer_slice_per_chunk(tmp_path, monkeypatch):
  ts = pytest.importorskip('tensorstore')  # comes with Orbax
  monkeypatch.setattr(arrays, 'MAX_CHUNK_BYTES', 64)
  saved(tmp_path)
  path = tmp_path / 'checkpoints' / '1' / 'state'

  def chunk(name):
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': f'file://{path}', 'path': name.replace('/', '.') + '/'}}
    return ts.open(spec, read=True).result().chunk_layout.read_chunk.shape

  for prefix in ('params', 'opt_state.inner.mu'):
    assert chunk(f'{prefix}/encoder/layers/attention/query') == (1, 4, 4)
    assert chunk(f'{prefix}/encoder/layers/mlp_norm/scale') == (1, 4)
    assert chunk(f'{prefix}/experts/encoder/wo') == (1, 4, 4)
    assert chunk(f'{prefix}/experts/encoder/wi_0') == (1, 1, 4, 4)
    assert np.prod(chunk(f'{prefix}/token_embedder/embedding')) * 4 <= 64


@pytest.mark.parametrize('name, router', [('adamw', 'loss_free'), ('adafactor', 'random_projection')])
def test_chunks_are_those_of_earlier_checkpoints(name, router):
  """Of every array of a run: the rule by path that the first checkpoints were cut by, against the rule by logical axes."""

  def by_path(path, leaf):
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    if 'experts' in names and leaf.ndim == 4:
      return (0, 1)
    return (0,) if leaf.ndim > 1 and {'layers', 'routers', 'experts'} & set(names) else ()

  moe = MoEConfig(num_experts=4, group_size=512, encoder_every=2, router=router, decoder_router='top_2', shared_experts=1)
  cfg = Config(
      model=ModelConfig(vocab_size=128, d_model=128, d_ff=128, num_encoder_layers=4, num_decoder_layers=2, moe=moe),
      task=TaskConfig(encoder_length=128, decoder_length=128), train=TrainConfig(batch_size=8),
      optimizer=OptimizerConfig(name=name, weight_decay=0.0))
  built = step.build(cfg, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  state = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), built.abstract_state)
  found = jax.tree.map(lambda args: tuple(args.shard_axes), arrays.save_args(state, built.axes))
  wanted = jax.tree_util.tree_map_with_path(by_path, state)
  assert found == wanted
  leaves, structure = jax.tree.flatten(state)
  kinds = {leaf.ndim: axes for leaf, axes in zip(leaves, structure.flatten_up_to(wanted), strict=True) if axes}
  assert kinds == {2: (0,), 3: (0,), 4: (0, 1)}


def test_kill_9_during_a_save(tmp_path):
  """The process is killed while the second checkpoint is being written; the first one is what is left."""
  code = '''
    import os, signal, sys, threading, time, pathlib
    import jax.numpy as jnp
    import numpy as np
    from t5x_cpm.config import Config
    from t5x_cpm.checkpoints.manager import Manager
    path = pathlib.Path(sys.argv[1])
    noise = np.random.default_rng(0).integers(0, 2**32, (64, 1024, 256), np.uint32)  # 64 MiB that do not compress
    state = {'params': {'w': jnp.asarray(noise)}}
    manager = Manager(path, Config(), info={})
    manager.save(1, {'params': {'w': state['params']['w'][:1]}})
    manager.wait()
    manager.save(2, state)
    while not list((path / 'checkpoints').glob('2.orbax-checkpoint-tmp/state*/*')):
      time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
  '''
  assert python(code, tmp_path).returncode == -signal.SIGKILL
  assert read_run(tmp_path).steps == [1]
  assert (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').exists()
  Manager(tmp_path, Config(), info={}).close()
  assert load_params(tmp_path)['w'].shape == (1, 1024, 256)


def test_inference_imports_no_tensorflow(tmp_path):
  saved(tmp_path)
  code = '''
    import sys
    from t5x_cpm.checkpoints import arrays, run_directory
    from t5x_cpm.checkpoints.manager import Manager
    run_directory.read_run(sys.argv[1])
    assert 'orbax' not in sys.modules
    arrays.load_params(sys.argv[1])
    assert not {'tensorflow', 'seqio', 'torch'} & set(sys.modules)
  '''
  result = python(code, tmp_path)
  assert result.returncode == 0, result.stderr
  assert 'WARNING' not in result.stderr


def test_on_eight_devices(tmp_path):
  """Moments lie beside their parameters; a checkpoint of one mesh is restored on others; the loss gathers no logits."""
  code = '''
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from t5x_cpm.config import Config, MeshConfig, OptimizerConfig
    from t5x_cpm import mesh as mesh_lib
    from t5x_cpm.checkpoints import arrays, run_directory
    from t5x_cpm.checkpoints.manager import Manager
    from t5x_cpm.models.leaf import Leaf
    from t5x_cpm.training import losses, optimizer

    axes = {'experts': {'encoder': {'wi': ('layers', 'embed', 'mlp')}}, 'lm_head': ('embed', 'vocab')}
    shapes = {'experts': {'encoder': {'wi': (2, 128, 256)}}, 'lm_head': (128, 512)}
    params = jax.tree.map(lambda s: jax.random.normal(jax.random.key(0), s), shapes, is_leaf=lambda s: isinstance(s, tuple))

    def setup(name, **sizes):
      count = sizes['data'] * sizes['model']
      mesh = mesh_lib.make_mesh(MeshConfig(**sizes), jax.devices()[:count])
      leaves = jax.tree.map(lambda names, p: Leaf('', p.shape, p.dtype, names), axes, params, is_leaf=mesh_lib.is_names)
      tx = optimizer.make(OptimizerConfig(name=name), 10, leaves)
      init = lambda p: {'params': p, 'opt_state': tx.init(p)}
      names = {'params': axes, 'opt_state': tx.axes}
      shardings = mesh_lib.shardings(mesh, names)
      abstract = jax.tree.map(
          lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init, params), shardings)
      return mesh, jax.jit(init, out_shardings=shardings), abstract

    for name in ('adamw', 'adafactor'):
      _, init, abstract = setup(name, data=2, model=4)
      state = init(params)
      if name == 'adamw':
        for moment in (state['opt_state']['inner'].mu, state['opt_state']['inner'].nu):
          assert moment['lm_head'].addressable_shards[0].data.shape == (128, 128)
          assert moment['experts']['encoder']['wi'].addressable_shards[0].data.shape == (2, 128, 64)
      else:
        statistics = state['opt_state']['inner']['statistics']
        assert statistics['lm_head']['col'].addressable_shards[0].data.shape == (128,)
        assert statistics['experts']['encoder']['wi']['col'].addressable_shards[0].data.shape == (2, 64)
      path = f'{sys.argv[1]}/{name}'
      with Manager(path, Config(), info={}) as manager:
        manager.save(1, state)
        manager.wait()
        for sizes in ({'data': 1, 'model': 8}, {'data': 2, 'model': 1}, {'data': 1, 'model': 1}):
          other = setup(name, **sizes)[2]
          restored = manager.restore(other)
          assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, other)
          jax.tree.map(np.testing.assert_array_equal, restored, state)

    mesh = setup('sgd', data=2, model=4)[0]
    sharding = lambda *names: jax.sharding.NamedSharding(mesh, mesh_lib.spec(names))
    logits = jax.ShapeDtypeStruct((4, 16, 512), jnp.float32, sharding=sharding('batch', None, 'vocab'))
    targets = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=sharding('batch', None))
    weights = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=sharding('batch', None))
    with jax.set_mesh(mesh):
      compiled = jax.jit(jax.value_and_grad(losses.cross_entropy, has_aux=True)).lower(logits, targets, weights).compile()
    text = compiled.as_text()
    assert 'all-reduce' in text and 'all-gather' not in text, [l for l in text.splitlines() if 'all-gather' in l]
  '''
  result = python(code, tmp_path, XLA_FLAGS='--xla_force_host_platform_device_count=8')
  assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
  code = '''
    import sys
    import jax
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'127.0.0.1:{sys.argv[2]}', 2, int(sys.argv[3]))
    import numpy as np
    from t5x_cpm import mesh as mesh_lib
    from t5x_cpm.config import CheckpointConfig, Config, MeshConfig
    from t5x_cpm.checkpoints.manager import Manager

    mesh = mesh_lib.make_mesh(MeshConfig(data=1, model=4))
    sharding = jax.sharding.NamedSharding(mesh, mesh_lib.spec(('layers', 'embed', 'mlp')))
    values = np.arange(96, dtype=np.float32).reshape(3, 4, 8)
    state = {'params': {'layers': {'w': jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}}}
    abstract = {'params': {'layers': {'w': jax.ShapeDtypeStruct(values.shape, np.float32, sharding=sharding)}}}
    for start in (0, 2):
      with Manager(sys.argv[1], Config(checkpoint=CheckpointConfig(keep=1)), info={}) as manager:
        assert manager.latest_step() == (start or None)
        for step in (1, 2):
          manager.save(start + step, state)
        manager.wait()
        for shard in manager.restore(abstract)['params']['layers']['w'].addressable_shards:
          np.testing.assert_array_equal(shard.data, values[shard.index])
  '''
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  environment = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    results = list(pool.map(lambda i: python(code, tmp_path, port, i, **environment), range(2)))
  assert [result.returncode for result in results] == [0, 0], results
  assert read_run(tmp_path).steps == [4]
  np.testing.assert_array_equal(load_params(tmp_path)['layers']['w'].ravel(), np.arange(96))
