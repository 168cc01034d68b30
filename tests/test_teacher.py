"""Learning from a teacher: the loss against plain formulas, the guided step, whole runs, what is refused."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import small_model
import small_run
import test_step

from t5x_cpm import vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.compile import estimate, plan, program, slices
from t5x_cpm.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  DeltaConfig,
  LocalTaskConfig,
  MeshConfig,
  MetricsConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TeacherConfig,
  TrainConfig,
)
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import before, divergence, flops, guidance, teachers, train

SMALL = dataclasses.replace(test_step.CONFIG.model, d_model=8, d_ff=12, num_decoder_layers=1, init_std=0.5)


SGD = OptimizerConfig(name='sgd', schedule='constant', learning_rate=0.1, warmup_steps=0)  # in which no rounding grows


def with_teacher(config: Config = test_step.CONFIG, **fields) -> Config:
  return dataclasses.replace(config, teacher=TeacherConfig(**{'model_dir': 'x', 'steps': 4} | fields))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def reference(student, teacher, weights, tau, top_k, rest):
  """The sum of the weighted divergences and its gradient, token by token, in float64."""
  total, gradient = 0.0, np.zeros_like(student)
  for b, t in np.ndindex(weights.shape):
    p, q = softmax(teacher[b, t] / tau), softmax(student[b, t] / tau)
    parts = [[token] for token in range(len(p))]
    if top_k:
      top = np.argsort(-p)[:top_k].tolist()
      others = [token for token in range(len(p)) if token not in top]
      parts = [[token] for token in top] + ([others] if rest == 'bucket' else [])
    P = np.array([p[part].sum() for part in parts])
    Q = np.array([q[part].sum() for part in parts])
    P = P / P.sum()
    total += weights[b, t] * (P * np.log(P / Q)).sum()
    for part, mass, own in zip(parts, P, Q):  # d log(sum of q in a part) / dx = (q where in the part) / sum - q
      inside = np.isin(np.arange(len(p)), part) * q / own
      gradient[b, t] -= weights[b, t] * mass * (inside - q) / tau
  return total, gradient


@pytest.mark.parametrize('top_k, rest', [(0, 'bucket'), (3, 'bucket'), (3, 'renormalise')])
def test_the_divergence_is_that_of_the_definition(top_k, rest):
  rng = np.random.default_rng(top_k)
  student, teacher = (2 * rng.standard_normal((2, 3, 11)) for _ in range(2))
  weights = rng.choice([0.0, 0.5, 1.0], (2, 3))
  weights[0, 0], weights[1, 2] = 0.0, 1.0
  config = TeacherConfig(model_dir='x', temperature=1.7, top_k=top_k, rest=rest)
  batch = guidance._says(config, jnp.float32(teacher)) | {'decoder_loss_weights': jnp.float32(weights)}
  share, own = 0.3, 5.0

  def loss(logits):
    return guidance.loss(config, jnp.float32(own), logits, batch, jnp.float32(share))

  broken = np.float32(student)
  broken[weights == 0] = np.inf  # what stands at padding does not matter
  (found, pairs), got = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(broken))
  kl, gradient = reference(student, teacher, weights, 1.7, top_k, rest)
  np.testing.assert_allclose(pairs['teacher_kl'], (kl, weights.sum()), rtol=1e-5)
  np.testing.assert_allclose(found, 0.7 * own + share * 1.7**2 * kl, rtol=1e-5)
  np.testing.assert_allclose(got, share * 1.7**2 * gradient, atol=1e-5)


def test_a_teacher_that_leaves_nothing_to_other_tokens():
  logits = jnp.float32([[[30.0, -30.0, -30.0, 0.0]]])
  for rest in (0.0, 0.25):
    value, gradient = jax.value_and_grad(lambda x, rest=rest: divergence.of_top(
        x, jnp.array([[[0, 1]]]), jnp.float32([[[1 - rest, 0.0]]]), jnp.float32([[rest]]), 1.0)[0, 0])(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (rest == 0) == (abs(float(value)) < 1e-5)


@pytest.mark.parametrize('schedule, expected', [
    ('linear', [0.8, 0.6, 0.4, 0.2, 0, 0]), ('cosine', [0.8, 0.8 * (1 + np.cos(np.pi / 4)) / 2, 0.4, None, 0, 0]),
    ('step', [0.8] * 4 + [0, 0]), ('constant', [0.8] * 6)])
def test_the_share_of_a_teacher(schedule, expected):
  config = with_teacher(alpha=0.8, schedule=schedule, steps=0 if schedule == 'constant' else 4)
  for step, value in enumerate(expected):
    if value is not None:
      np.testing.assert_allclose(guidance.share(config, step), value, rtol=1e-6, err_msg=f'step {step}')
  assert config.teacher.guided(10) == (10 if schedule == 'constant' else 4)
  longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
  np.testing.assert_allclose(guidance.share(longer, 3), guidance.share(config, 3))
  assert config.teacher.guided(3) == 3 and dataclasses.replace(config.teacher, alpha=0.0).guided(10) == 0


def test_without_steps_the_course_is_that_of_the_whole_run(monkeypatch):
  config = with_teacher(steps=0)
  longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
  assert [float(guidance.share(one, step)) for one, step in ((config, 5), (config, 10), (longer, 10))] == [0.5, 0.0, 0.75]
  monkeypatch.setattr(before, 'has_begun', lambda model_dir: True)
  monkeypatch.setattr(run_directory, 'read_run', lambda model_dir: types.SimpleNamespace(step=10, info={'teacher': {}}))
  assert not before.is_guided(config, 'x') and before.is_guided(longer, 'x')
  with pytest.raises(ConfigError, match='until step 40, and is at step 10: give --teacher=DIR'):
    before.is_guided(dataclasses.replace(longer, teacher=dataclasses.replace(config.teacher, model_dir='')), 'x')


def guided(config: Config, model: ModelConfig = SMALL, mesh: MeshConfig = test_step.ONE_DEVICE):
  """A guided step and its teacher's weights, at random."""
  built = test_step.build(config, mesh, teacher=model)
  params = jax.jit(encoder_decoder.build(model).init)(jax.random.key(5))
  return built, {'teacher': jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, built.abstract_frozen['teacher']))}


