"""Runs with experts: what is trained and what is not, parts of a batch, and whole runs through the command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_training
import test_step

import t5x_cpm.inference
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import InferConfig, MoEConfig, OptimizerConfig


def with_experts(config=test_step.CONFIG, microbatches=1, **moe):
  model = dataclasses.replace(config.model, moe=MoEConfig(num_experts=4, group_size=24, **moe))
  return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, microbatches=microbatches))


@pytest.mark.parametrize('dispatch, router', [('einsum', 'loss_free'), ('dropless', 'top_k')])
def test_parts_of_a_batch_equal_the_whole(dispatch, router):
  options = {'router': router, 'dispatch': dispatch, 'router_z_loss': 0.1, 'encoder_every': 0}
  # AdamW would make a large step of the rounding of a gradient near 0.
  plain = dataclasses.replace(test_step.CONFIG, optimizer=OptimizerConfig(
      name='sgd', schedule='constant', learning_rate=0.1, warmup_steps=0))
  _, whole, losses = test_step.run(with_experts(plain, **options))
  _, parts, accumulated = test_step.run(with_experts(plain, microbatches=2, **options))
  np.testing.assert_allclose(accumulated, losses, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts['params'], whole['params'])


def test_centroids_never_change_and_biases_of_loss_free_move_by_their_rule_alone():
  """An encoder with a random projection, a decoder without a balance loss: one program for both."""
  config = with_experts(router='random_projection', decoder_router='loss_free', bias_rate=0.5)
  built, state, _ = test_step.run(config, steps=1)
  params, fresh = state['params'], built.init(jax.random.key(0))['params']
  np.testing.assert_array_equal(params['encoder']['routers']['centroids'], fresh['encoder']['routers']['centroids'])
  bias = np.abs(np.asarray(params['decoder']['routers']['bias']))
  assert set(bias.reshape(-1).tolist()) <= {0.0, 0.5} and bias.any()
  for stack in ('encoder', 'decoder'):
    assert not np.allclose(params['experts'][stack]['wo'], fresh['experts'][stack]['wo'])
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state['opt_state'])]
  assert not [path for path in paths if 'centroids' in path or "'bias'" in path]
  assert [path for path in paths if 'experts' in path]


def test_experts_of_other_domains_have_no_gradient():
  built = test_step.run(with_experts(router='domain'), steps=0)[0]
  batch = test_step.random_batch(with_experts(router='domain'), 0) | {'domain': np.full(8, 2, np.int32)}
  params = built.init(jax.random.key(0))['params']
  gradient = jax.jit(jax.grad(lambda p: built.model.apply(p, batch)[0].std()))(params)['experts']['decoder']['wo']
  assert np.abs(np.asarray(gradient)).max(axis=(0, 2, 3)).astype(bool).tolist() == [False, False, True, False]


def test_a_run_with_experts_resumes_and_answers(tmp_path, monkeypatch, capsys):
  """In this process; that a run ends and resumes in others is tested without experts."""
  small_training.write_run(tmp_path)
  monkeypatch.setenv('T5X_CPM_CACHE', str(tmp_path / 'cache'))

  def train(model_dir: str, steps: int, *flags: str) -> tuple[int, str, str]:
    capsys.readouterr()
    return main(small_training.command(tmp_path, model_dir, steps, *flags)[3:]), *capsys.readouterr()

  flags = [f'--gin.MoEConfig.{field}' for field in (
      'num_experts=2', 'group_size=48', 'router=loss_free', 'top_k=1', 'jitter=0.1', 'decoder_router=domain',
      'dispatch=dropless')]
  for model_dir, steps in (('experts', 6), ('experts_twice', 4)):
    code, _, error = train(model_dir, steps, *flags)
    assert code == 0, error
  code, out, error = train('experts_twice', 6, *flags)
  assert code == 0 and 'continuing' in out, error
  assert small_training.losses(tmp_path, 'experts') == small_training.losses(tmp_path, 'experts_twice')
  last = json.loads((tmp_path / 'experts' / 'metrics.jsonl').read_text().splitlines()[-2])
  assert np.asarray(last['router/encoder/load']).shape == (2, 2)
  np.testing.assert_allclose(np.sum(last['router/encoder/load'], axis=1), 1, rtol=1e-5)
  assert (tmp_path / 'experts' / 'experts.png').read_bytes().startswith(b'\x89PNG')
  code, _, error = train('experts', 7, *flags, '--gin.MoEConfig.jitter=0.2')
  assert code == 2 and 'MoEConfig.jitter: 0.1 in the checkpoint, 0.2 now' in error
  code, _, error = train('experts_of_three', 2, *flags, '--gin.MoEConfig.num_experts=3')
  assert code == 2 and "'local' has 2, MoEConfig.num_experts = 3" in error

  answers = set()
  for domain in (0, 1):
    config = dataclasses.replace(run_directory.read_run(tmp_path / 'experts').config, infer=InferConfig(domain=domain))
    model = t5x_cpm.inference.load(tmp_path / 'experts', config=config)
    answers.add(model.score(['今天<span>。'], ['下雨'])[0])
  assert len(answers) == 2
