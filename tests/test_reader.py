"""The reader against plain loops; every piece once an epoch; the same rows for any number of processes."""

import collections
import dataclasses
import time

import numpy as np
import pytest
import small_data

from t5x_cpm import vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import ConfigError
from t5x_cpm.data import cache, objectives, pieces
from t5x_cpm.data.rows import FIXED_SEED
from t5x_cpm.tasks import caches

ISOLATED = {'encoder_length': 64, 'decoder_length': 24}


def make_reader(folder, documents, *, split='train', **options):
  config = small_data.make_config(folder, **options)
  features = documents if isinstance(documents, dict) else {'targets': documents}
  small_data.fill(config, {split: features})
  return small_data.open_reader(config, split), config


def segments(batch, side):
  """Each row's segments as lists of (inputs or tokens, targets) of the side."""
  rows = []
  for row in range(len(batch['encoder_segment_ids'])):
    ids = batch[f'{side}_segment_ids'][row]
    names = ['encoder_input_tokens'] if side == 'encoder' else ['decoder_input_tokens', 'decoder_target_tokens']
    rows.append([tuple(batch[name][row][ids == number].tolist() for name in names) for number in range(1, ids.max() + 1)])
  return rows


def restore(encoder, targets, sentinels):
  """Undoes the corruption of a piece: its tokens."""
  noise, current = {}, None
  for token in targets:
    if token in sentinels:
      current = noise.setdefault(token, [])
    else:
      current.append(token)
  return [x for token in encoder for x in (noise[token] if token in sentinels else [token])]


def check_padding(batch, vocabulary):
  for side, names in (('encoder', ['encoder_input_tokens']), ('decoder', ['decoder_input_tokens', 'decoder_target_tokens'])):
    ids, positions = batch[f'{side}_segment_ids'], batch[f'{side}_positions']
    for name in names:
      assert batch[name].dtype == np.int32
      assert (batch[name][ids == 0] == vocabulary.pad_id).all()
    for row, position in zip(ids, positions):
      used = row[row > 0]
      assert (np.diff(used) >= 0).all() and (row[len(used):] == 0).all()
      assert position.tolist() == [i for n in range(1, row.max() + 1) for i in range((row == n).sum())] + [0] * (row == 0).sum()
  np.testing.assert_array_equal(batch['decoder_loss_weights'] > 0, batch['decoder_segment_ids'] > 0)
  assert (batch['encoder_segment_ids'].max(1) == batch['decoder_segment_ids'].max(1)).all()


@pytest.mark.parametrize('mean_length, number', [(6, 300), (200, 40)])
def test_every_piece_once_an_epoch_with_new_masks_and_neighbours(tmp_path, mean_length, number):
  seed = 4
  rng = np.random.default_rng(seed)
  documents = small_data.random_documents(rng, 1 + rng.geometric(1 / mean_length, number))
  read, _ = make_reader(tmp_path, documents, batch_size=1, **ISOLATED)
  sentinels, eod = set(read.vocabulary.sentinels), read.vocabulary.eos_id
  whole = [token for document in documents for token in (*document, eod)]
  epochs, first_rows = [], []
  for epoch in range(2):
    pieces, rows = collections.Counter(), []
    for step in range(int(read.rows_per_epoch)):
      batch = read.batch(step + epoch * int(read.rows_per_epoch))
      check_padding(batch, read.vocabulary)
      rows.append(tuple(sorted(tuple(restore(e[0], d[1], sentinels)) for e, d in
                               zip(segments(batch, 'encoder')[0], segments(batch, 'decoder')[0]))))
      pieces.update(rows[-1])
    assert sum(len(piece) * n for piece, n in pieces.items()) == len(whole), f'seed {seed}'
    text = ' '.join(map(str, whole)) + ' '
    assert all(' '.join(map(str, piece)) + ' ' in text for piece in pieces)
    assert sum(n for piece, n in pieces.items() if piece[-1] == eod) == len(documents)
    epochs.append(pieces)
    first_rows.append(rows)
  assert epochs[0] == epochs[1], f'seed {seed}'
  assert first_rows[0] != first_rows[1]
  if mean_length == 6:  # neighbours change where several pieces have the same length
    assert len(set(first_rows[0]) & set(first_rows[1])) < 0.2 * len(first_rows[0])
  assert (read.batch(0)['encoder_input_tokens'] != read.batch(int(read.rows_per_epoch))['encoder_input_tokens']).any()


