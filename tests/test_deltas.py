"""Many deltas on one base: rows of a batch with different deltas are answered as each delta alone would."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import small_model
import test_tuning

import t5x_cpm
from t5x_cpm import inference, trees, tuning, vocabularies
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.cli import configure, modes, parse
from t5x_cpm.config import ConfigError, DeltaConfig, LocalTaskConfig, MeshConfig
from t5x_cpm.inference import engine as engine_lib
from t5x_cpm.inference import infer, lines, programs, text
from t5x_cpm.models.component import Weight
from t5x_cpm.tuning import merge

TEXTS = ['一丁', 'ab', '丄丅丆', '丈', '三', '上下', '不与', '丐']
LORA = DeltaConfig(method='lora', rank=3, alpha=12.0, sites=('query', 'value', 'mlp.wo'))
# Deltas of one form, but for their sizes; then one of each other method.
DELTAS = {
    'poem': LORA, 'sums': dataclasses.replace(LORA, rank=5, alpha=7.0, rank_stabilised=True), 'third': LORA,
    'short': DeltaConfig(method='prompt', prompt_length=3), 'long': DeltaConfig(method='prompt', prompt_length=11),
    'ia3': DeltaConfig(method='ia3'), 'bitfit': DeltaConfig(method='bitfit'),
    'narrow': DeltaConfig(method='adapter', bottleneck=2), 'wide': DeltaConfig(method='adapter', bottleneck=5),
    'before': DeltaConfig(method='prefix', prefix_length=3),
    'network': DeltaConfig(method='prefix', prefix_length=9, prefix_hidden=2),
    'parallel': DeltaConfig(method='adapter', bottleneck=5, adapter='parallel'),
    'both': DeltaConfig(method='prompt+lora', prompt_length=4)}


def write(folder, base_dir, delta, seed, *, objective='pairs', inputs_template='', **about):
  """A delta at random, as files, with other things about it."""
  run = run_directory.read_run(base_dir)
  config = dataclasses.replace(
      run.config, delta=delta, task=dataclasses.replace(run.config.task, objective=objective, name='local'),
      local_task=LocalTaskConfig(inputs_template=inputs_template))
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, leaf in trees.named(tuning.build_model(config).leaves()['delta']).items():
    shape = [size for size, axis in zip(leaf.shape, leaf.axes) if axis != 'slot']
    tensors[name] = (rng.normal(0, 0.5, shape) + name.endswith('scale')).astype(np.float32)
  base = tuning.find(base_dir)._replace(**{name: value for name, value in about.items() if name != 'vocabulary'})
  tuning.write(folder, tensors, config, base, step=4, vocabulary=about.get('vocabulary', run.info['vocabulary']), metrics={})
  return str(folder)


@pytest.fixture(scope='module')
def base_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('deltas')
  return small_model.model_dir(folder, vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}'), objective='pairs')


@pytest.fixture(scope='module')
def folders(base_dir):
  class Folders(dict):
    def __missing__(self, name):
      print(f'{name}: seed {list(DELTAS).index(name)}')
      self[name] = write(base_dir.parent / name, base_dir, DELTAS[name], list(DELTAS).index(name))
      return self[name]

  return Folders()


def configured(base_dir, delta=None, **fields):
  """The configuration of a run of a delta, in the place of that of its base."""
  config = run_directory.read_run(base_dir).config
  return dataclasses.replace(config, mesh=MeshConfig(), delta=dataclasses.replace(delta or config.delta, **fields))


@pytest.fixture(scope='module')
def engine(base_dir, folders):
  return inference.load(base_dir, deltas={name: folders[name] for name in ('poem', 'sums')})


def alone(base_dir, saved, plain):
  """The plain reference: the engine of one delta, all of whose rows use the first slot."""
  config = configured(base_dir, saved.config)
  functions = programs.build(config, plain.program.functions.mesh)
  axes = {name: leaf.axes.index('slot') for name, leaf in trees.named(functions.model.leaves()['delta']).items()}
  delta = trees.nested({name: np.expand_dims(tensor, axes[name]) for name, tensor in saved.tensors.items()})
  base = arrays.load_params(base_dir, into=plain.program.functions.stored)
  return engine_lib.Engine(programs.Resident(functions, functions.prepare(base | {'delta': delta})), plain.vocabulary, config)


def check_rows(base_dir, folders, names, calls=('score', 'encode', 'generate'), engine=None, **fields):
  """Rows with these deltas together give what an engine of each alone gives."""
  texts = TEXTS[:len(names)]
  engine = engine or inference.load(base_dir, deltas={name: folders[name] for name in names if name},
                                    config=configured(base_dir, **fields))
  engines = {None: engine_lib.Engine(engine.program, engine.vocabulary, engine.config)}  # which knows of no delta
  engines |= {name: alone(base_dir, tuning.read(folders[name]), engine) for name in set(names) - {None}}
  for call in calls:
    more = [texts] if call == 'score' else []
    found = getattr(engine, call)(texts, *more, delta=names)
    for number, (line, name) in enumerate(zip(texts, names)):
      one, = getattr(engines[name], call)(line, *[line for _ in more])
      if call == 'generate':
        assert found[number] == one, (line, name)
      else:
        np.testing.assert_allclose(found[number], one, rtol=1e-5, atol=1e-5, err_msg=f'{call} {line} {name}')
  return engine, engines


def test_rows_with_different_deltas_and_none(base_dir, folders, engine):
  _, engines = check_rows(base_dir, folders, ['poem', None, 'sums', 'poem'], calls=['score'], engine=engine)
  assert abs(engine.score('一', '丁', delta='poem')[0] - engines[None].score('一', '丁')[0]) > 0.1


@pytest.mark.slow
def test_every_call_takes_deltas(base_dir, folders):
  names = ['short', None, 'long', 'short']
  engine, engines = check_rows(base_dir, folders, names)
  plain = engines[None]
  assert engine.score(TEXTS, TEXTS) == plain.score(TEXTS, TEXTS)
  for rule in ('beam', 'sample'):
    found = engine.generate(TEXTS[:4], delta=names, rule=rule, seed=3)
    assert found[0] == engines['short'].generate(TEXTS[:4], rule=rule, seed=3)[0]
  streamed = engine.stream('一丁', delta='long')
  pieces = [next(streamed)]
  engine.add_delta('third', folders['short'])
  assert engine.generate('一丁', delta='third') == engine.generate('一丁', delta='short')  # while the stream goes on
  assert ''.join([*pieces, *streamed]) == engines['long'].generate('一丁')[0]
  assert engine.choose(['一'] * 2, [['丁', 'ab', '丄']] * 2, delta=['long', None]) == [
      engines[name].choose('一', ['丁', 'ab', '丄'])[0] for name in ('long', None)]


@pytest.mark.slow
def test_a_list_may_mix_all_methods(base_dir, folders):
  check_rows(base_dir, folders, ['poem', 'both', None, 'ia3', 'bitfit', 'narrow', 'wide', 'parallel'], calls=['score'], slots=1)
  check_rows(base_dir, folders, ['before', None, 'network', 'before'])


@pytest.mark.slow
def test_a_base_with_experts(tmp_path):
  vocabulary = vocabularies.load(f'cpm2:{small_data.vocabulary_file(tmp_path)}')
  moe = dataclasses.replace(test_tuning.EXPERTS, encoder_every=1)
  base_dir = small_model.model_dir(tmp_path, vocabulary, objective='pairs', moe=moe)
  folders = {name: write(tmp_path / name, base_dir, DELTAS[name], 7) for name in ('poem', 'third', 'short', 'before')}
  engine, _ = check_rows(base_dir, folders, ['poem', None, 'third', 'short', 'before'])
  inside = write(tmp_path / 'inside', base_dir, dataclasses.replace(LORA, sites=('experts', 'query')), 7)
  with pytest.raises(ConfigError, match=r"with DeltaConfig.sites = .*: such a delta cannot share a batch"):
    engine.add_delta('inside', inside)
  merge.merge(inside, str(tmp_path / 'merged'))
  np.testing.assert_allclose(inference.load(tmp_path / 'merged').score(TEXTS, TEXTS),
                             alone(base_dir, tuning.read(inside), engine).score(TEXTS, TEXTS), rtol=1e-5)


@pytest.mark.slow
def test_a_method_of_ones_own_shares_a_batch_with_its_like(base_dir):
  def make(config):
    scale = config.alpha  # `change` depends on a field: deltas with another value are another form
    return tuning.Method(
        lambda site: {'scale': Weight((1,), (None,), lambda key, shape: jnp.ones(shape))} if site.name == 'self' else {},
        lambda weights, x, y: y * scale * weights['scale'][:, None].astype(y.dtype))

  tuning.register('louder', make)
  try:
    given = {name: DeltaConfig(method='louder', alpha=alpha) for name, alpha in (('a', 1.0), ('b', 1.0), ('c', 2.0))}
    folders = {name: write(base_dir.parent / name, base_dir, delta, 9 + ord(name)) for name, delta in given.items()}
    engine, _ = check_rows(base_dir, folders, ['a', None, 'b', 'c'], calls=['score'])
    assert len(engine.deltas._groups) == 2
  finally:
    del tuning.METHODS['louder']


def test_what_cannot_be_served_is_refused(base_dir, folders, engine, tmp_path):
  other = {name: write(tmp_path / name, base_dir, LORA, 0, **about) for name, about in {
      'base': {'fingerprint': 'f00d'}, 'words': {'vocabulary': 'f00d'}}.items()}
  cut, fewer = tmp_path / 'cut', dict(sorted(tuning.read(folders['poem']).tensors.items())[1:])
  tuning.write(cut, fewer, configured(base_dir, LORA),
               tuning.find(base_dir), step=1, vocabulary=engine.vocabulary.fingerprint, metrics={})
  for use, message in [
      (lambda: engine.generate(TEXTS, delta='peom'), "expected 'poem', 'sums', or None for the base alone. Did you mean poem"),
      (lambda: engine.score('一', '一', delta=['poem', None]), '2 names for 1 texts'),
      (lambda: engine.generate(['一'], delta=[3]), 'generate: delta: 3 (int): expected the name of a delta'),
      (lambda: engine.stream('一', delta='third'), "delta = 'third'"),
      (lambda: engine.remove_delta('third'), "remove_delta: delta = 'third'"),
      (lambda: engine.add_delta('poem', folders['sums']), "two deltas have the name 'poem'"),
      (lambda: engine.add_delta('', folders['sums']), 'expected a text that is not empty'),
      (lambda: engine.add_delta('x', 3), 'add_delta: model_dir = 3 (int)'),
      (lambda: engine.add_delta('x', tmp_path), 'holds no delta'),
      (lambda: engine.add_delta('x', cut), '/lora/a is missing'),
      (lambda: engine.add_delta('x', other['words']), 'was trained with another vocabulary (f00d)'),
      (lambda: t5x_cpm.load(base_dir, deltas={'x': other['base']}), 'a base with the fingerprint f00d'),
      (lambda: t5x_cpm.load(base_dir, deltas=[folders['poem']]), 'expected a dict from names to folders'),
      (lambda: configured(base_dir, slots=0).validate(), 'DeltaConfig.slots = 0')]:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
      use()
    assert '\n' not in str(error.value)
  assert engine.deltas.names == ('poem', 'sums')


@pytest.fixture
def compiled():
  """Counts what is compiled."""
  events = []

  def listen(name, *_, **__):
    if name == '/jax/core/compile/backend_compile_duration':
      events.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield lambda: len(events)
  jax.monitoring.unregister_event_duration_listener(listen)


def test_deltas_come_and_go_without_compiling(base_dir, folders, compiled):
  # Two slots for three deltas of one form: the one that was not used for longest gives way, and comes back as it was.
  engine = inference.load(base_dir, config=configured(base_dir, slots=2), deltas={'poem': folders['poem']})
  wanted = {'poem': engine.score(TEXTS[:2], TEXTS[:2], delta='poem')}
  before = compiled()
  assert before
  for name in ('sums', 'third'):
    engine.add_delta(name, folders[name])
    wanted[name] = engine.score(TEXTS[:2], TEXTS[:2], delta=name)
  group, = engine.deltas._groups.values()
  assert list(group._slots) == ['sums', 'third']
  assert len({tuple(scores) for scores in wanted.values()}) == 3
  for name in ('sums', 'poem', 'third'):
    assert engine.score(TEXTS[:2], TEXTS[:2], delta=name) == wanted[name]
  assert list(group._slots) == ['poem', 'third']
  names = ['third', 'sums', 'poem', 'third', 'sums', 'poem']  # more deltas than slots: in batches of two deltas or fewer
  batches = list(engine.deltas.together(names, 4))
  assert [[names[row] for row in batch] for batch in batches] == [['third', 'third', 'sums', 'sums'], ['poem', 'poem']]
  assert list(engine.deltas.together(['', 'poem', ''], 2)) == [[0, 2], [1]]
  engine.remove_delta('third')
  engine.add_delta('third', folders['sums'])
  assert engine.score(TEXTS[:2], TEXTS[:2], delta=['third', 'poem']) == pytest.approx([wanted['sums'][0], wanted['poem'][1]])
  assert compiled() == before
  wide = write(base_dir.parent / 'large', base_dir, dataclasses.replace(LORA, rank=9), 3)
  engine.add_delta('large', wide)  # what is wider than all before makes room for itself
  assert engine.score(TEXTS[:2], TEXTS[:2], delta='poem') == pytest.approx(wanted['poem'])
  assert compiled() > before


LINES = [('一', 'poem'), ('丁', None), ('ab', 'peom'), ('ab', 3), ('七', ''), ('丄', 'sums')]


def test_lines_of_a_file_name_their_delta(base_dir, folders, engine, tmp_path, capsys, monkeypatch):
  path, out = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  path.write_text(''.join(json.dumps({'text': line} | ({} if name is None else {'delta': name})) + '\n'
                          for line, name in LINES))
  given, calls = {name: folders[name] for name in ('poem', 'sums')}, []
  monkeypatch.setattr(inference, 'load', lambda *_, deltas, **__: calls.append(deltas) or engine)

  def run(deltas=given, path=path):
    modes.run(parse.parse(['infer', f'--model_dir={base_dir}', f'--input={path}', f'--output={out}',
              *(f'--delta={name}={folder}' for name, folder in deltas.items())], modes.MODES))

  run()
  told = capsys.readouterr().err
  assert "in.jsonl:3: delta = 'peom': expected 'poem', 'sums', or none. 2 such lines are left unanswered." in told
  records = [json.loads(line) for line in out.read_text().splitlines()]
  assert [record.get('delta') for record in records] == [name for _, name in LINES]
  assert [bool(record.get('note')) for record in records] == [False, False, True, True, False, False]
  assert calls == [given]
  good = [(line, name, record) for (line, name), record in zip(LINES, records) if not record.get('note')]
  assert [record['output'] for *_, record in good] == engine.generate(
      [line for line, *_ in good], delta=[name for _, name, _ in good])
  out.write_text(out.read_text().splitlines(keepends=True)[0])  # as if it had been killed
  for deltas, file, message in [
      (given | {'poem': folders['third']}, path, 'deltas.poem: '), ({}, path, 'deltas: '),
      (given, path.with_suffix('.txt'), 'expected a .jsonl, whose lines name their delta'),
      ({'poem': ''}, path, 'expected --delta=NAME=DIR'), ({'': 'x'}, path, 'expected --delta=NAME=DIR'),
      ({'a=b': ''}, path, "b= holds no delta"), ({'poem': 'x'}, path, 'x holds no delta')]:
    with pytest.raises(ConfigError, match=re.escape(message)):
      run(deltas, file)
  with pytest.raises(ConfigError, match="the name 'a' is given twice, for x and y"):
    configure.named_folders('delta', ['a=x', 'a=y'])


def test_lines_have_the_fields_of_their_delta(base_dir, tmp_path):
  given = {name: write(tmp_path / name, base_dir, DELTAS['short'], 0, inputs_template=template)
           for name, template in {'pairs': '{a}<prompt>{b}', 'words': '“{word}”', 'plain': ''}.items()}
  run = run_directory.read_run(base_dir)
  words = vocabularies.load_saved(base_dir / 'vocabulary', run.info['vocabulary'])
  codecs, templates, _ = infer.read_deltas(given, str(base_dir), run, words, run.config)
  (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in (
      {'a': '一', 'b': 2, 'delta': 'pairs'}, {'word': '丁', 'delta': 'words'}, {'text': '丁', 'delta': 'words'},
      {'text': '丁', 'delta': 'plain'}, {'a': '一', 'delta': 'pairs'}, {'word': '丁', 'delta': 'plain'}, {'word': '丁'})))
  read = list(lines.read_lines(tmp_path / 'in.jsonl', 'in', 'text', {'': None, **templates}))
  assert [line.text for line in read] == ['一<prompt>2', '“丁”', '丁', '丁', '', '', '']
  assert "no field 'b'" in read[4].error and "inputs_template of the delta 'pairs'" in read[4].error
  assert all("'text'" in line.error for line in read[5:])
  requests = [request for _, request in lines.checked(iter(read[:4]), text.Codec(words, run.config), codecs)]
  first_vector = run.config.model.vocab_size
  assert [request.ids.index(first_vector) for request in requests] == [1, 0, 0, 0]
