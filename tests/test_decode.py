"""Decoding rules against slow plain ones, on a small function that plays the model."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from t5x_cpm.config import DecodeConfig, ModelConfig
from t5x_cpm.inference import decode

V, STOP, PAD, START = 11, 2, 0, 1


class Toy:
  """A model whose logits depend on the row, and on every token and its position.

  Its cache is the text so far, written at the positions; what lies at later positions does not count, as in a Transformer.
  """

  def __init__(self, seed: int, rows: int, length: int, vocab: int = V, sharpness: float = 1.5):
    rng = np.random.default_rng(seed)
    self.row_RV = 2 * rng.normal(size=(rows, vocab)).astype(np.float32)
    self.weight_TVV = rng.normal(size=(length, vocab, vocab)).astype(np.float32) * sharpness
    self.length = length

  def cache(self, rows) -> dict:
    rows = np.asarray(rows)
    return {'row': jnp.asarray(rows)[None], 'text': jnp.full((1, len(rows), self.length), 7, jnp.int32)}

  def step(self, cache, tokens_BT, positions_BT):
    row, text = cache['row'][0], cache['text'][0]
    text = text.at[jnp.arange(text.shape[0])[:, None], positions_BT].set(tokens_BT)
    weight_BTL = (jnp.arange(self.length) <= positions_BT[:, :, None]) / jnp.sqrt(positions_BT + 1.0)[..., None]
    each = jnp.asarray(self.weight_TVV)[jnp.arange(self.length), text]  # [B, length, V]
    logits = jnp.asarray(self.row_RV)[row][:, None] + jnp.einsum('BTL,BLV->BTV', weight_BTL, each)
    return logits, {'row': row[None], 'text': text[None]}

  def log_probs(self, row: int, tokens: list[int]) -> np.ndarray:
    """log p(next | tokens), computed plainly."""
    logits = self.row_RV[row] + sum(self.weight_TVV[i, t] for i, t in enumerate(tokens)) / math.sqrt(len(tokens))
    return np.asarray(scipy.special.log_softmax(logits.astype(np.float64)))


def take(cache, rows):
  return jax.tree.map(lambda leaf: leaf[:, rows], cache)


@functools.cache
def compiled(toy, rule):
  return jax.jit(functools.partial(decode.while_loop, toy.step, rule=rule, take=take))


def drive(toy, rule, rows, prefixes=None, stop=(STOP,), driver='while', **options):
  """Lists of generated tokens, and scores."""
  prefixes = prefixes or [[START]] * len(rows)
  width = max(map(len, prefixes))
  prefix_BP = jnp.asarray([p + [-1] * (width - len(p)) for p in prefixes], jnp.int32)
  stop_BE = jnp.asarray([stop] * len(rows), jnp.int32) if stop and np.ndim(stop[0]) == 0 else jnp.asarray(stop, jnp.int32)
  if driver == 'while':
    out = compiled(toy, rule)(toy.cache(rows), prefix_BP=prefix_BP, stop_BE=stop_BE, **options)
  else:
    *_, state = decode.python_loop(jax.jit(toy.step), toy.cache(rows), rule, prefix_BP, stop_BE, take=take, **options)
    out = rule.result(state)
  padded = np.asarray(out.tokens)
  return [t[:n].tolist() for t, n in zip(padded, out.length)], np.asarray(out.score), padded


def plain_greedy(toy, row, prefix, steps, stop=(STOP,), allowed=None):
  tokens, score = list(prefix), 0.0
  for _ in range(steps):
    log_prob = toy.log_probs(row, tokens)
    token = int(np.argmax(log_prob if allowed is None else np.where(allowed, log_prob, -np.inf)))
    tokens.append(token)
    score += log_prob[token]
    if token in stop:
      break
  return tokens[len(prefix):], score


def plain_beam(toy, row, prefix, steps, width, length_penalty, early_stopping, stop=(STOP,)):
  """Beam search with lists: the definition of the docstring of decode.Beam, word for word."""
  opened, pool = [(0.0, list(prefix))], []
  for step in range(1, steps + 1):
    ranked = [(score + log_prob, text + [token])
              for score, text in opened for token, log_prob in enumerate(toy.log_probs(row, text))]
    ranked = sorted(ranked, key=lambda pair: -pair[0])[:(1 + len(stop)) * width]
    ended = [text[-1] in stop or step == steps for _, text in ranked]
    pool += [(score / step**length_penalty, text) for (score, text), end in list(zip(ranked, ended))[:width] if end]
    pool = sorted(pool, key=lambda pair: -pair[0])[:width]
    opened = [pair for pair, end in zip(ranked, ended) if not end][:width]
    if step == steps:
      break
    if len(pool) == width and (early_stopping or opened[0][0] / step**length_penalty <= pool[-1][0]):
      break
  return pool[0][1][len(prefix):], pool[0][0]


@pytest.mark.parametrize('driver', ['while', 'python'])
def test_greedy_is_the_plain_loop(driver):
  toy = Toy(0, rows=6, length=12)
  prefixes = [[START], [START, 5, 6], [START, 9], [START], [START, 3, 3], [START, 4]]
  tokens, scores, padded = drive(toy, decode.Greedy(max_new_tokens=8, pad_id=PAD), range(6), prefixes, driver=driver)
  lengths = set()
  for row in range(6):
    want, score = plain_greedy(toy, row, prefixes[row], 8)
    assert tokens[row] == want
    assert scores[row] == pytest.approx(score, abs=1e-4)
    assert (padded[row, len(want):] == PAD).all()
    lengths.add(len(want))
  assert len(lengths) > 2, 'the example does not stop at different places'


def test_stop_tokens_of_each_row_and_allowed_tokens():
  toy = Toy(1, rows=4, length=12)
  rule = decode.Greedy(max_new_tokens=8)
  allowed = np.ones((4, V), bool)
  allowed[:, PAD] = False
  allowed[2, 3:8] = False
  stop = [[STOP, -1], [STOP, 4], [-1, -1], [9, 10]]
  tokens, scores, _ = drive(toy, rule, range(4), stop=stop, allowed=jnp.asarray(allowed))
  for row in range(4):
    want, score = plain_greedy(toy, row, [START], 8, stop[row], allowed[row])
    assert tokens[row] == want
    assert scores[row] == pytest.approx(score, abs=1e-4)
  assert len(tokens[2]) == 8 and not set(tokens[2]) & {PAD, 3, 4, 5, 6, 7}


@pytest.mark.parametrize('early_stopping', [False, True])
@pytest.mark.parametrize('length_penalty', [1.0, 0.0, 2.0, -0.5])
def test_beam_is_the_plain_search(length_penalty, early_stopping):
  rows, shorter = 12, 0
  toy = Toy(2, rows=rows, length=12)
  rule = decode.Beam(max_new_tokens=7, width=4, length_penalty=length_penalty, early_stopping=early_stopping)
  tokens, scores, _ = drive(toy, rule, range(rows), [[START]] * 6 + [[START, 5]] * 6)
  for row in range(rows):
    want, score = plain_beam(toy, row, [START] if row < 6 else [START, 5], 7, 4, length_penalty, early_stopping)
    assert tokens[row] == want, row
    assert scores[row] == pytest.approx(score, abs=1e-4)
    shorter += len(want) < 7
  assert shorter, 'no row of the example stops early'


def test_beam_with_two_stop_tokens_and_allowed_tokens_and_python_loop():
  toy = Toy(3, rows=5, length=10)
  rule = decode.Beam(max_new_tokens=6, width=3)
  stop = [[STOP, 5]] * 5
  tokens, _, _ = drive(toy, rule, range(5), stop=stop)
  assert tokens == [plain_beam(toy, row, [START], 6, 3, 1.0, False, (STOP, 5))[0] for row in range(5)]
  assert tokens == drive(toy, rule, range(5), stop=stop, driver='python')[0]
  allowed = np.ones(V, bool)
  allowed[[0, 1, 4, 6, 8]] = False
  kept, _, _ = drive(toy, rule, range(5), stop=stop, allowed=jnp.asarray(allowed))
  assert kept != tokens and all(allowed[t] for row in kept for t in row)


def test_wide_beam_finds_the_best_of_all_sequences():
  vocab, steps = 4, 4
  toy = Toy(4, rows=3, length=6, vocab=vocab)
  rule = decode.Beam(max_new_tokens=steps, width=vocab**(steps - 1), length_penalty=0.0)
  tokens, scores, _ = drive(toy, rule, range(3), stop=(STOP,))
  for row in range(3):
    best = (-np.inf, [])
    for text in itertools.product(range(vocab), repeat=steps):
      text = list(text[:text.index(STOP) + 1] if STOP in text else text)
      score = sum(toy.log_probs(row, [START, *text[:i]])[t] for i, t in enumerate(text))
      best = max(best, (score, text))
    assert tokens[row] == best[1]
    assert scores[row] == pytest.approx(best[0], abs=1e-4)


def test_beam_of_one_is_greedy():
  toy = Toy(5, rows=4, length=12)
  one = drive(toy, decode.Beam(max_new_tokens=8, width=1, early_stopping=True), range(4))[0]
  assert one == drive(toy, decode.Greedy(max_new_tokens=8), range(4))[0]


def plain_distribution(log_probs, temperature, top_k, top_p):
  """The definition with a sort."""
  p = scipy.special.softmax(log_probs / temperature)
  order = np.argsort(-p)
  if top_k:
    p[order[top_k:]] = 0
    p /= p.sum()
  if top_p < 1:
    needed = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    p[order[needed:]] = 0
    p /= p.sum()
  return p


@pytest.mark.parametrize(
    ('temperature', 'top_k', 'top_p'), [(0.6, 0, 1.0), (1.5, 4, 1.0), (1.0, 0, 0.7), (1.3, 6, 0.8)])
def test_sampling_draws_from_the_cut_distribution(temperature, top_k, top_p):
  seed, draws = 20240, 20_000
  print(f'seed {seed}')
  toy = Toy(6, rows=1, length=4)
  rule = decode.Sample(max_new_tokens=2, temperature=temperature, top_k=top_k, top_p=top_p)
  _, scores, padded = drive(toy, rule, [0] * draws, stop=(-1,), seed=seed)
  first = toy.log_probs(0, [START])
  want = plain_distribution(first, temperature, top_k, top_p)
  got = np.bincount(padded[:, 0], minlength=V)
  assert got[want == 0].sum() == 0
  keep = want > 0
  assert scipy.stats.chisquare(got[keep], want[keep] * draws).pvalue > 1e-3
  # The second token: conditional on the likeliest first one, and not a copy of the first draw.
  token = int(np.argmax(got))
  chosen = padded[padded[:, 0] == token]
  want = plain_distribution(toy.log_probs(0, [START, token]), temperature, top_k, top_p)
  keep = want > 0
  assert scipy.stats.chisquare(np.bincount(chosen[:, 1], minlength=V)[keep], want[keep] * len(chosen)).pvalue > 1e-3
  i = int(np.argmax(padded[:, 0] == token))
  assert scores[i] == pytest.approx(first[token] + toy.log_probs(0, [START, token])[padded[i, 1]], abs=1e-4)


def test_sampling_does_not_depend_on_the_batch():
  seed = 7
  print(f'seed {seed}')
  toy = Toy(7, rows=9, length=12)
  rule = decode.Sample(max_new_tokens=8)
  together = drive(toy, rule, range(9), seed=seed, rows_B=jnp.arange(9))[0]
  fewer = drive(toy, rule, [8, 3], seed=seed, rows_B=jnp.asarray([8, 3]))[0]
  assert fewer == [together[8], together[3]]
  assert drive(toy, rule, range(9), seed=seed + 1, rows_B=jnp.arange(9))[0] != together
  same = drive(toy, rule, [4] * 9, seed=seed, rows_B=jnp.arange(9))[0]
  assert len({tuple(tokens) for tokens in same}) > 1


def test_loop_ends_with_the_last_unfinished_row():
  toy = Toy(0, rows=6, length=64)
  step, steps = jax.jit(toy.step), []

  def counting(cache, tokens, positions):
    steps.append(tokens.shape)
    return step(cache, tokens, positions)

  prefix_BP, stop_BE = jnp.full((2, 1), START), jnp.tile(jnp.arange(2, 7), (2, 1))
  rule = decode.Greedy(max_new_tokens=60)
  states = list(decode.python_loop(counting, toy.cache([0, 3]), rule, prefix_BP, stop_BE))
  longest = int(rule.result(states[-1]).length.max())
  assert longest < 60 and len(steps) == len(states) == longest
  # What is streamed, token by token, is the result.
  assert [int(s.next[0]) for s in states] == list(map(int, rule.result(states[-1]).tokens[0, :longest]))


def test_make_rule_follows_the_config():
  assert decode.make_rule(DecodeConfig(), 5) == decode.Greedy(max_new_tokens=128, pad_id=5)
  config = DecodeConfig(rule='beam', beam_size=3, length_penalty=0.6, early_stopping=True, max_new_tokens=9)
  assert decode.make_rule(config, 0) == decode.Beam(max_new_tokens=9, width=3, length_penalty=0.6, early_stopping=True)
  config = DecodeConfig(rule='sample', temperature=0.5, top_k=3, top_p=0.9)
  assert decode.make_rule(config, 0) == decode.Sample(max_new_tokens=128, temperature=0.5, top_k=3, top_p=0.9)


# The real model through the protocol.


@pytest.fixture(scope='module')
def model():
  from t5x_cpm.models import encoder_decoder

  config = ModelConfig(
      vocab_size=97, d_model=32, d_ff=48, num_heads=2, head_dim=16, num_encoder_layers=2, num_decoder_layers=2, init_std=0.3,
      layer_loop='scan')
  model = encoder_decoder.build(config)
  return model, model.prepare(jax.jit(model.init)(jax.random.key(0)))


def batch_of(rng, lengths, S):
  tokens = rng.integers(3, 97, size=(len(lengths), S))
  valid = np.arange(S) < np.asarray(lengths)[:, None]
  return {'encoder_input_tokens': jnp.asarray(tokens * valid, jnp.int32), 'encoder_segment_ids': jnp.asarray(valid, jnp.int32)}


def test_cached_decoding_is_teacher_forcing(model):
  from t5x_cpm.models import attention

  seed = 3
  print(f'seed {seed}')
  model, params = model
  batch = batch_of(np.random.default_rng(seed), [9, 5, 1], 9)

  @functools.partial(jax.jit, static_argnames='rule')
  def generate(params, batch, rule):
    cache = model.start(params, batch, 20)
    return decode.while_loop(functools.partial(model.step, params), cache, rule, jnp.full((3, 1), START),
                             jnp.full((3, 1), -1), take=attention.take)

  @jax.jit
  def forced(params, batch, tokens):
    inputs = jnp.concatenate([jnp.full((3, 1), START), tokens[:, :-1]], 1)
    logits = model.apply(params, batch | {
        'decoder_input_tokens': inputs, 'decoder_segment_ids': jnp.ones_like(inputs)})[0]
    return logits

  greedy = generate(params, batch, decode.Greedy(max_new_tokens=12))
  logits = np.asarray(forced(params, batch, greedy.tokens))
  assert logits.std() > 0.5
  np.testing.assert_array_equal(logits.argmax(-1), greedy.tokens)
  log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(greedy.tokens)[..., None], -1)
  np.testing.assert_allclose(greedy.score, log_probs.sum((1, 2)), atol=1e-4)

  # Every logit of every step, one token at a time and several in one call.
  cache = jax.jit(model.start, static_argnums=2)(params, batch, 20)
  inputs = jnp.concatenate([jnp.full((3, 1), START), greedy.tokens[:, :-1]], 1)
  step, at, pieces = jax.jit(model.step), 0, []
  for width in (1, 1, 4, 1, 4, 1):
    positions = jnp.broadcast_to(jnp.arange(at, at + width), (3, width))
    got, cache = step(params, cache, inputs[:, at:at + width], positions)
    pieces.append(np.asarray(got))
    at += width
  np.testing.assert_allclose(np.concatenate(pieces, 1), logits, atol=1e-4 * np.abs(logits).max())

  # Beams reorder the cache: the score of what they return is that of teacher forcing.
  beam = generate(params, batch, decode.Beam(max_new_tokens=12, width=4, length_penalty=0.0))
  logits = forced(params, batch, beam.tokens)
  log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(beam.tokens)[..., None], -1)
  np.testing.assert_allclose(beam.score, log_probs.sum((1, 2)), atol=1e-4)