def test_a_guided_step_reports_the_plain_loss_and_follows_its_teacher():
  config = with_teacher(steps=0)
  batch = test_step.random_batch(config, 0)
  built, frozen = guided(config)
  plain = test_step.build(test_step.CONFIG)
  state, found = plain.init(jax.random.key(0)), []
  before = plain.evaluate(state['params'], {}, batch)['loss']
  for _ in range(10):
    state, metrics = built.fn(state, frozen, batch)
    found.append(metrics)
  np.testing.assert_allclose(found[0]['loss'], before[0] / before[1], rtol=1e-5)  # cross entropy, as without a teacher
  np.testing.assert_allclose([metrics['teacher_share'] for metrics in found], 1 - np.arange(10) / 10, rtol=1e-6)
  assert found[-1]['teacher_kl'] < 0.9 * found[0]['teacher_kl']

  # Once the share is 0, the program without a teacher does the same.
  copy = jax.tree.map(jnp.copy, state)
  (one, a), (other, b) = built.fn(state, frozen, batch), plain.fn(copy, {}, batch)
  assert a['teacher_share'] == 0 and 'teacher_share' not in b
  np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one['params'], other['params'])

  broken = frozen['teacher'] | {'lm_head': frozen['teacher']['lm_head'].at[0, 0].set(jnp.nan)}
  assert built.explain(one, {'teacher': broken}, batch) == 'teacher/lm_head'


def after(config: Config, steps: int = 3, **options):
  """Parameters and metrics of a guided run of the same rows."""
  built, frozen = guided(config, **options)
  state, found = test_step.build(config, options.get('mesh', test_step.ONE_DEVICE)).init(jax.random.key(0)), []
  for index in range(steps):
    state, metrics = built.fn(state, frozen, test_step.random_batch(config, index))
    found.append([float(metrics[name]) for name in ('loss', 'teacher_kl', 'teacher_share')])
  return state['params'], found


