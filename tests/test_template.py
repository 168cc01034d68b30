"""Templates of a JSON line: what they make of its fields, the places of a prompt, and targets between sentinels."""

import dataclasses
import json
import re

import numpy as np
import pytest
import small_data
import test_tuning

from t5x_cpm import inference, tuning
from t5x_cpm.config import Config, ConfigError, DeltaConfig, LocalTaskConfig, TaskConfig, template
from t5x_cpm.config.template import FieldError
from t5x_cpm.data.cache import DataError
from t5x_cpm.inference import evaluate, infer, lines, text
from t5x_cpm.tasks import caches
from t5x_cpm.training import train as training
from t5x_cpm.vocabularies import load

base_dir = test_tuning.base_dir
V = 1200  # ModelConfig.vocab_size
ROOM = (24, 8)


def test_fields_fill_a_template():
  read = template.parse('“{a}”{{与}}“{b}”{a}', 'T')
  assert read.fields == ('a', 'b') and read.marks == 0
  assert read.fill({'a': '<prompt>{b}', 'b': 3, 'c': []}) == '“<prompt>{b}”{与}“3”<prompt>{b}'
  assert template.parse('{a} {b}', 'T').fill({'a': True, 'b': 0.5}) == 'true 0.5'
  assert template.parse('x{a}<prompt>', 'T').fill({'a': ' '}) == ''
  for values, message in (({'a': 'x'}, "no field 'b' among"), ({'a': 'x', 'b': None}, "'b' is neither"),
                          ({'a': [1], 'b': ''}, "'a' is neither"), ({'a': '\ud800', 'b': ''}, 'surrogate')):
    with pytest.raises(FieldError, match=message):
      read.fill(values)
  with pytest.raises(FieldError, match='<prompt> in it'):
    template.parse('<prompt>{a}', 'T').fill({'a': 'b<prompt>'})
  for wrong, message in (('{a', 'written twice'), ('a}', 'written twice'), ('{}', 'plain name'), ('{a.b}', 'plain name'),
                         ('{a!r}', '{a!r}'), ('{a:3}', '{a:3}'), ('{0}', 'plain name'), ('text', 'no field')):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
      template.parse(wrong, 'LocalTaskConfig.inputs_template')
    assert 'LocalTaskConfig.inputs_template = ' in str(error.value)


def pairs_config(folder, inputs_template, *, lengths=(), targets='{label}', form='text', batch_size=2, **fields) -> Config:
  config = small_data.make_config(folder, name='local', batch_size=batch_size, objective='pairs', encoder_length=ROOM[0],
                                  decoder_length=ROOM[1], target_form=form)
  delta = DeltaConfig(method='prompt', base='base', lengths=lengths) if lengths else DeltaConfig()
  return dataclasses.replace(
      config, delta=delta, model=dataclasses.replace(config.model, vocab_size=V), local_task=LocalTaskConfig(
          files=str(folder / 'pairs.jsonl'), inputs_template=inputs_template, targets_template=targets, **fields))


def write_pairs(folder, rng, count=40):
  """Lines with two sentences of up to 20 letters, and a number."""
  records = [{**{name: ''.join(chr(0x4e00 + n) for n in rng.integers(0, 900, rng.integers(1, 20))) for name in 'ab'},
              'label': int(rng.integers(0, 100))} for _ in range(count)]
  lines_ = [json.dumps(record, ensure_ascii=False) for record in records]
  (folder / 'pairs.jsonl').write_text('\n'.join(lines_) + '\n', encoding='utf-8')
  return records


def expected(config, record, vocabulary):
  """The plain reference: one pair as lists, from the description alone."""
  vector, ids, left = V, [], ROOM[0] - config.delta.prompts - 1
  pieces = config.local_task.inputs_template.format_map({**record, 'label': str(record['label'])}).split('<prompt>')
  parts = list(config.delta.lengths)
  if parts and len(pieces) == 1:
    pieces = ['', *pieces]
  for number, piece in enumerate(pieces):
    if number and parts:
      ids += range(vector, vector + parts[number - 1])
      vector += parts[number - 1]
    tokens = vocabulary.encode(piece)[:left]
    left -= len(tokens)
    ids += tokens
  label = vocabulary.encode(str(record['label']))
  if config.task.target_form == 'span':
    first, second = vocabulary.sentinels[:2]
    return (*ids, first), (first, *label, second)[:ROOM[1]]
  return (*ids, vocabulary.eos_id), (*label, vocabulary.eos_id)[:ROOM[1]]


