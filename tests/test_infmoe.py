"""A model whose experts come when they are needed answers what the model answers that has them all at hand."""

import dataclasses
import os
import random
import shutil
import threading
import time

import jax
import numpy as np
import pytest
import small_data
import small_model
import test_deltas
from test_bundle import configured

import t5x_cpm
from t5x_cpm import backend, inference, vocabularies
from t5x_cpm.config import ConfigError, MoEConfig, OffloadConfig
from t5x_cpm.inference.engine import Engine
from t5x_cpm.inference.streamed import Streamed
from t5x_cpm.infmoe import bundle, foresight, loader, run, stores, write

TEXTS = ['一<span>丁', 'abc', '一<span>丁abc', '丄丅<span>']
RULES = ({}, {'rule': 'beam', 'beam_size': 2}, {'rule': 'sample', 'seed': 3})
MOE = MoEConfig(num_experts=4, group_size=8, router='top_2', decoder_router='switch')


def make(folder, moe=MOE, format='float32', dense_format='float32', **task):
  """A model_dir, and a bundle of it."""
  model_dir = small_model.model_dir(folder, vocabularies.load(f'cpm2:{small_data.vocabulary_file(folder)}'), moe=moe, **task)
  write.write(configured(model_dir, format=format, dense_format=dense_format, group=0), model_dir, folder / 'bundle')
  return model_dir, folder / 'bundle'


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  return make(tmp_path_factory.mktemp('infmoe'))


@pytest.fixture(scope='module')
def engine(both):
  """The bundle, mapped: the reference of all that changes no bit."""
  return inference.load(both[1])


@pytest.fixture
def slots(both, engine):
  """The bundle with so many slots for all layers, and for each layer of the decoder."""
  made = []

  def open_slots(staging, kept, seconds=20.0, path=both[1], **fields):
    mapped = engine.program.run
    one = bundle.Bundle(path, mapped.stages.model)
    store = stores.Slots(one, jax.local_devices()[0], staging, {
        place: kept for place in one.places if place.stack == 'decoder'}, 3, seconds)
    made.append(store)
    return run.Run(mapped.stages, mapped.weights, store, OffloadConfig(**fields)), store

  yield open_slots
  for store in made:
    store.close()
  assert not [thread for thread in threading.enumerate() if thread.name == 't5x_cpm-read']


def check_same(model_dir, path, *, ours=None, rules=RULES, deltas=None):
  """The engine of a bundle in 'float32' gives what that of the checkpoint gives."""
  ours, theirs = ours or inference.load(path, deltas=deltas), inference.load(model_dir, deltas=deltas)
  names = [None, *(deltas or ())]
  delta = [names[number % len(names)] for number in range(len(TEXTS))]
  for rule in rules:
    a, b = (one.generate(TEXTS, max_new_tokens=5, delta=delta, **rule) for one in (ours, theirs))
    assert a == b
  np.testing.assert_allclose(*(one.score(TEXTS, ['丁', 'a', '丁', 'b'], delta=delta) for one in (ours, theirs)), rtol=1e-5)
  for a, b in zip(*(one.encode(TEXTS, delta=delta) for one in (ours, theirs))):
    np.testing.assert_allclose(a, b, atol=1e-4)
  return ours, theirs


@pytest.mark.parametrize('rules', [RULES[:1], pytest.param(RULES[1:], marks=pytest.mark.slow)])
def test_a_bundle_answers_as_its_checkpoint_does(both, engine, rules):
  ours, theirs = check_same(*both, ours=engine, rules=rules)
  assert list(ours.stream(TEXTS[0], max_new_tokens=4)) == list(theirs.stream(TEXTS[0], max_new_tokens=4))
  if rules != RULES[:1]:
    assert ours.choose(['一<span>'], [['丁', 'ab', '丄']]) == theirs.choose(['一<span>'], [['丁', 'ab', '丄']])
  with pytest.raises(ConfigError, match='a bundle, which has one step alone'):
    ours.read(both[1], 5)