@pytest.mark.slow
@pytest.mark.parametrize('top_k', [0, 5])
def test_microbatches_change_nothing(top_k):
  config = dataclasses.replace(with_teacher(top_k=top_k), optimizer=SGD)
  parts = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=2))
  (one, a), (other, b) = after(config), after(parts)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), one, other)


MESHES = """
import dataclasses, sys
sys.path.insert(0, 'tests')
import jax, numpy as np
import test_teacher, test_step
from t5x_cpm import mesh as mesh_lib
from t5x_cpm.config import MeshConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import step

config, teacher = test_teacher.with_experts()
params = jax.device_get(jax.jit(encoder_decoder.build(teacher).init)(jax.random.key(5)))
wanted = None
for sizes, sharding in (((1, 1, 1), 'none'), ((2, 2, 2), 'full')):
  mesh_config = MeshConfig(data=sizes[0], model=sizes[1], expert=sizes[2], sharding=sharding)
  mesh = mesh_lib.make_mesh(mesh_config, jax.devices()[:sizes[0] * sizes[1] * sizes[2]])
  own = dataclasses.replace(config, mesh=mesh_config)
  built = step.build(own, mesh, teacher=teacher)
  frozen = {'teacher': jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, built.abstract_frozen['teacher'])}
  state, losses = step.build(own, mesh).init(jax.random.key(0)), []
  for index in range(2):
    state, metrics = built.fn(state, frozen, test_step.random_batch(config, index))
    losses.append([float(metrics[name]) for name in ('loss', 'teacher_kl')])
  found = losses, jax.device_get(state['params'])
  wanted = wanted or found
  np.testing.assert_allclose(losses, wanted[0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[1], wanted[1])
  print('ok', sizes, losses, flush=True)
"""


def with_experts() -> tuple[Config, ModelConfig]:
  """A guided run and its teacher's model, both with experts."""
  moe = MoEConfig(num_experts=4, group_size=24, encoder_every=0, decoder_every=1)
  config = dataclasses.replace(with_teacher(top_k=5), optimizer=SGD)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), dataclasses.replace(SMALL, moe=moe)


@pytest.mark.slow
def test_every_mesh_learns_the_same():
  done = small_run.python(MESHES, XLA_FLAGS='--xla_force_host_platform_device_count=8')
  print(done.stdout)
  assert done.stdout.count('ok') == 2, done.stderr[-3000:]


@pytest.fixture(scope='module')
def teacher_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('teacher')
  (folder / 'a.txt').write_text(''.join(chr(0x4E00 + 7 * i % 400) * 3 + chr(0x4E00 + i % 400) * 9 + '\n' for i in range(300)))
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')
  return small_model.model_dir(folder, vocabulary, steps=(3, 5))


def student(teacher_dir, steps=6, guided=4, **fields) -> Config:
  """A run that learns from the model in a folder for some steps."""
  run = run_directory.read_run(teacher_dir).config
  folder = teacher_dir.parent
  return dataclasses.replace(
      run, model=dataclasses.replace(run.model, init_std=0.1, num_decoder_layers=1, dropout_rate=0.1), task=dataclasses.replace(
          run.task, name='local', cache_dir=str(folder), cache_processes=1), metrics=MetricsConfig(every=1, tensorboard=False),
      local_task=LocalTaskConfig(files=f'{folder}/a.txt', validation_fraction=0.1), checkpoint=CheckpointConfig(every=3),
      optimizer=OptimizerConfig(schedule='constant', learning_rate=0.01, warmup_steps=0),
      train=TrainConfig(batch_size=4, steps=steps, eval_batches=1), mesh=MeshConfig(data=1, cpu_devices=1),
      teacher=TeacherConfig(**{'model_dir': str(teacher_dir), 'steps': guided} | fields))


