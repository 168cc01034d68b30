"""The mesh: rules, what does not fit, and that every layout of a run computes the same."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest
import test_step
from jax.sharding import AbstractMesh, PartitionSpec

from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import ConfigError, MeshConfig, MoEConfig
from t5x_cpm.training import step


def with_mesh(mesh):
  return dataclasses.replace(test_step.CONFIG, mesh=mesh)


@pytest.mark.parametrize('mesh, field', [
    (MeshConfig(data=3), 'TrainConfig.batch_size'),
    (MeshConfig(model=3, data=1), 'ModelConfig'),
    (MeshConfig(data=32, sharding='full'), "params?.*'embed' has size 16|embed.*ModelConfig.d_model")])
def test_a_dimension_that_the_mesh_does_not_divide_is_named(mesh, field):
  fake = AbstractMesh((mesh.data, mesh.model, 1), mesh_lib.AXES)
  with pytest.raises(ConfigError, match=field):
    step.build(with_mesh(mesh), fake)


def test_a_mesh_of_another_size_than_the_devices_is_refused():
  with pytest.raises(ConfigError, match='number of devices'):
    mesh_lib.make_mesh(MeshConfig(data=2, model=3, expert=5))


def test_a_mesh_axis_splits_one_dimension():
  rules = mesh_lib.OVER_DATA
  assert mesh_lib.spec(('layers', 'embed', 'mlp'), rules) == PartitionSpec(None, ('data', 'expert'), 'model')
  assert mesh_lib.spec(('layers', 'expert', 'embed', 'mlp'), rules) == PartitionSpec(None, 'expert', 'data', 'model')
  assert mesh_lib.spec(('batch', 'length')) == PartitionSpec(('data', 'expert'), None)


@pytest.mark.parametrize('config, expected', [
    (MeshConfig(sharding='zero3'), "sharding.*'full'"), (MeshConfig(slices=0), 'slices'), (MeshConfig(data=0), 'positive')])
def test_bad_values(config, expected):
  with pytest.raises(ConfigError, match=expected):
    config.validate()


@dataclasses.dataclass(frozen=True)
class Chip:
  """What make_mesh reads of a TPU device."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v5 lite'
  core_on_chip: int = 0
  shape: tuple[int, int] = (2, 2)  # of its slice, without the last dimension

  @property
  def coords(self):
    x, y = self.shape
    return (self.id % x, self.id // x % y, self.id // (x * y) % 4 if x == 4 else 0)


def test_experts_are_split_over_their_axis():
  model = dataclasses.replace(test_step.CONFIG.model, moe=MoEConfig(num_experts=4, group_size=8))
  fake = AbstractMesh((1, 2, 4), mesh_lib.AXES)
  built = step.build(dataclasses.replace(test_step.CONFIG, model=model), fake)
  kernel = built.abstract_state['params']['experts']['encoder']['wi_0']
  assert kernel.shape == (2, 4, 16, 32) and kernel.sharding.shard_shape(kernel.shape) == (2, 1, 16, 16)


def test_slices_split_the_data_axis_alone():
  chips = [Chip(id=i, slice_index=i // 4) for i in range(8)]
  mesh = mesh_lib.make_mesh(MeshConfig(data=4, model=2, slices=2), chips)
  slices = [[{chip.slice_index for chip in row.flat} for row in half] for half in (mesh.devices[:2], mesh.devices[2:])]
  assert slices == [[{0}, {0}], [{1}, {1}]]
  with pytest.raises(ConfigError, match='slices=3.*data axis'):
    mesh_lib.make_mesh(MeshConfig(data=4, model=2, slices=3), chips)
  with pytest.raises(ConfigError, match='the devices lie in 2 slices'):
    mesh_lib.make_mesh(MeshConfig(data=4, model=2, slices=4), chips)


def test_an_axis_may_take_a_part_of_a_dimension_of_several_slices():
  chips = [Chip(id=i, slice_index=i // 64, device_kind='TPU v5p', shape=(4, 4)) for i in range(128)]
  mesh = mesh_lib.make_mesh(MeshConfig(data=16, expert=8, slices=2), chips)
  assert mesh.devices.shape == (16, 1, 8) and [row[0, 0].slice_index for row in mesh.devices] == [0] * 8 + [1] * 8
  with pytest.raises(ConfigError, match='slices=2: the devices lie in 2 slices'):  # two chips at one place
    mesh_lib.make_mesh(MeshConfig(data=16, expert=8, slices=2), [dataclasses.replace(chips[0], id=1), *chips[1:]])


def test_cpu_devices_after_jax_has_started_are_refused():
  from t5x_cpm import backend

  jax.devices()
  with pytest.raises(ConfigError, match='new process'):
    backend.use_cpu_devices(jax.local_device_count() + 1)


# Run in a process with 8 devices: every mesh against one device, in float64 after five steps of AdamW, in float32 by the
# loss and the gradients of one step (which SGD with a rate of 1 leaves in the parameters).
AGREE = """
import dataclasses, sys, time
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 8)
sys.path.insert(0, 'tests')
import test_step as t
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import MeshConfig, OptimizerConfig
from t5x_cpm.config import MoEConfig

dtype, dropout, experts = sys.argv[1], float(sys.argv[2]), eval(sys.argv[3])
exact = dtype == 'float64'
jax.config.update('jax_enable_x64', exact)
model = dataclasses.replace(
    t.CONFIG.model, num_heads=8, head_dim=4, dtype=dtype, param_dtype=dtype, dropout_rate=dropout, moe=MoEConfig(**experts))
config = dataclasses.replace(t.CONFIG, model=model)
if not exact:
  config = dataclasses.replace(config, optimizer=OptimizerConfig(
      name='sgd', schedule='constant', learning_rate=1.0, warmup_steps=0, clip_norm=0.0, weight_decay=0.0))
start = jax.device_get(t.step.build(config, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1])).init(jax.random.key(0)))
want = None
for sizes, sharding in [((1, 1, 1), 'none'), ((8, 1, 1), 'optimizer'), ((1, 8, 1), 'none'), ((2, 2, 2), 'full'),
                        ((1, 2, 4), 'none')]:
  began = time.monotonic()
  mesh = MeshConfig(data=sizes[0], model=sizes[1], expert=sizes[2], sharding=sharding)
  devices = mesh_lib.make_mesh(mesh, jax.devices()[:sizes[0] * sizes[1] * sizes[2]])
  built = t.step.build(dataclasses.replace(config, mesh=mesh), devices)
  step = built.fn.lower(built.abstract_state, {}, built.abstract_batch).compile()
  arguments = step.input_shardings[0][0]
  state, losses = jax.device_put(start, arguments), []
  for index in range(5 if exact else 1):
    batch = {name: jax.device_put(x, built.abstract_batch[name].sharding) for name, x in t.random_batch(config, index).items()}
    state, metrics = step(state, {}, batch)
    losses.append(float(metrics['loss']))
  params = jax.device_get(state['params'])
  if want is None:
    want = losses, params
  np.testing.assert_allclose(losses, want[0], rtol=1e-9 if exact else 1e-5)
  for a, b, c in zip(*map(jax.tree.leaves, (params, want[1], start['params']))):
    if exact:
      np.testing.assert_allclose(a, b, atol=1e-9)
    else:
      assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b - c) + 1e-12

  # The compiled step takes and gives parameters and moments as the rules say.
  for rules, part in zip(mesh_lib.STATE_RULES[sharding], ('params', 'opt_state')):
    split = 0
    for wanted, given, out in zip(*map(jax.tree.leaves, (built.abstract_state[part], arguments[part], state[part]))):
      local = given.shard_shape(wanted.shape)
      assert local == wanted.sharding.shard_shape(wanted.shape) == out.sharding.shard_shape(wanted.shape), (part, wanted)
      split += local != wanted.shape
    over_data = rules is mesh_lib.OVER_DATA and sizes[0] * sizes[2] > 1
    has_arrays = part == 'params' or exact  # SGD has none
    assert bool(split) == (has_arrays and (over_data or sizes[1] > 1)), (part, sizes, split)
  print(f'ok {mesh}, {time.monotonic() - began:.1f} s', flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize('dtype, dropout, experts', [
    ('float64', 0.2, {}),
    ('float64', 0.0, {'router': 'random_projection', 'dispatch': 'dropless'}),
    ('float64', 0.2, {'router': 'top_k', 'decoder_router': 'loss_free', 'jitter': 0.1, 'router_z_loss': 0.01,
                      'encoder_every': 2, 'shared_experts': 1}),
    ('float32', 0.2, {'router': 'top_2', 'dispatch': 'dropless'})], ids=str)
def test_meshes_agree(dtype, dropout, experts):
  experts = {'num_experts': 4, 'group_size': 24} | experts if experts else {}
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '.'}
  command = [sys.executable, '-c', AGREE, dtype, str(dropout), str(experts)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  print(done.stdout)
  assert done.stdout.count('ok') == 5, done.stderr[-3000:]