@pytest.mark.slow
@pytest.mark.parametrize('moe', [
    MoEConfig(num_experts=4, group_size=8, router='base', shared_experts=1),
    MoEConfig(num_experts=4, group_size=8, router='random_projection', decoder_every=2),
    MoEConfig(num_experts=4, group_size=8, router='expert_choice', decoder_router='top_2', dispatch='einsum'),
    MoEConfig(num_experts=4, group_size=8, router='hash', decoder_router='loss_free'),
    MoEConfig(num_experts=4, group_size=8, router='prototypes', decoder_router='top_k')], ids=str)
def test_every_router_answers_as_its_checkpoint_does(tmp_path, moe):
  check_same(*make(tmp_path, moe), rules=RULES[:1])


@pytest.mark.slow
@pytest.mark.parametrize('format', ['bfloat16', 'int8', 'int4'])
def test_rounded_weights_give_nearly_the_same(tmp_path, format):
  model_dir, path = make(tmp_path, dataclasses.replace(MOE, decoder_every=2, shared_experts=1), format, dense_format=format)
  ours, theirs = inference.load(path), inference.load(model_dir)
  a, b = (np.array(one.score(TEXTS, ['丁', 'a', '丁', 'b'])) for one in (ours, theirs))
  assert 0 < abs(a - b).max() / abs(b).max() < {'bfloat16': 0.02, 'int8': 0.05, 'int4': 0.4}[format]


@pytest.mark.slow
def test_deltas_are_served(tmp_path):
  model_dir, path = make(tmp_path, dataclasses.replace(MOE, decoder_every=2), objective='pairs')
  deltas = {name: test_deltas.write(tmp_path / name, model_dir, test_deltas.DELTAS[name], 7)
            for name in ('poem', 'short', 'before', 'narrow')}
  ours, _ = check_same(model_dir, path, deltas=deltas)
  ours.remove_delta('poem')
  ours.add_delta('ia3', test_deltas.write(tmp_path / 'ia3', model_dir, test_deltas.DELTAS['ia3'], 7))
  assert ours.generate('一', delta='ia3')
  moe = dataclasses.replace(MOE, decoder_every=2)
  other = small_model.model_dir(tmp_path / 'other', ours.vocabulary, objective='pairs', moe=moe, steps=(4,))
  wrong = test_deltas.write(tmp_path / 'wrong', other, test_deltas.LORA, 7)
  with pytest.raises(ConfigError, match='was trained on a base with the fingerprint'):
    ours.add_delta('wrong', wrong)


def answers(one, config):
  """What a model answers, bit for bit."""
  engine = Engine(Streamed(one), config.vocabulary, config.config)
  found = [(answer.ids, answer.score) for rule in RULES[:2]
           for answer in engine.answers(TEXTS, engine.decode_config(max_new_tokens=5, **rule))]
  return found, engine.score(TEXTS, ['丁', 'a', '丁', 'b']), [x.tobytes() for x in engine.encode(TEXTS)]


@pytest.mark.parametrize('runs', [3, pytest.param(200, marks=pytest.mark.slow)])
def test_no_memory_and_no_timing_changes_a_bit(engine, slots, monkeypatch, runs):
  """Reads are slow, short or fail now and then."""
  expected = answers(engine.program.run, engine)
  seed = random.randrange(2**31)
  print(f'seed {seed}')
  rng, read, lock = random.Random(seed), loader.read, threading.Lock()

  def hostile(number, view, begin):
    with lock:
      what, seconds = rng.random(), rng.random() * 0.002
    time.sleep(seconds)
    if what < 0.02:
      raise OSError(5, 'a bad day')
    return read(number, view[:4096] if what < 0.3 else view, begin)

  monkeypatch.setattr(loader, 'read', hostile)
  monkeypatch.setattr(loader, 'WAIT', 0.001)
  monkeypatch.setattr(loader, 'ATTEMPTS', 9)
  for number in range(runs):
    staging, kept = rng.choice([2, 3, 5]), rng.choice([0, 1, 2, 3, 4])
    how = {'order': rng.choice(['index', 'longest_first']), 'read_ahead': rng.random() < 0.5, 'warm_up': rng.random() < 0.5,
           'guess': rng.choice(['auto', 'on', 'off'])}
    found, store = slots(staging, kept, **how)
    assert answers(found, engine) == expected, f'run {number}: {staging} slots, {kept} kept, {how}'
    assert (not kept) == (not store.counts.hits)
    store.close()