def records(model_dir):
  found = [json.loads(line) for line in (model_dir / 'metrics.jsonl').read_text().splitlines()]
  keep = ('step', 'loss', 'teacher_kl', 'teacher_share', 'gradient_norm')
  return [{name: one[name] for name in keep if name in one} for one in found if one['split'] == 'train']


@pytest.mark.slow
def test_a_run_with_a_teacher_goes_on_bit_for_bit_and_then_without_it(teacher_dir, tmp_path, capsys):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  train.run(student(teacher_dir), str(whole))
  assert 'is the teacher up to step 4' in capsys.readouterr().out
  found = records(whole)
  assert [one.get('teacher_share') for one in found] == [1.0, 0.75, 0.5, 0.25, None, None]
  assert all(('teacher_kl' in one) == (one['step'] <= 4) for one in found)

  moved = tmp_path / 'moved'
  shutil.copytree(teacher_dir, moved)
  long = student(teacher_dir)
  train.run(dataclasses.replace(long, train=dataclasses.replace(long.train, steps=3)), str(parts))
  with pytest.raises(ConfigError, match='learns from a teacher until step 4, and is at step 3: give --teacher=DIR'):
    train.run(student(teacher_dir, model_dir=''), str(parts))
  shutil.rmtree(moved / 'checkpoints/5')
  with pytest.raises(ConfigError, match=r'fingerprint \w+; those of step 3 there have .* that it began with'):
    train.run(student(teacher_dir, model_dir=str(moved)), str(parts))
  train.run(student(teacher_dir, steps=5), str(parts))
  train.run(student(teacher_dir, model_dir=''), str(parts))  # which needs it no more
  assert records(parts) == found
  digests = [run_directory.read_meta(run_directory.resolve(path), 6)['arrays'] for path in (whole, parts)]
  assert digests[0] == digests[1]

  # The student of one is the teacher of the next; a share of 0 is a run without a teacher, bit for bit.
  train.run(student(teacher_dir, steps=2, model_dir=str(whole)), str(tmp_path / 'next'))
  assert 'teacher_kl' in records(tmp_path / 'next')[0]
  short = student(teacher_dir, steps=2)
  for name, given in (('none', dataclasses.replace(short.teacher, alpha=0.0)), ('plain', TeacherConfig())):
    train.run(dataclasses.replace(short, teacher=given), str(tmp_path / name))
  assert records(tmp_path / 'none') == records(tmp_path / 'plain') and 'teacher_kl' not in records(tmp_path / 'none')[0]


def test_the_program_after_the_teacher_has_no_teacher(teacher_dir):
  config = student(teacher_dir)
  mesh = test_step.mesh_lib.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  found = teachers.of_runs(config)
  steps = teachers.Steps(config, mesh, teachers.guide(found))
  assert found[0].step == 5 and 'teacher' in steps.of(4).abstract_frozen and not steps.of(5).abstract_frozen
  steps.load({}, found)
  weights = jax.tree.leaves(steps.at(4)[1])
  assert weights and steps.at(4)[0] is steps.guided
  assert steps.at(5) == (steps.plain, {}) and steps.guided is None and not steps._weights


@pytest.mark.parametrize('fields, message', [
    ({'schedule': 'curve'}, "TeacherConfig.schedule = 'curve': expected one of 'linear'"),
    ({'schedule': 'constant'}, "steps = 4 with TeacherConfig.schedule = 'constant'"),
    ({'schedule': 'step', 'steps': 0}, 'give their number'), ({'alpha': 1.5}, 'alpha = 1.5'),
    ({'temperature': 0.0}, 'temperature = 0.0'), ({'rest': 'renormalise'}, 'TeacherConfig.top_k, or leave'),
    ({'dtype': 'float16'}, "dtype = 'float16'")])
def test_bad_values(fields, message):
  with pytest.raises(ConfigError, match=message):
    with_teacher(**fields).validate()