def test_a_segment_is_the_corrupted_piece_with_its_own_numbering(tmp_path):
  """One document that fits one row: start, sentinels from 0, final sentinel, against the plain loop of the objective."""
  rng = np.random.default_rng(0)
  document = rng.integers(20, 1000, 40).tolist()
  read, _ = make_reader(tmp_path, [document], batch_size=1, **ISOLATED)
  batch = read.batch(0)
  ((encoder,),), ((inputs, targets),) = segments(batch, 'encoder')[0], segments(batch, 'decoder')[0]
  used = [token for token in encoder if token in read.vocabulary.sentinels]
  assert used == list(read.vocabulary.sentinels[:2])  # round(41 * 0.15) = 6 noise tokens in 2 spans
  assert [t for t in targets if t in read.vocabulary.sentinels] == list(read.vocabulary.sentinels[:3])
  assert targets[-1] == read.vocabulary.sentinels[2] and [*encoder, *targets].count(read.vocabulary.eos_id) == 1
  assert inputs == [read.vocabulary.bos_id, *targets[:-1]]
  assert restore(encoder, targets, set(read.vocabulary.sentinels)) == [
      *document, read.vocabulary.eos_id]


def test_t5_format_has_no_end_of_document_and_closes_with_eos(tmp_path):
  rng = np.random.default_rng(0)
  documents = small_data.random_documents(rng, rng.integers(1, 90, 60))
  read, _ = make_reader(tmp_path, documents, batch_size=4, objective='t5', **ISOLATED)
  sentinels, eos = set(read.vocabulary.sentinels), read.vocabulary.eos_id
  tokens = 0
  for batch in read.eval_batches():
    check_padding(batch, read.vocabulary)
    for row_e, row_d in zip(segments(batch, 'encoder'), segments(batch, 'decoder')):
      for (encoder,), (_, targets) in zip(row_e, row_d, strict=True):
        assert encoder[-1] == targets[-1] == eos and eos not in encoder[:-1] + targets[:-1]
        tokens += len(restore(encoder[:-1], targets[:-1], sentinels))
  assert tokens == sum(len(d) for d in documents if len(d) > 1)
  assert read.statistics()['tasks']['wiki_zh']['too_short'] == sum(len(d) == 1 for d in documents)


def test_rows_do_not_depend_on_the_number_of_processes_or_on_what_was_read_before(tmp_path):
  rng = np.random.default_rng(1)
  documents = small_data.random_documents(rng, rng.integers(1, 150, 200))
  for objective in ('isolated', 'cpm2', 't5'):
    read, config = make_reader(tmp_path, documents, objective=objective, **ISOLATED)
    for step in (0, 7, 10**9):
      whole = read.batch(step)
      fresh = small_data.open_reader(config, 'train')
      for processes in (2, 4, 8):
        size = 8 // processes
        parts = [fresh.batch(step, slice(i * size, (i + 1) * size)) for i in range(processes)]
        for name, value in whole.items():
          np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))
      some = np.array([1, 2, 6])
      assert all((value == whole[name][some]).all() for name, value in fresh.batch(step, some).items())
    other = small_data.open_reader(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1)), 'train')
    assert (other.batch(0)['encoder_input_tokens'] != read.batch(0)['encoder_input_tokens']).any()
    assert other.fingerprint != read.fingerprint
    before = {name: value for name, value in read.fingerprint.items() if name != 'spans'}  # as earlier versions wrote it
    assert run_directory.info_differences(before, read.fingerprint, 'data') == [
        'data.spans: (nothing) in the checkpoint, "anywhere in a piece; earlier versions always masked its end" now'
    ] * (objective == 'isolated')