def test_experts_that_are_kept_are_not_read_again(engine, slots):
  found, store = slots(2, 4)
  answers(found, engine)
  before = store.loader.bytes, store.counts.misses
  assert before[1] <= 2 * 4
  config = engine.decode_config(max_new_tokens=5)
  Engine(Streamed(found), engine.vocabulary, engine.config).answers(TEXTS, config)
  size, _ = store.bundle.block(store.bundle.places[0])
  assert store.counts.misses == before[1] and (store.loader.bytes - before[0]) <= 4 * size  # the encoder's


def test_what_is_expected_is_there_before_it_is_asked_for(slots):
  _, store = slots(3, 2)
  first, other = bundle.Place('encoder', 0), bundle.Place('decoder', 1)

  def take(place, wanted):
    return sorted(loan.expert for loan in store.take(place, wanted))

  store.expect([(other, [1, 3])])
  assert take(first, [0]) == [0] and take(other, [3, 2]) == [2, 3]
  assert (store.counts.foreseen, store.counts.in_vain, store.counts.misses) == (1, 1, 1)
  store.expect([(first, [0, 1, 2])])  # as many as there are slots for all, which the decoder does not have to wait for
  assert take(other, [0, 1, 2, 3]) == [0, 1, 2, 3] and take(first, [2, 0, 3]) == [0, 2, 3]
  assert [(place, len(experts)) for place, experts in store.room()] == [(bundle.Place('decoder', 0), 2), (other, 0)]
  store.expect(store.room())
  assert take(first, [3]) == [3]
  before = store.counts.foreseen
  assert take(bundle.Place('decoder', 0), [0, 1]) == [0, 1] and store.counts.foreseen == before + 2


def test_guesses_are_used_where_they_pay():
  right, wrong = foresight.Foresight('auto'), foresight.Foresight('auto')
  assert right.looks(5) and not right.pays
  for number in range(foresight.ENOUGH):
    right.told([1, 2], [2])
    wrong.told([1], [1, 2] if number % 2 else [3])
  assert right.pays and right.recall == 1 and right.looks(5)
  assert not wrong.pays and wrong.recall == pytest.approx(0.25, abs=0.05) and not wrong.looks(5) and wrong.looks(32)
  assert foresight.Foresight('on').pays and not foresight.Foresight('off').looks(0)


def test_the_least_worth_is_thrown_out():
  kept = stores._Kept(['a', 'b'])
  for expert in (7, 3):
    kept.used([expert])
    kept.slots[expert] = kept.room([expert])
  for _ in range(3):
    kept.used([3])
  for _ in range(2):
    kept.used([7])
  assert kept.room([5]) == 'b' and 7 not in kept.slots  # used later, but less
  assert kept.room([3]) is None  # which is wanted now


def test_a_read_that_fails_is_told_and_the_next_request_answered(engine, slots, monkeypatch):
  found, store = slots(2, 1, seconds=0.5)
  expected = answers(engine.program.run, engine)
  read = loader.read
  monkeypatch.setattr(loader, 'WAIT', 0.001)

  def fails(number, view, begin):
    raise OSError(5, os.strerror(5))

  monkeypatch.setattr(loader, 'read', fails)
  with pytest.raises(ConfigError, match=r'expert \d of encoder layer 0 cannot be read from .*encoder-000.safetensors: '
                                        r'Input/output error .3 attempts'):
    answers(found, engine)
  hang = threading.Event()

  def hangs(number, view, begin):
    hang.wait(20)
    return read(number, view, begin)

  monkeypatch.setattr(loader, 'read', hangs)
  with pytest.raises(ConfigError, match='is not there after 0.5 s: reading .* hangs'):
    answers(found, engine)
  hang.set()
  monkeypatch.setattr(loader, 'read', read)
  time.sleep(0.1)
  assert answers(found, engine) == expected


