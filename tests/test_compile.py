"""Compiling for TPU slices: the search, refusals, and (slow) the compiler itself."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import test_step

from t5x_cpm import compile as compile_lib
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.chips import CHIPS
from t5x_cpm.compile import estimate, plan, program, search, slices
from t5x_cpm.config import Config, ConfigError, DeltaConfig, InferConfig, MeshConfig, MoEConfig, TrainConfig, gin
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import flops, step

ROOT = pathlib.Path(__file__).resolve().parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed (pip install -e '.[pod]')")


@pytest.mark.parametrize('count', [1, 2])
def test_the_arithmetic_of_a_step_is_what_mfu_counts(count):
  config = dataclasses.replace(
      test_step.CONFIG, model=dataclasses.replace(test_step.CONFIG.model, d_model=64, d_ff=96, remat='none'),
      train=TrainConfig(batch_size=8, microbatches=count))
  built = step.build(config, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  executed = program.arithmetic(built.fn.trace(built.abstract_state, {}, built.abstract_batch).jaxpr.jaxpr)
  needed = flops.model_flops(config.model, 8 * 12, 8 * 8, 12, 8)
  assert executed == pytest.approx(needed, rel=0.01)
  # 6ND leaves out attention's own products, which are few at these lengths.
  passed = plan._passed(encoder_decoder.build(config.model))
  assert 6 * (passed[0] * 96 + passed[1] * 64) == pytest.approx(needed, rel=0.1)


def test_six_nd_is_the_arithmetic_without_products_within_attention():
  config = gin.load(['gin/runs/pretrain.gin', 'gin/models/cpm2_11b.gin'], ['TrainConfig.batch_size=2048'])
  slots, model = plan._token_slots(config, 'train'), encoder_decoder.build(config.model)
  c, (S, T) = config.model, (config.task.encoder_length, config.task.decoder_length)
  six_nd = plan.six_nd(model, slots)
  attention = 12 * c.num_heads * c.head_dim * (
      c.num_encoder_layers * slots[0] * S + c.num_decoder_layers * slots[1] * (S + T))
  assert six_nd + attention == pytest.approx(plan._needed(config, 'train'), rel=1e-3)
  assert six_nd == pytest.approx(4.31e16, rel=1e-3)


def test_a_plan_that_does_not_fit_is_an_error_and_promises_no_rate(tmp_path, monkeypatch, capsys):
  large = plan.Plan(
      'v5p:2x2x2', 'train', {'data': 8, 'model': 1, 'expert': 1, 'sharding': 'none'}, fits=False, missing_bytes=3 * 2.0**30,
      argument_bytes=0.0, temporary_bytes=0.0, host_bytes=0.0, tokens=1e6, parameters=1, active_parameters=1, model_flops=1e15,
      six_nd=1e15, executed_flops=1e15, hbm_bytes=1e9, collectives={}, seconds={'compute': 1.0, 'memory': 0.5},
      compile_seconds=1.0)
  monkeypatch.setattr(plan, 'make', lambda *_: large)
  with pytest.raises(ConfigError, match=r'does not fit a chip of v5p:2x2x2: 3.00 GiB too much'):
    compile_lib.run(Config(), 'v5p:2x2x2', output=str(tmp_path / 'plan.json'))
  said, written = capsys.readouterr().out, json.loads((tmp_path / 'plan.json').read_text())
  assert 'DOES NOT FIT: 3.00 GiB' in said and 'try: ' in said and 'tokens/s' not in said and 'at least' not in said
  assert not written['fits'] and written['mfu'] is written['step_seconds'] is None


@pytest.mark.parametrize('what', ['encode', 'decode'])
def test_inference_needs_what_its_parts_do(what):
  config = dataclasses.replace(
      test_step.CONFIG, model=dataclasses.replace(test_step.CONFIG.model, d_model=64, d_ff=96), infer=InferConfig(batch_size=8))
  fn, arguments = plan._inference(config, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1]), what)
  executed = program.arithmetic(fn.trace(*arguments).jaxpr.jaxpr)
  lengths = config.task.encoder_length, config.task.decoder_length
  assert executed == pytest.approx(flops.inference_flops(config.model, what, 8, *lengths), rel=0.01)


@pytest.mark.parametrize('what', ['encode', 'decode'])
def test_inference_knows_the_domain_of_each_row(what):
  moe = MoEConfig(num_experts=4, router='domain', group_size=8)
  config = dataclasses.replace(
      test_step.CONFIG, model=dataclasses.replace(test_step.CONFIG.model, moe=moe), infer=InferConfig(batch_size=8))
  fn, arguments = plan._inference(config, mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1]), what)
  assert (arguments[1] if what == 'encode' else arguments[1]['row'])['domain'].shape[-1] == 8
  fn.trace(*arguments)


def test_experts_that_choose_count_by_what_they_take():
  """As many as of a router with so many choices."""
  def counted(**fields):
    model = dataclasses.replace(test_step.CONFIG.model, moe=MoEConfig(num_experts=4, decoder_every=0, group_size=8, **fields))
    built = encoder_decoder.build(model)
    return built.num_active_parameters(), plan._passed(built), flops.model_flops(model, 96, 64, 12, 8)

  assert counted(router='expert_choice', capacity_factor=2.0) == counted(router='top_k', top_k=2)
  assert counted(router='expert_choice', capacity_factor=9.0) == counted(router='top_k', top_k=4)
  assert counted(router='expert_choice', capacity_factor=1.5) != counted(router='top_k', top_k=1)


@pytest.mark.parametrize('name, words', [
    ('v5x:2x2', "unknown chip 'v5x'.*v4, v5e, v5p, v6e"), ('v5p:4x4', '3 dimensions'), ('v5e:4', '2 dimensions'),
    ('v5p', '3 dimensions'), ('v5e:axb', '2 dimensions'), ('v5p:0x4x4', '3 dimensions'), ('h100:2x0', '2 dimensions')])
def test_an_unknown_topology_is_refused_with_those_known(name, words):
  with pytest.raises(ConfigError, match=words):
    slices.parse(name)


def test_missing_libtpu_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[pod\]'"):
    compile_lib.run(Config(), 'v5p:2x2x2')


def test_an_output_that_cannot_be_written_is_told_before_anything_is_compiled(tmp_path):
  with pytest.raises(ConfigError, match='cannot be written'):
    compile_lib.run(Config(), 'v5p:2x2x2', output=str(tmp_path))


def test_rows_that_the_mesh_does_not_divide_name_their_field():
  mesh = jax.sharding.AbstractMesh((4, 1, 1), mesh_lib.AXES)
  config = dataclasses.replace(test_step.CONFIG, infer=InferConfig(batch_size=3))
  with pytest.raises(ConfigError, match='InferConfig.batch_size'):
    plan._inference(config, mesh, 'decode')


def test_an_unknown_step_is_refused():
  with pytest.raises(ConfigError, match='train, encode, decode'):
    compile_lib.run(Config(), 'v5p:2x2x2', 'decoed')


@pytest.mark.parametrize('words', [
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.08G of 30.75G hbm. Exceeded hbm capacity by 2.33G.',
    'Ran out of memory on HBM, the total memory required for HLO temporaries (33.08G) exceeds available HBM (30.75G).'])
def test_what_does_not_fit_is_read_from_the_compilers_error(words):
  used, there = re.search(plan.TOO_MUCH, words).groups()
  assert (plan._size(used) - plan._size(there)) / 2**30 == pytest.approx(2.33)


def test_gpus_are_fast_within_a_host_only():
  slice_ = slices.parse('h100:2x4')
  within, across = np.array([[0, 0], [0, 3]]), np.array([[0, 0], [1, 0]])
  assert slice_.count == 8 and slice_.rate(within) > slice_.rate(across) == slice_.chip.network_rate
  assert slice_.exchange_seconds(within) == 1 / 2 / slice_.chip.link_rate  # no hops


def test_rates_follow_the_torus():
  half, row = np.array([[0, 0, 0], [1, 0, 0]]), np.array([[0, y, 0] for y in range(4)])
  both = np.array([[x, y, 0] for x in range(2) for y in range(4)])
  # Three dimensions are rings in whole cubes of 4 x 4 x 4 alone, two each for itself.
  for name, links in (('v5p:4x4x8', (1, 2, 3)), ('v5p:2x4x4', (1, 1, 2)), ('v4:4x4x2', (1, 1, 2)), ('v6e:4x8', (1, 1, 2))):
    slice_ = slices.parse(name)
    assert [slice_.rate(group) / slice_.chip.link_rate for group in (half, row, both)] == list(links), name
  slice_ = slices.parse('v5e:8x16')
  assert slice_.rate(np.array([[0, y] for y in range(16)])) == 2 * slice_.chip.link_rate and slice_.rings == (False, True)


def load_of_links(size, ring):
  """Of each link of one dimension, in parts of what a chip has for all chips, each by the shortest way."""
  load = collections.Counter()
  for a, b in itertools.product(range(size), repeat=2):
    ahead = (b - a) % size
    ways = [1, -1] if ring and 2 * ahead == size else [1 if b > a and not ring or ring and 2 * ahead < size else -1]
    for way in ways:
      at = a
      while at != b:
        load[at, way] += 1 / size / len(ways)
        at = (at + way) % size
  return load


@pytest.mark.parametrize('name', ['v5p:4x4x8', 'v5p:2x4x4', 'v5e:8x16'])
def test_an_exchange_takes_as_long_as_its_busiest_link(name):
  slice_ = slices.parse(name)
  chip = slice_.chip
  everyone = np.array(list(itertools.product(*map(range, slice_.shape))))
  longest = max(max(load_of_links(size, ring).values()) for size, ring in zip(slice_.shape, slice_.rings))
  assert slice_.exchange_seconds(everyone) * chip.link_rate == pytest.approx(longest)
  # A plan counts what is sent, without the part that stays.
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(coords=tuple(place)) for place in everyone]))
  count = len(everyone)
  found = [program.Collective('all-to-all', 1e9 * (count - 1) / count, 3, tuple(range(count)))]
  assert plan.collectives_by_kind(found, mesh, slice_)['all-to-all']['seconds'] == pytest.approx(3e9 * longest / chip.link_rate)


def test_the_search_divides_everything_and_ranks():
  config = gin.load([str(ROOT / 'gin/models/cpm2_moe_198b.gin')], ['TrainConfig.batch_size=2048'])
  slice_ = slices.parse('v5p:4x4x4')
  order = search.ranked(config, slice_, 'train')
  for one in order[:40]:
    mesh = one.config.mesh
    assert mesh.data * mesh.model * mesh.expert == 64 and 32 % mesh.expert == 0 and 64 % mesh.model == 0
    assert 2048 % (mesh.data * mesh.expert * one.config.train.microbatches) == 0
    assert one.bytes <= slice_.chip.hbm
  assert [one.seconds for one in order] == sorted(one.seconds for one in order)
  for one in search.ranked(config, slices.parse('v5p:4x4x4', 4), 'train')[:40]:
    assert math.prod((one.config.mesh.data, one.config.mesh.model, one.config.mesh.expert)) == 256
    assert one.config.mesh.data % 4 == 0
  half = search.ranked(config, slices.parse('v5p:2x4x4'), 'train')  # too small without the memory of the hosts
  assert all(one.config.mesh.host_gib for one in half[:3])
  narrow = dataclasses.replace(config.model, num_heads=1)
  with pytest.raises(ConfigError, match='TrainConfig.batch_size'):
    search.ranked(dataclasses.replace(config, model=narrow, train=TrainConfig(batch_size=1)), slice_, 'train')


def test_estimates_know_the_slice_and_the_step():
  config = gin.load([str(ROOT / 'gin/models/cpm2_moe_198b.gin')], ['TrainConfig.batch_size=2048'])
  config = dataclasses.replace(config, mesh=MeshConfig(data=2, expert=32, sharding='full'))
  sizes = estimate.sizes(config.model)

  def seconds(name, what='train', **rates):
    slice_ = slices.parse(name)
    slice_ = dataclasses.replace(slice_, chip=dataclasses.replace(slice_.chip, **rates))
    return estimate.estimate(config, slice_, what, sizes).seconds

  links_alone = {'flops': math.inf, 'hbm_rate': math.inf, 'host_rate': math.inf}
  assert seconds('v5p:2x4x8', **links_alone) == pytest.approx(2 * seconds('v5p:4x4x4', **links_alone))
  task, rows = config.task, config.infer.batch_size
  for what in ('encode', 'decode'):
    needed = flops.inference_flops(config.model, what, rows, task.encoder_length, task.decoder_length)
    got = seconds('v5p:4x4x4', what, hbm_rate=math.inf, link_rate=math.inf)
    assert got == pytest.approx(needed / 64 / CHIPS['v5p'].flops)


def test_estimates_know_that_a_base_is_frozen():
  full = gin.load([str(ROOT / 'gin/models/cpm2_11b.gin')], ['TrainConfig.batch_size=16', 'ModelConfig.remat=full'])
  tuned = dataclasses.replace(full, delta=DeltaConfig(method='lora', base='base', base_dtype='bfloat16'))
  sizes, slice_ = estimate.sizes(full.model), slices.parse('v5p:1x1x1')
  a, b = (estimate.estimate(config, slice_, 'train', sizes) for config in (tuned, full))
  whole = estimate._training_bytes(full, estimate._held(sizes, full))
  # Weights in half the bytes, and neither gradients nor moments.
  assert whole - a.bytes == pytest.approx((4 + 4 + 8 - 2) * sum(sizes.values())) and a.seconds < 0.8 * b.seconds
  assert b.config.mesh.host_gib and not a.config.mesh.host_gib


def test_the_search_takes_no_more_microbatches_than_the_compiler_needs(monkeypatch, capsys):
  """The compiler here finds that 16 fit, whatever the mesh."""
  def make(config, slice_, step):
    fits, seconds = config.train.microbatches >= 16, float(config.train.microbatches)
    return types.SimpleNamespace(fits=fits, missing_bytes=2.0**30 * (not fits), step_seconds=seconds, bound='memory')

  monkeypatch.setattr(plan, 'make', make)
  monkeypatch.setattr(slices, 'devices', lambda slice_: [])
  config = gin.load(['gin/runs/pretrain.gin', 'gin/models/cpm2_11b.gin'], ['TrainConfig.batch_size = 2048'])
  best, made = search.best(config, slices.parse('v5e:2x4'), 'train')
  assert best.train.microbatches == 16 and made.fits and best.mesh.host_gib > 0
  lines = capsys.readouterr().out.splitlines()[1:]
  first = [line.partition(',')[0] for line in lines if 'estimate' in line]
  assert 2 < len(first) <= search.TRIED and len(set(first)) == len(first)  # meshes that differ
  assert '1.0 GiB too much' in lines[-1]


@pytest.mark.parametrize('slices', [1, 2])
def test_what_a_search_writes_is_a_mesh_file(tmp_path, slices):
  config = dataclasses.replace(Config(), mesh=MeshConfig(data=4, model=2, slices=slices, sharding='full', host_gib=3.0))
  (tmp_path / 'mesh.gin').write_text(search.as_gin(config))
  assert gin.load([str(tmp_path / 'mesh.gin')], []).mesh == config.mesh


# Programs for TPUs.


def compiled(tmp_path, *arguments: str) -> dict:
  """What `compile` writes, in a process of its own: libtpu stays loaded."""
  output = tmp_path / 'plan.json'
  # Without XLA:CPU's flags, of which libtpu does not know all, and without the other tests' cache of compiled programs.
  environment = os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  command = [sys.executable, '-m', 't5x_cpm', 'compile', f'--output={output}', *arguments]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  print(done.stdout)
  return json.loads(output.read_text())


# Few tokens, so that the moments are a good part of what a chip holds.
SMALL = ('--gin_file=gin/runs/pretrain.gin', '--gin_file=gin/models/cpm2_tiny.gin', '--gin.ModelConfig.d_model=1024',
         '--gin.ModelConfig.d_ff=4096', '--gin.TaskConfig.encoder_length=64', '--gin.TaskConfig.decoder_length=64',
         '--gin.MeshConfig.sharding=full', '--gin.ModelConfig.remat=full', '--topology=v5p:2x2x1')


@pytest.mark.slow
@pytest.mark.xdist_group('compile')
@needs_libtpu
def test_host_memory_takes_what_the_device_gives(tmp_path):
  plain = compiled(tmp_path, *SMALL)
  moved = compiled(tmp_path, *SMALL, '--gin.MeshConfig.host_gib=-1')
  weights = moved['host_bytes'] - 8 * plain['parameters'] / 4  # after both moments, on four chips
  assert weights > 0.8 * 4 * plain['parameters'] / 4  # all but embeddings, head and norms
  assert plain['argument_bytes'] - moved['argument_bytes'] == pytest.approx(moved['host_bytes'] - weights / 2, rel=0.01)
  freed = plain['argument_bytes'] + plain['temporary_bytes'] - moved['argument_bytes'] - moved['temporary_bytes']
  assert freed > 0.5 * moved['host_bytes']
  assert moved['executed_flops'] == plain['executed_flops']


@pytest.mark.slow
@pytest.mark.xdist_group('compile')
@needs_libtpu
def test_slices_exchange_gradients_alone(tmp_path):
  """Summed up in each slice first: a chip of four sends a quarter of them, twice a half of it in each of two slices."""
  arguments = [one for one in SMALL if 'sharding' not in one]
  one = compiled(tmp_path, *arguments)
  two = compiled(tmp_path, *arguments, '--gin.MeshConfig.slices=2')
  assert two['topology'] == '2 x v5p:2x2x1' and two['mesh']['data'] == 2 * one['mesh']['data'] == 8
  assert 'between slices' not in one['collectives']
  sent = two['collectives']['between slices']
  assert 0.9 * 2 * two['parameters'] / 4 < sent['bytes'] < 1.5 * 4 * two['parameters'] / 4  # bfloat16 and float32
  assert sent['seconds'] == pytest.approx(sent['bytes'] / CHIPS['v5p'].network_rate)


@pytest.mark.slow
@pytest.mark.xdist_group('compile')
@needs_libtpu
@pytest.mark.parametrize('what', ['train', 'encode', 'decode'])
def test_experts_compile_for_a_slice(tmp_path, what):
  made = compiled(
      tmp_path, '--gin_file=gin/runs/pretrain.gin', '--gin_file=gin/models/cpm2_moe_tiny.gin',
      '--gin.InferConfig.batch_size=16', '--gin.MoEConfig.dispatch=dropless', '--gin.MeshConfig.expert=4',
      '--topology=v6e:2x2', f'--step={what}')
  assert made['fits'] and made['collectives']['all-to-all']['times'] >= 2 * (2 if what != 'train' else 4)


@pytest.mark.slow
@pytest.mark.xdist_group('compile')
@pytest.mark.skipif(importlib.util.find_spec('jax_cuda12_plugin') is None, reason="no CUDA plugin (pip install -e '.[gpu]')")
def test_a_step_compiles_for_gpus_without_one(tmp_path):
  made = compiled(
      tmp_path, '--gin_file=gin/runs/pretrain.gin', '--gin_file=gin/models/cpm2_tiny.gin', '--gin.MeshConfig.sharding=full',
      '--gin.TrainConfig.batch_size=16', '--topology=h100:2x4')
  assert made['fits'] and sum(kind['times'] for kind in made['collectives'].values())


@pytest.mark.slow
@pytest.mark.xdist_group('compile')
@needs_libtpu
def test_a_row_of_the_readme_is_what_compile_says(tmp_path):
  lines = (ROOT / 'README.md').read_text().splitlines()
  line = next(line for line in lines if line.startswith('| `cpm2_11b` | v5e:2x4 | decode'))
  cells = [cell.strip() for cell in line.strip('|').split('|')]
  made = compiled(tmp_path, '--gin_file=gin/runs/pretrain.gin', '--gin_file=gin/models/cpm2_11b.gin', '--topology=v5e:2x4',
                  '--step=decode', '--gin.InferConfig.batch_size=128', '--gin.MeshConfig.model=8')
  milliseconds, memory = float(re.search(r'[\d.]+', cells[2])[0]), float(cells[4])
  used = (made['argument_bytes'] + made['temporary_bytes']) / 2**30
  assert made['fits'] and used == pytest.approx(memory, rel=0.05) and made['bound'] == cells[5]
  assert 1e3 * made['step_seconds'] == pytest.approx(milliseconds, rel=0.05)