def plain_cpm2_rows(folder, lengths, documents, config, vocabulary):
  """The released preprocessing and loader as loops, on the masks and the order that the index draws."""
  task = config.task
  kept = [i for i in range(len(documents)) if len(documents[i]) >= 10]
  kept.sort(key=lambda i: int(objectives.combine(FIXED_SEED, i)))
  context = []  # tokens, or the list of a span's tokens where it stood
  for i in kept:
    tokens = [*documents[i], vocabulary.eos_id]
    noise, spans = objectives.noise_counts(np.array([len(tokens)]), task.noise_density, task.mean_span_length)
    drawn = objectives.draw_spans(objectives.combine(FIXED_SEED, [i]), np.array([len(tokens)]), noise, spans)
    position = 0
    for start, length in zip(drawn.start, drawn.length):
      context += tokens[position:start] + [tokens[start:start + length]]
      position = start + length
    assert position == len(tokens)  # the end of document is in the last span
  rows = []
  for begin in range(0, len(context), task.encoder_length):
    window = context[begin:begin + task.encoder_length]
    encoder, stream, number = [], [vocabulary.bos_id], 0
    for token in window:
      if isinstance(token, list):
        encoder.append(vocabulary.sentinels[number])
        stream += [vocabulary.sentinels[number], *token]
        number += 1
      else:
        encoder.append(token)
    stream.append(vocabulary.sentinels[number])
    stream = stream[:task.decoder_length + 1]
    weights = [0.0 if token == vocabulary.eos_id else 1.0 for token in stream[:-1]]
    pad = [vocabulary.pad_id] * (task.decoder_length + 1 - len(stream))
    encoder += [vocabulary.pad_id] * (task.encoder_length - len(encoder))
    rows.append((tuple(encoder), tuple(stream[:-1] + pad), tuple(stream[1:] + pad), tuple(weights + [0.0] * len(pad))))
  return rows


@pytest.mark.parametrize('decoder_length', [40, 20])
def test_cpm2_streams_equal_a_plain_loop(tmp_path, decoder_length):
  for seed in range(3):
    rng = np.random.default_rng(seed)
    documents = small_data.random_documents(rng, rng.integers(1, 120, 120))
    folder = tmp_path / str(seed)
    folder.mkdir()
    read, config = make_reader(folder, documents, objective='cpm2', batch_size=5, encoder_length=64,
                               decoder_length=decoder_length)
    expected = plain_cpm2_rows(folder, None, documents, config, read.vocabulary)
    got = collections.Counter()
    for batch in read.eval_batches():
      for row in range(5):
        if batch['encoder_segment_ids'][row].any():
          assert set(batch['encoder_segment_ids'][row]) <= {0, 1}
          assert (batch['encoder_positions'][row][batch['encoder_segment_ids'][row] > 0] == np.arange(
              (batch['encoder_segment_ids'][row] > 0).sum())).all()
          got[tuple(tuple(batch[name][row].tolist()) for name in (
              'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights'))] += 1
    assert got == collections.Counter(expected), f'seed {seed}'
    statistics = read.statistics()['tasks']['wiki_zh']
    assert statistics['too_short'] == sum(len(d) < 10 for d in documents)
    full = [row for row in expected if row[0][-1] != read.vocabulary.pad_id]
    assert statistics['decoder_slots_used'] == sum(t != read.vocabulary.pad_id for row in full for t in row[2])


def test_cpm2_training_reads_every_token_equally_often(tmp_path):
  """Windows go on over the end of the stream: after as many epochs as a window has tokens, all counts are equal."""
  documents = [list(range(20 + 30 * i, 50 + 30 * i)) for i in range(9)]
  read, config = make_reader(tmp_path, documents, objective='cpm2', batch_size=1, encoder_length=37, decoder_length=30)
  part = read.components[0]
  assert part.total % 37  # else borders would not move
  assert part.rows_per_epoch == part.total // 37
  counts = collections.Counter()
  for step in range(part.total):  # 37 passes over the stream
    batch = read.batch(step)
    counts.update(t for t in batch['encoder_input_tokens'][0].tolist() if t not in read.vocabulary.sentinels)
  assert set(counts.values()) == {37}
  del config


@pytest.mark.parametrize('objective', ['isolated', 't5', 'cpm2'])
def test_a_vocabulary_without_sentinels_is_for_pairs_alone(tmp_path, monkeypatch, objective):
  plain = cache.Cache.vocabulary

  def vocabulary(self):
    found = plain(self)
    found.sentinels = ()  # as CPM-1's
    return found

  monkeypatch.setattr(cache.Cache, 'vocabulary', vocabulary)
  with pytest.raises(ConfigError, match=f"objective = '{objective}' marks .*has none .*only TaskConfig.objective = 'pairs'"):
    make_reader(tmp_path, [[20] * 30], objective=objective)
  pairs = {'inputs': [[20] * 30], 'targets': [[21] * 5]}
  assert make_reader(tmp_path, pairs, objective='pairs', name='wiki_en')[0].rows_per_epoch == 1


def test_cpm2_with_too_many_sentinels_is_refused(tmp_path):
  rng = np.random.default_rng(0)
  with pytest.raises(ConfigError, match='more than the 100 sentinels.*encoder_length'):
    make_reader(tmp_path, small_data.random_documents(rng, [900]), objective='cpm2', noise_density=0.5, mean_span_length=1.0,
                encoder_length=512)