def test_a_caller_that_stops_harms_no_other(engine, slots, monkeypatch):
  found, store = slots(2, 1)
  expected, expert = answers(engine.program.run, engine), found.stages.expert
  calls = []

  def stops(*given):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return expert(*given)

  with monkeypatch.context() as patched:
    patched.setattr(found.stages, 'expert', stops)
    with pytest.raises(KeyboardInterrupt) as kept:  # with its frames
      answers(found, engine)
  assert answers(found, engine) == expected, kept


def test_a_flipped_bit_is_found_when_an_expert_is_read_for_the_first_time(both, slots, tmp_path):
  path = shutil.copytree(both[1], tmp_path / 'copy')
  found, store = slots(2, 1, path=path)
  place = bundle.Place('decoder', 1)
  with open(path / place.file, 'r+b') as file:
    file.seek(store.bundle.begin(place, 3))
    file.write(b'flip')
  assert [loan.expert for loan in store.take(place, [0, 1])] == [0, 1]
  with pytest.raises(ConfigError, match='decoder-001.safetensors is damaged .the tensor experts/3/wi_0/kernel'):
    list(store.take(place, [1, 2, 3]))
  assert [loan.expert for loan in store.take(place, [0, 2])]


def test_memory_is_shared_out(both, monkeypatch, capfd):
  config = configured(both[0], format='float32')

  def load(**fields):
    return inference.load(both[1], config=dataclasses.replace(config, offload=OffloadConfig(format='float32', **fields)))

  load()
  assert 'experts: mapped, ' in capfd.readouterr().err
  with pytest.raises(ConfigError, match=r'memory_gib = 0.01: the model needs at least 0.064: .* of weights .* two experts of'):
    load(memory_gib=0.01)
  with pytest.raises(ConfigError, match='memory_gib = 100000.0: .* GiB are free on this machine'):
    load(memory_gib=100_000.0)
  with pytest.raises(ConfigError, match="memory_gib is for store = 'slots'"):
    OffloadConfig(memory_gib=1.0, store='mapped').validate()
  with pytest.raises(ConfigError, match="format = 'int8': .*bundle is stored with 'float32'"):
    inference.load(both[1], config=configured(both[0]))
  with pytest.raises(ConfigError, match='memory_gib = 1.0 is for a bundle, and .*model holds a checkpoint'):
    inference.load(both[0], memory_gib=1.0)
  engine = load(memory_gib=0.5)
  assert 'memory_gib is given' in (told := capfd.readouterr().err) and '3 for all layers, 4 of 4 kept' in told
  assert engine.generate(TEXTS) == inference.load(both[0]).generate(TEXTS)
  engine.close()
  monkeypatch.setattr(backend, 'free_memory', lambda: 1 << 27)
  monkeypatch.setattr(bundle.Bundle, 'size', 1 << 40)
  load().close()
  assert 'the bundle does not fit in memory' in capfd.readouterr().err


def test_buckets_are_few_and_hold_all():
  sizes = [run.bucket(count) for count in range(1, 5000)]
  assert all(size >= count for count, size in enumerate(sizes, 1)) and len(set(sizes)) < 25
  assert all(size <= max(run.FEWEST, 1.5 * count) for count, size in enumerate(sizes, 1))


def test_tokens_are_found_by_their_expert():
  expert_NK = np.array([[2, 0], [4, 2], [2, 1]])  # of 4; a choice of 4 is none
  found = run.tokens_of(expert_NK, 4)
  assert list(found) == [0, 1, 2]
  token_M, place_M = found[2]
  assert token_M.tolist() == [0, 1, 2, 0] and place_M.tolist() == [0, 3, 4, 9]
  assert found[1][1].tolist() == [5, 7, 8, 9]


def test_in_python(both):
  model = t5x_cpm.load(both[1], memory_gib=0.5)
  assert model.generate(TEXTS) == t5x_cpm.load(both[0]).generate(TEXTS)
  model.close()
