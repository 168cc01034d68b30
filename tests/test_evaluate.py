"""`eval`: each row and example once whatever the batch size, SeqIO metrics by hand, files and table, refusals."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest
import scipy.special
import small_data
import small_model

from t5x_cpm import inference, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError, LocalTaskConfig, MoEConfig
from t5x_cpm.inference import evaluate, text
from t5x_cpm.tasks import caches

PAIRS = [('一丁', '七'), ('abc', '丁'), ('x', 'y'), ('一', '一'), ('q q', 'z'), ('丄', '丅'), ('下', '一一')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('evaluate')


@pytest.fixture(scope='module')
def model_dir(folder):
  """A run with two checkpoints whose task is cached already, so that no TensorFlow is needed for it."""
  rng = np.random.default_rng(0)
  config = small_data.make_config(folder)
  vocabulary = small_data.fill(config, {split: {'targets': small_data.random_documents(rng, lengths)} for split, lengths in (
      ('train', [30] * 20), ('validation', [10, 25, 40, 7, 22, 9, 31, 50, 12]))})
  return small_model.model_dir(folder, vocabulary, steps=(3, 5), name='wiki_zh', cache_dir=str(folder))


def config_of(model_dir, **fields):
  config = run_directory.read_run(model_dir).config
  return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **fields))


def test_each_masked_token_counts_once(model_dir, capsys):
  results = evaluate.run(config_of(model_dir, batch_size=4), str(model_dir), ['wiki_zh'])
  got = results[5]['wiki_zh']
  # By hand: rows one by one.
  engine = inference.load(model_dir)
  config = evaluate.task_config(config_of(model_dir), 'wiki_zh')
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1))
  marks = {*engine.vocabulary.sentinels, engine.vocabulary.eos_id}
  apply = jax.jit(lambda params, batch: engine.program.functions.model.apply(params, batch)[0])
  loss, correct, count, rows, text_correct, text = 0.0, 0, 0, 0, 0, 0
  for batch in small_data.open_reader(config, 'validation').eval_batches():
    rows += 1
    logits = np.asarray(apply(engine.program.params, batch)[0], np.float64)
    log_probs = scipy.special.log_softmax(logits, axis=-1)
    for position, token in enumerate(batch['decoder_target_tokens'][0]):
      if batch['decoder_loss_weights'][0, position]:
        loss -= log_probs[position, token]
        correct += int(logits[position].argmax() == token)
        count += 1
        text += token not in marks
        text_correct += token not in marks and logits[position].argmax() == token
  assert 0 < text < count
  assert rows % 4, 'the last batch of 4 should be partial'
  assert got['targets'] == count
  assert got['loss'] == pytest.approx(loss / count, rel=1e-4)
  assert got['perplexity'] == pytest.approx(np.exp(loss / count), rel=1e-3)
  assert got['accuracy'] == pytest.approx(correct / count)
  assert got['text_accuracy'] == pytest.approx(text_correct / text)
  out = capsys.readouterr().out.splitlines()
  assert out[0].split() == ['step', '5', 'loss', 'perplexity', 'accuracy', 'text_accuracy', 'targets']
  assert out[1].split()[0] == 'wiki_zh' and len({len(line) for line in out}) == 1
  saved = json.loads((model_dir / 'eval' / '5' / 'metrics.json').read_text())
  assert saved['wiki_zh']['metrics'] == got


def test_all_checkpoints_or_one(model_dir):
  results = evaluate.run(config_of(model_dir, checkpoints='all', max_examples=4, batch_size=2), str(model_dir), ['wiki_zh'])
  assert sorted(results) == [3, 5]
  assert results[3]['wiki_zh']['loss'] != results[5]['wiki_zh']['loss']
  one = evaluate.run(config_of(model_dir, checkpoints='3', max_examples=4, batch_size=2), str(model_dir), ['wiki_zh'])
  assert one == {3: results[3]}


@pytest.mark.parametrize('damaged', [b'{"a": ', b'[]', b'{"a": 1}', b'{"a": {"metrics": []}}', b'\xff', b'{"a": "\\ud800"}',
                                     b'[' * 10**5, None])
def test_results_that_are_damaged_are_set_aside(tmp_path, capsys, damaged):
  path = tmp_path / 'eval' / '3' / 'metrics.json'
  path.parent.mkdir(parents=True)
  path.write_bytes(damaged) if damaged is not None else os.mkfifo(path)
  for name in ('a', 'b'):
    evaluate.write(tmp_path, 3, Config(), {name: ({'loss': 1.0}, [])})
  assert list(json.loads(path.read_text())) == ['a', 'b']
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and said.startswith(f'{path} is damaged (') and 'set aside as metrics.json.damaged' in said


def test_a_number_of_rows_does_not_depend_on_the_batch(model_dir, capsys):
  every = [evaluate.run(config_of(model_dir, max_examples=3, batch_size=size), str(model_dir), ['wiki_zh'])[5]['wiki_zh']
           for size in (1, 2, 4)]
  assert every[0]['targets'] == every[1]['targets'] == every[2]['targets']
  assert re.search(r'^eval: validation: 9 documents, \d+ pieces of at most \d+ tokens\neval: validation: '
                   r'EvalConfig.max_examples = 3 leaves out \d+ rows of \d+$', capsys.readouterr().err, re.MULTILINE)
  assert every[0]['loss'] == pytest.approx(every[1]['loss'], rel=1e-5) == pytest.approx(every[2]['loss'], rel=1e-5)


def test_what_cannot_be_evaluated_is_told(model_dir):
  with pytest.raises(ConfigError, match='did you mean.*wiki_zh'):
    evaluate.run(config_of(model_dir), str(model_dir), ['wiki_zhh'])
  with pytest.raises(ConfigError, match='No checkpoint of step 4'):
    evaluate.run(config_of(model_dir, checkpoints='4'), str(model_dir), ['wiki_zh'])
  with pytest.raises(ConfigError, match="no documents in split 'test'"):
    evaluate.run(config_of(model_dir, split='test'), str(model_dir), ['wiki_zh'])


@pytest.fixture(scope='module')
def pairs_task(folder):
  """A SeqIO task of another module: predictions, scores and both are measured; targets are postprocessed."""
  import seqio
  import tensorflow as tf

  from t5x_cpm.tasks import seqio_vocabulary

  adapter = seqio_vocabulary.SeqioVocabulary(vocabularies.load(f'cpm2:{folder / "vocab.txt"}'))
  seen = {}

  def source(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({'inputs': [a for a, _ in PAIRS], 'targets': [b for _, b in PAIRS]})  # type: ignore

  def hits(targets, predictions):
    seen['predict'] = (targets, predictions)
    return {'hits': sum(map(str.__eq__, targets, predictions)), 'note': seqio.metrics.Text('not a number')}

  def mean_score(targets, scores):
    seen['score'] = (targets, scores)
    return {'mean_score': seqio.metrics.Scalar(np.mean(scores))}

  seqio.TaskRegistry.add(
      'measured', seqio.FunctionDataSource(source, splits=['validation']),  # type: ignore
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={name: seqio.Feature(adapter, add_eos=True) for name in ('inputs', 'targets')},
      postprocess_fn=lambda value, example, is_target: value + ('!' if is_target else '?' * (len(example['inputs']) > 0)),
      metric_fns=[hits, mean_score])
  yield seen
  seqio.TaskRegistry.remove('measured')


def test_seqio_metrics_count_the_last_partial_batch_once(folder, pairs_task, tmp_path):
  vocabulary = vocabularies.load(f'cpm2:{folder / "vocab.txt"}')
  model_dir = small_model.model_dir(tmp_path, vocabulary, objective='pairs', name='measured')
  metrics = evaluate.run(config_of(model_dir, batch_size=4), str(model_dir), ['measured'])[3]['measured']
  engine = inference.load(model_dir)
  texts, targets = zip(*PAIRS)
  outputs, scores = engine.generate(texts), engine.score(texts, targets)
  assert pairs_task['predict'] == ([target + '!' for target in targets], [output + '?' for output in outputs])
  assert pairs_task['score'][1] == pytest.approx(scores, rel=1e-4)
  assert metrics == {'examples': 7.0, 'hits': 0.0, 'mean_score': pytest.approx(np.mean(scores), rel=1e-4)}
  records = [json.loads(line) for line in (model_dir / 'eval' / '3' / 'measured.jsonl').read_text().splitlines()]
  assert [(r['input'], r['target'], r['output'], r['prediction']) for r in records] == [
      (a, b + '!', c, c + '?') for a, b, c in zip(texts, targets, outputs)]
  with pytest.raises(ConfigError, match="no split 'test'.*validation"):
    evaluate.run(config_of(model_dir, split='test'), str(model_dir), ['measured'])


def test_a_model_that_fills_blanks_continues_the_inputs(folder, model_dir, pairs_task, capsys):
  evaluate.run(config_of(model_dir, batch_size=4, max_examples=5), str(model_dir), ['measured'])
  assert 'eval: validation: 5 examples; EvalConfig.max_examples = 5 leaves out the rest\n' in capsys.readouterr().err
  engine = inference.load(model_dir)
  texts, targets = zip(*PAIRS[:5])
  assert pairs_task['predict'][1] == [output + '?' for output in engine.generate(texts)]
  assert pairs_task['score'][1] == pytest.approx(engine.score(texts, targets), rel=1e-4)


@pytest.mark.parametrize('asked', ['pairs', 't5'])
def test_the_form_is_that_of_the_models_own_objective(model_dir, pairs_task, asked):
  """Whatever TaskConfig.objective says about how the file of a task is read."""
  import seqio

  config = config_of(model_dir)
  changed = dataclasses.replace(config, task=dataclasses.replace(config.task, objective=asked, name='measured'))
  engine, plain = inference.load(model_dir, config=changed), text.Codec(inference.load(model_dir).vocabulary, config)
  examples = evaluate.read_examples(seqio.TaskRegistry.get('measured'), engine, changed, {})
  requests = [plain.request(line) for line, _ in PAIRS]
  assert [example.request.ids for example in examples] == [request.ids for request in requests]
  assert [example.target_ids for example in examples] == [
      plain.targets(request, target) for request, (_, target) in zip(requests, PAIRS)]
  if asked == 't5':
    changed, config = (dataclasses.replace(given, task=dataclasses.replace(given.task, name='wiki_zh')) for given in (
        changed, config))
    few = dataclasses.replace(changed.eval, max_examples=4, batch_size=4)
    assert evaluate.evaluate_text(engine, dataclasses.replace(changed, eval=few)) == evaluate.evaluate_text(
        engine, dataclasses.replace(config, eval=few))


def test_another_vocabulary_is_refused(folder, pairs_task, tmp_path):
  lines = (folder / 'vocab.txt').read_text().splitlines()
  (tmp_path / 'vocab.txt').write_text('\n'.join(lines[:50] + lines[60:]) + '\n')
  other = vocabularies.load(f'cpm2:{tmp_path / "vocab.txt"}')
  model_dir = small_model.model_dir(tmp_path, other, objective='pairs')
  with pytest.raises(ConfigError, match='vocabulary'):
    evaluate.run(config_of(model_dir), str(model_dir), ['measured'])


@pytest.mark.slow
def test_a_copied_run_brings_its_vocabulary(tmp_path, capsys):
  """Neither the file that the run was trained with nor its cache is there, as on another machine."""
  (tmp_path / 'home').mkdir()
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path / "home")}')
  home = small_model.model_dir(tmp_path / 'home', vocabulary, name='local', cache_dir=str(tmp_path / 'home'))
  (tmp_path / 'text.txt').write_text('\n'.join('abc一丁七 xyz' * n for n in range(1, 30)))
  (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps({'inputs': a, 'targets': b}) + '\n' for a, b in PAIRS))

  def config_for(model_dir, cache, file='text.txt', objective='isolated'):
    config = config_of(model_dir, split='train', max_examples=3)
    return dataclasses.replace(
        config, task=dataclasses.replace(config.task, cache_dir=str(cache), objective=objective),
        local_task=LocalTaskConfig(files=str(tmp_path / file)))

  def results(model_dir, *given):
    return evaluate.run(config_for(model_dir, *given), str(model_dir), ['local'])

  at_home = results(home, tmp_path / 'home')
  assert len(list((tmp_path / 'home').glob('local-*/cache.json'))) == 1  # named by the file that the run was trained with
  assert 'read with the copy' not in capsys.readouterr().err
  pairs = results(home, tmp_path / 'home', 'pairs.jsonl', 'pairs')
  (tmp_path / 'home' / 'vocab.txt').unlink()
  assert results(home, tmp_path / 'home') == at_home  # from its cache alone
  assert 'read with the copy' not in capsys.readouterr().err
  *pieces, a, b = vocabulary.pieces[:-100]  # another vocabulary, for which a cache of the same name is made
  (tmp_path / 'home' / 'vocab.txt').write_text('\n'.join([*pieces, b, a, *vocabulary.pieces[-100:]]) + '\n')
  caches.build(config_for(home, tmp_path / 'home'), progress=False)
  assert results(home, tmp_path / 'home') == at_home
  assert capsys.readouterr().err.count(f'local is read with the copy in {home}') == 1
  copied = (tmp_path / 'home' / 'model').rename(tmp_path / 'away')
  assert results(copied, tmp_path / 'cache') == at_home
  assert results(copied, tmp_path / 'cache', 'pairs.jsonl', 'pairs') == pairs
  assert capsys.readouterr().err.count(f'local is read with the copy in {copied}') == 2


def with_domains(folder, objective):
  """An engine with an expert for each of two tasks, and the configuration that names their mixture, in this order: b, a."""
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}')
  files = {name: str(folder / f'{name}.jsonl') for name in 'ba'}
  for name, inputs in (('a', '一丁'), ('b', 'xyz')):
    lines = [json.dumps({'inputs': inputs * n, 'targets': 'x', 'text': inputs * n * 9}) for n in range(1, 4)]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  model_dir = small_model.model_dir(folder, vocabulary, objective=objective, name='local', cache_dir=str(folder),
                                    moe=MoEConfig(num_experts=2, router='domain', group_size=16))
  config = dataclasses.replace(config_of(model_dir), local_task=LocalTaskConfig(files=files, validation_files=files))
  return inference.load(model_dir, config=config), config


def test_each_pair_is_answered_by_the_expert_of_its_task(tmp_path):
  engine, config = with_domains(tmp_path, 'pairs')
  together = evaluate.evaluate_task(engine, config, 'local')
  assert together == {name: result for part in ('local:b', 'local:a')
                      for name, result in evaluate.evaluate_task(engine, config, part).items()}
  for number, (_, records) in enumerate(together.values()):
    by_expert = []
    for expert in (0, 1):
      infer = dataclasses.replace(config.infer, domain=expert)
      engine.codec = text.Codec(engine.vocabulary, dataclasses.replace(config, infer=infer))
      by_expert.append(engine.generate([record['input'] for record in records]))
    assert by_expert[0] != by_expert[1]
    assert [record['output'] for record in records] == by_expert[number]


def test_each_text_is_read_by_the_expert_of_its_task(tmp_path):
  engine, config = with_domains(tmp_path, 'isolated')
  whole, a, b = (evaluate.evaluate_task(engine, config, name)[name][0] for name in ('local', 'local:a', 'local:b'))
  total = a['loss'] * a['targets'] + b['loss'] * b['targets']
  assert whole['loss'] * whole['targets'] == pytest.approx(total, rel=1e-5)
