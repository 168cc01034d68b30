"""An engine on several devices answers as on one."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_data
import small_model

from t5x_cpm import inference, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import ConfigError, MeshConfig, MoEConfig
from t5x_cpm.inference import evaluate

TEXTS = ['一丁<span>丂七', 'ab<span>', '丄丅丆万<span>丈三<span>']
MESH = MeshConfig(cpu_devices=8, data=2, model=2, expert=2, sharding='full')


def everything(model_dir: pathlib.Path, mesh: MeshConfig) -> dict:
  """What an engine gives, as JSON."""
  config = dataclasses.replace(run_directory.read_run(model_dir).config, mesh=mesh)
  engine = inference.load(model_dir, config=config)
  streamed = [list(engine.stream(TEXTS[0], rule=rule, seed=7)) for rule in ('greedy', 'sample', 'beam')]
  kernels = jax.tree.leaves(engine.program.params['experts'])
  cache = engine.program.start(engine._request_batch([engine.codec.request(TEXTS[0])] * engine.whole(1)), 8)
  return {
      'devices': engine.program.functions.mesh.size,
      'split': sorted({x.sharding.shard_shape(x.shape) != x.shape for x in [*kernels, *jax.tree.leaves(cache)]}),
      'exact': [engine.generate(TEXTS), engine.generate(TEXTS, rule='beam', beam_size=3),
                engine.generate(TEXTS, rule='sample', seed=3), streamed, engine.choose(['一<span>'], [['丁', 'ab丂', '万']])],
      'scores': engine.score(['一<span>丂', '<span>丁<span>', 'a'], ['丁', ['a', 'b'], 'bc']),
      'hidden': [row.tolist() for row in engine.encode(TEXTS)],
      'text': evaluate.evaluate_text(engine, dataclasses.replace(
          config, task=dataclasses.replace(config.task, name='wiki_zh'), eval=dataclasses.replace(config.eval, batch_size=3)))}


@pytest.mark.slow
@pytest.mark.parametrize('moe', [{}, {'num_experts': 4, 'group_size': 8, 'router': 'top_2', 'decoder_router': 'switch'}])
def test_answers_on_a_mesh_are_those_of_one_device(tmp_path, moe):
  config = small_data.make_config(tmp_path)
  documents = small_data.random_documents(np.random.default_rng(0), [20] * 12)
  vocabulary = small_data.fill(config, {'validation': {'targets': documents}})
  model_dir = small_model.model_dir(tmp_path, vocabulary, moe=MoEConfig(**moe), cache_dir=str(tmp_path))
  alone = everything(model_dir, MeshConfig())
  code = (f'import json, pathlib, test_engine; '
          f'print(json.dumps(test_engine.everything(pathlib.Path({str(model_dir)!r}), test_engine.MESH)))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, env=os.environ | {
      'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), os.getcwd()])})
  assert done.returncode == 0, done.stderr[-3000:]
  meshed = json.loads(done.stdout.splitlines()[-1])
  assert (alone['devices'], meshed['devices']) == (1, 8)
  assert meshed['split'] == [True], 'a device holds all of an expert, of a feed-forward network, or of a cache'
  assert meshed['exact'] == alone['exact']
  np.testing.assert_allclose(meshed['scores'], alone['scores'], rtol=1e-5)
  for ours, theirs in zip(meshed['hidden'], alone['hidden'], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert meshed['text'] == pytest.approx(alone['text'], rel=1e-5)


def test_a_mesh_that_cannot_hold_the_model_is_refused(tmp_path):
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}')
  model_dir = small_model.without_parameters(tmp_path, vocabulary)
  config = run_directory.read_run(model_dir).config
  with pytest.raises(ConfigError, match='data=1, model=2, expert=1: the sizes must multiply to the number of devices'):
    inference.load(model_dir, config=dataclasses.replace(config, mesh=MeshConfig(data=1, model=2)))