def test_pairs_keep_their_sides_together(tmp_path):
  seed = 2
  rng = np.random.default_rng(seed)
  inputs = small_data.random_documents(rng, rng.integers(1, 40, 150))
  targets = small_data.random_documents(rng, rng.integers(1, 30, 150))
  read, _ = make_reader(tmp_path, {'inputs': inputs, 'targets': targets}, objective='pairs', batch_size=1,
                        encoder_length=32, decoder_length=24)
  eos, bos = read.vocabulary.eos_id, read.vocabulary.bos_id
  expected = collections.Counter((tuple(i[:31] + [eos]), tuple((t + [eos])[:24])) for i, t in zip(inputs, targets))
  for epoch in range(2):
    got = collections.Counter()
    for step in range(int(read.rows_per_epoch)):
      batch = read.batch(step + epoch * int(read.rows_per_epoch))
      check_padding(batch, read.vocabulary)
      for (encoder,), (decoder_inputs, decoder_targets) in zip(segments(batch, 'encoder')[0], segments(batch, 'decoder')[0]):
        assert decoder_inputs == [bos, *decoder_targets[:-1]]
        got[tuple(encoder), tuple(decoder_targets)] += 1
    assert got == expected, f'seed {seed}'
  found, whole = read.statistics()['tasks']['wiki_zh'], sum(len(i) <= 31 and len(t) <= 23 for i, t in zip(inputs, targets))
  assert found['truncated'] == len(inputs) - whole > 0
  assert found['cut'] == (sum(len(i) > 31 for i in inputs), sum(len(t) > 23 for t in targets))
  assert found['decoder_slots_used'] == sum(min(len(t) + 1, 24) for t in targets)
  assert 'cut_targets' in read.fingerprint


def test_evaluation_reads_each_row_once_and_fills_the_last_batch_with_nothing(tmp_path):
  rng = np.random.default_rng(0)
  documents = small_data.random_documents(rng, rng.integers(1, 90, 150))
  read, config = make_reader(tmp_path, documents, split='validation', batch_size=7, **ISOLATED)
  rows = int(read.rows_per_epoch)
  assert rows % 7
  batches = list(read.eval_batches())
  assert len(batches) == -(-rows // 7) and all(batch['decoder_loss_weights'].shape == (7, 24) for batch in batches)
  empty = rows % 7
  for name in ('encoder_segment_ids', 'decoder_segment_ids', 'decoder_loss_weights'):
    assert not batches[-1][name][empty:].any() and batches[-1][name][:empty].any(axis=1).all()
  sentinels = set(read.vocabulary.sentinels)
  tokens = sum(len(restore(e[0], d[1], sentinels)) for batch in batches for row_e, row_d in
               zip(segments(batch, 'encoder'), segments(batch, 'decoder')) for e, d in zip(row_e, row_d))
  assert tokens == sum(map(len, documents)) + len(documents)
  other = small_data.open_reader(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=9)), 'validation')
  for some in (np.array([0, 3, 6]), np.array([6])):  # of the last batch, the last rows are empty
    for whole, part in zip(batches, read.eval_batches(0, some), strict=True):
      assert all((value == whole[name][some]).all() for name, value in part.items())
  for a, b in zip(batches, other.eval_batches(), strict=True):  # masks and order do not depend on the seed of the run
    np.testing.assert_array_equal(a['encoder_input_tokens'], b['encoder_input_tokens'])
  assert len(list(read.eval_batches(2))) == 2