def test_who_cannot_be_a_teacher_is_refused_in_a_line(teacher_dir, tmp_path):
  config = student(teacher_dir)
  before.check(config)
  words = tmp_path / 'words.txt'
  words.write_text((teacher_dir.parent / 'vocab.txt').read_text(encoding='utf-8').replace('\n一\n', '\n㐀\n'), encoding='utf-8')
  other = small_model.without_parameters(tmp_path, vocabularies.load(f'cpm2:{words}'))
  delta, domain = tmp_path / 'delta', tmp_path / 'domain'
  for path, fields in ((delta, {'delta': DeltaConfig(method='lora', base=str(teacher_dir))}), (domain, {'model': (
      dataclasses.replace(config.model, moe=MoEConfig(num_experts=4, router='domain')))})):
    with Manager(path, dataclasses.replace(config, **fields), info=run_directory.read_run(teacher_dir).info) as manager:
      manager.save(1, {'step': jnp.int32(1)})
  for given, message in [
      (student(teacher_dir, model_dir=str(other)), 'was trained with another vocabulary than'),
      (student(teacher_dir, model_dir=str(tmp_path / 'no')), 'No checkpoint in .*: the directory does not exist'),
      (student(teacher_dir, model_dir=str(delta)), 'holds no model, but a delta'),
      (student(teacher_dir, model_dir=str(domain)), "router 'domain'"),
      (student(teacher_dir, model_dir=''), 'there is none: give --teacher=DIR'),
      (dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=999)), 'set it to')]:
    with pytest.raises(ConfigError, match=message) as error:
      before.check(given)
    assert '\n' not in str(error.value), error.value
  with pytest.raises(ConfigError, match='tune a prompt without one'):
    dataclasses.replace(config, delta=DeltaConfig(method='prompt', base='x'), task=dataclasses.replace(
        config.task, objective='pairs')).validate()


def test_the_arithmetic_of_a_guided_step_is_its_own_and_a_pass_of_the_teacher():
  wide = dataclasses.replace(test_step.CONFIG.model, d_model=64, d_ff=96, remat='none')
  config = with_teacher(dataclasses.replace(test_step.CONFIG, model=wide, train=TrainConfig(batch_size=8, microbatches=2)))
  teacher = dataclasses.replace(wide, d_model=48, num_decoder_layers=1)
  built = test_step.build(config, teacher=teacher)
  executed = program.arithmetic(built.fn.trace(built.abstract_state, built.abstract_frozen, built.abstract_batch).jaxpr.jaxpr)
  needed = flops.model_flops(wide, 8 * 12, 8 * 8, 12, 8)
  assert plan._of_teacher(config, teacher) == pytest.approx(flops.model_flops(teacher, 8 * 12, 8 * 8, 12, 8) / 3)
  assert executed == pytest.approx(needed + plan._of_teacher(config, teacher), rel=0.01)


def test_a_plan_knows_the_teacher(teacher_dir):
  config = student(teacher_dir)
  model = teachers.model_of(config)
  assert model == run_directory.read_run(teacher_dir).config.model
  assert teachers.model_of(dataclasses.replace(config, teacher=TeacherConfig())) is None
  assert teachers.model_of(student(teacher_dir, cache='x')) == 'cached'
  with pytest.raises(ConfigError, match='give --teacher=DIR'):
    teachers.model_of(student(teacher_dir, model_dir=''))
  with pytest.raises(ConfigError, match='vocab_size = .* set it to'):
    teachers.model_of(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=9)))
  sizes, slice_ = estimate.sizes(config.model), slices.parse('v5p:1x1x1')
  guide = estimate.Guide(model, estimate.sizes(model))
  one = dataclasses.replace(config, mesh=MeshConfig(data=1))
  plain, guided = (estimate.estimate(one, slice_, 'train', sizes, *more) for more in ((), ([guide],)))
  logits = 4 * one.train.batch_size * one.task.decoder_length * model.vocab_size
  assert guided.bytes - plain.bytes == pytest.approx(4 * sum(guide.sizes.values()) + logits)
  assert guided.seconds > plain.seconds