def segments(batch, name, side):
  for tokens, numbers in zip(batch[name], batch[f'{side}_segment_ids']):
    for number in range(1, numbers.max() + 1):
      yield tuple(tokens[numbers == number].tolist())


CASES = [('{a}与{b}', ()), ('{a}与{b}', (4,)), ('<prompt>{a}与{b}', (4,)), ('{a}<prompt>{b}', (4,)), ('{a}{b}<prompt>', (4,)),
         ('<prompt>{a}<prompt>{b}', (2, 2)), ('{a}<prompt>{b}<prompt>', (3, 1)), ('<prompt>{a}<prompt>{b}<prompt>', (1, 2, 3)),
         ('<prompt>一、{a}<prompt>；二、{b}', (2, 2)), ('<prompt>{a}<prompt>{b}', ())]


@pytest.mark.parametrize('form', ['text', 'span'])
def test_rows_and_requests_have_prompts_in_their_places(tmp_path, form):
  rng = np.random.default_rng(4)
  print('seed 4')
  records = write_pairs(tmp_path, rng)
  names = set()
  for inputs, lengths in CASES:
    config = pairs_config(tmp_path, inputs, lengths=lengths, form=form, validation_fraction=0.0)
    config.validate()
    reader = small_data.open_reader(config, 'train')
    names.add(caches.directory(config).name)
    vocabulary = reader.vocabulary
    wanted = {expected(config, record, vocabulary) for record in records}
    found = set()
    for step in range(40):
      batch = reader.batch(step)
      for inputs_ids, targets, before in zip(segments(batch, 'encoder_input_tokens', 'encoder'),
                                             segments(batch, 'decoder_target_tokens', 'decoder'),
                                             segments(batch, 'decoder_input_tokens', 'decoder')):
        assert before == (vocabulary.bos_id, *targets[:-1])
        found.add((inputs_ids, targets))
    assert found == wanted, (inputs, lengths)
    assert reader.components[0].summarize()['encoder_slots_used'] == sum(len(a) for a, _ in (
        expected(config, record, vocabulary) for record in records))
    # What inference reads is what training read.
    limits = dataclasses.replace(config.infer, input_length=ROOM[0] - config.delta.prompts, truncate=True)
    codec = text.Codec(vocabulary, dataclasses.replace(config, infer=limits))
    read = lines.read_lines(tmp_path / 'pairs.jsonl', 'pairs.jsonl', 'text', {'': lines.template_of(config)})
    for line, record in zip(read, records, strict=True):
      ids = expected(config, record, vocabulary)
      marked = config.marks > 0
      assert codec.task_request(line.text, None if marked else vocabulary.encode(line.text)).ids == list(ids[0])
      if lengths:
        request = codec.request(line.text)
        assert tuple(request.ids) == ids[0]
        assert tuple(codec.targets(request, str(record['label']))) == ids[1]
        assert codec.output(request, ids[1])[0] == str(record['label'])
  assert len(names) == len({inputs for inputs, _ in CASES})  # prompts of all lengths read one cache