def test_a_mixture_has_exact_counts_and_its_parts_their_own_epochs(tmp_path):
  rng = np.random.default_rng(0)
  config = small_data.make_config(tmp_path, name='wiki_zh_en', batch_size=6, **ISOLATED)
  parts = []
  for name, low, number in (('wiki_zh', 20, 40), ('wiki_en', 500, 90)):
    part = dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))
    small_data.fill(part, {'train': {'targets': [rng.integers(low, low + 400, 65).tolist() for _ in range(number)]}})
    parts.append((name, {'wiki_zh': 2.0, 'wiki_en': 1.0}[name], caches.directory(part)))
  path = caches.directory(config)
  cache.finish_mixture(path, 'wiki_zh_en', parts)
  read = small_data.open_reader(config, 'train')
  share = read.statistics()['tasks']
  assert share['wiki_zh']['share_of_rows'] == pytest.approx(2 / 3) and share['wiki_zh']['rows_per_epoch'] == 40
  period = int(read.mixer.counts.sum())
  order, seen = [], collections.Counter()
  for step in range(2 * period // 6):
    batch = read.batch(step)
    for row in range(6):
      (encoder,), (_, targets) = segments(batch, 'encoder')[row][0], segments(batch, 'decoder')[row][0]
      piece = restore(encoder, targets, set(read.vocabulary.sentinels))
      order.append(piece[0] < 500)
      seen[tuple(piece)] += 1
  assert sum(order[:period]) * 3 == 2 * period and sum(order) * 3 == 4 * period
  assert order[:period] == order[period:] and order[:30] != sorted(order[:30])
  zh = [n for piece, n in seen.items() if piece[0] < 500]
  en = [n for piece, n in seen.items() if piece[0] >= 500]
  assert len(zh) == 40 and max(zh) - min(zh) <= 1 and len(en) == 90 and max(en) - min(en) <= 1


@pytest.mark.parametrize('length', [30, 42, 57])
def test_documents_that_fill_rows_badly_are_cut_shorter(tmp_path, length):
  """Of 42 tokens with the end of document 38 slots are left, of 64: two do not fit, and a third of the row is wasted."""
  rng = np.random.default_rng(0)
  documents = small_data.random_documents(rng, [length] * 200)
  read, _ = make_reader(tmp_path, documents, batch_size=4, **ISOLATED)
  found = read.statistics()
  assert found['encoder_efficiency'] > 0.85
  longest = objectives.longest_piece(64, 24, 0.15, 3.0, small_data.SENTINELS, t5=False)
  assert found['tasks']['wiki_zh']['longest_piece'] in [longest // part for part in (1, 2, 3, 4)]
  np.testing.assert_array_equal(
      pieces.histogram(np.array([length] * 200), longest, True).nonzero()[0],
      np.unique(pieces.cut(np.array([length + 1]), longest)[2]))


def test_document_of_one_token(tmp_path):
  """With its end of document it is a piece of two tokens; T5's format has no such end and leaves it out."""
  read, _ = make_reader(tmp_path, [[30], [40, 41]], batch_size=1, **ISOLATED)
  batch = next(iter(read.eval_batches()))
  found = {(tuple(e[0]), tuple(d[1])) for e, d in zip(segments(batch, 'encoder')[0], segments(batch, 'decoder')[0])}
  s = read.vocabulary.sentinels
  assert ((30, s[0]), (s[0], read.vocabulary.eos_id, s[1])) in found
  folder = tmp_path / 't5'
  folder.mkdir()
  with pytest.raises(ConfigError, match="no document to train on: 1 document .1 too short for a mask., 0 pieces"):
    make_reader(folder, [[30]], objective='t5', **ISOLATED)


def test_what_does_not_fit_together_is_refused(tmp_path):
  documents = [[30, 31, 32]]
  with pytest.raises(ConfigError, match="objective = 'pairs', but task 'wiki_zh' has text only"):
    make_reader(tmp_path, documents, objective='pairs')
  with pytest.raises(ConfigError, match="has no documents in split 'validation'"):
    small_data.open_reader(small_data.make_config(tmp_path), 'validation')
  other = tmp_path / 'other'
  other.mkdir()
  file = small_data.vocabulary_file(other)
  file.write_text(file.read_text(encoding='utf-8').replace('!', '\u00e9', 1), encoding='utf-8')
  with pytest.raises(ConfigError, match='set TaskConfig.vocabulary to the vocabulary of the model'):
    small_data.open_reader(small_data.make_config(tmp_path), 'train', vocabulary=vocabularies.load(f'cpm2:{file}'))


def test_speed_and_seek(tmp_path):
  """A tenth of the promised speed: the machine of a test may be busy. tools/benchmarks/reader_speed.py measures it."""
  rng = np.random.default_rng(0)
  config = small_data.make_config(tmp_path, batch_size=32)
  lengths = np.clip(rng.poisson(50, 200_000), 1, None)
  vocabulary = vocabularies.load(config.task.vocabulary)
  tokens = rng.integers(20, 1000, lengths.sum())
  small_data.write_cache(config, vocabulary, {'train': {'targets': (tokens, lengths)}})
  read = small_data.open_reader(config, 'train')
  begin = time.perf_counter()
  read.batch(10**12)
  assert time.perf_counter() - begin < 1.0
  begin = time.perf_counter()
  for step in range(10):
    read.batch(step)
  assert 10 * 32 * (512 + 128) / (time.perf_counter() - begin) > 1e5