def test_the_decoder_reads_its_prompt_before_its_start(tmp_path):
  records = write_pairs(tmp_path, np.random.default_rng(6), 20)
  config = pairs_config(tmp_path, '{a}<prompt>', lengths=(2,), validation_fraction=0.0)
  config = dataclasses.replace(config, delta=dataclasses.replace(config.delta, decoder_prompt_length=3),
                               task=dataclasses.replace(config.task, decoder_length=12))
  reader = small_data.open_reader(config, 'train')
  vocabulary, batch = reader.vocabulary, reader.batch(0)
  prefix = (V + 2, V + 3, V + 4, vocabulary.bos_id)
  assert text.Codec(vocabulary, config).prefix == prefix
  labels = {tuple(vocabulary.encode(str(record['label']))) for record in records}
  for inputs, targets, weights in zip(*(list(segments(batch, f'decoder_{name}', 'decoder'))
                                        for name in ('input_tokens', 'target_tokens', 'loss_weights'))):
    assert inputs[:4] == prefix and targets[-1] == vocabulary.eos_id and targets[3:-1] in labels
    assert weights == (0.0,) * 3 + (1.0,) * (len(targets) - 3) and inputs[4:] == targets[3:-1]
    assert max(targets) < V
  with pytest.raises(ConfigError, match=re.escape('DeltaConfig.decoder_prompt_length = 9 leaves 3')):
    delta = dataclasses.replace(config.delta, decoder_prompt_length=9)
    small_data.open_reader(dataclasses.replace(config, delta=delta), 'train')


def test_what_does_not_fit_is_refused(tmp_path):
  for config, message in (
      (pairs_config(tmp_path, '{a}<prompt>', lengths=(2, 2)), 'has 1 places <prompt>'),
      (pairs_config(tmp_path, '{a}', lengths=(2, 2)), 'as many places <prompt>'),
      (pairs_config(tmp_path, '{a', lengths=(2,)), 'LocalTaskConfig.inputs_template'),
      (pairs_config(tmp_path, '{a}', targets='<prompt>{label}'), 'stands in inputs alone'),
      (dataclasses.replace(pairs_config(tmp_path, '{a}'), delta=DeltaConfig(method='prompt', lengths=(0,))), 'at least 1'),
      (Config(task=TaskConfig(target_form='span')), "target_form = 'span' is a form of pairs")):
    with pytest.raises(ConfigError, match=re.escape(message)):
      config.validate()
  (tmp_path / 'pairs.jsonl').write_text('{"a": "x", "label": 1}\n{"b": "x", "label": 1}\n')
  with pytest.raises(DataError, match=re.escape("pairs.jsonl:2: no field 'a' among ['b', 'label']")):
    caches.build(pairs_config(tmp_path, '{a}', validation_fraction=0.0))


@pytest.mark.slow
def test_a_run_with_a_prompt_in_two_places_answers_lines_with_fields(base_dir, tmp_path):
  records = write_pairs(tmp_path, np.random.default_rng(5), 20)
  delta = DeltaConfig(method='prompt', lengths=(2, 3), prompt_init='random', decoder_prompt_length=2)
  config = test_tuning.tuned(base_dir, delta=delta, steps=1)
  own = dataclasses.replace(config.local_task, files=str(tmp_path / 'pairs.jsonl'), inputs_template='<prompt>{a}<prompt>{b}',
                            targets_template='{label}', validation_fraction=0.5)
  config = dataclasses.replace(config, local_task=own, task=dataclasses.replace(
      config.task, target_form='span', encoder_length=64))
  training.run(config, str(tmp_path / 'run'))
  assert tuning.read(tmp_path / 'run').tensors['prompt/table'].shape[0] == 7
  engine = inference.load(tmp_path / 'run')
  config = dataclasses.replace(engine.config, eval=dataclasses.replace(engine.config.eval, split='validation'))
  metrics, told = evaluate.evaluate_task(engine, config, 'local')['local']
  assert metrics['examples'] == len(told) > 0 and 'exact_match' in metrics
  infer.run(config, str(tmp_path / 'run'), str(tmp_path / 'pairs.jsonl'), str(tmp_path / 'out.jsonl'))
  answers = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text(encoding='utf-8').splitlines()]
  assert [answer['a'] for answer in answers] == [record['a'] for record in records]
  one = f'<prompt>{records[0]["a"]}<prompt>{records[0]["b"]}'
  assert engine.generate(one) == [answers[0]['output']]
  assert engine.encode(one)[0].shape[0] == len(load(config.task.vocabulary).encode(records[0]['a'] + records[0]['b']))
  with pytest.raises(ConfigError, match=re.escape('has 0 times <prompt>, and the prompt of the model 2 parts')):
    engine.generate('一')
