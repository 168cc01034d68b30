"""Gin files and flags -> Config: what is accepted, what wins, and what each mistake says."""

import collections
import dataclasses
import random
import re
import subprocess
import sys

import pytest

from t5x_cpm.config import Config, ConfigError, LocalTaskConfig, ModelConfig, TrainConfig, gin


@pytest.fixture
def load(tmp_path, monkeypatch):
  """load(text, *flags, **options): a file a.gin with this text in an empty current folder."""
  monkeypatch.chdir(tmp_path)

  def run(text, *flags, **options):
    (tmp_path / 'a.gin').write_text(text, encoding='utf-8')
    return gin.load(['a.gin'], list(flags), **options)

  return run


def test_bindings_blocks_macros_and_comments(load):
  config = load("""
# A comment.
STEPS = 100
HALF = %STEPS
TrainConfig.steps = %HALF  # through two macros
TrainConfig:
  batch_size = 4
  seed = 7
LocalTaskConfig.files = {'zh': 'a/*.txt',
                         'en': %ENGLISH}
LocalTaskConfig.rates = {'zh': 2, 'en': 1.5}
ENGLISH = '英文.txt'
OptimizerConfig.learning_rate = 1
""")
  assert (config.train.steps, config.train.batch_size, config.train.seed) == (100, 4, 7)
  assert config.local_task.files == {'zh': 'a/*.txt', 'en': '英文.txt'}
  assert config.local_task.rates == {'zh': 2.0, 'en': 1.5}
  assert isinstance(config.optimizer.learning_rate, float)  # an int is fine where a float is wanted
  assert config.model == ModelConfig()  # untouched parts keep their defaults


def test_flags_win_and_bare_words_are_strings(load):
  config = load(
      'STEPS = 100\nTrainConfig.steps = %STEPS\nTaskConfig.name = "x"\n', 'STEPS=3', 'TaskConfig.name=local',
      'LocalTaskConfig.files=*.txt', 'EvalConfig.checkpoints=200', 'TrainConfig.deterministic=True')
  assert config.train.steps == 3
  assert config.task.name == 'local'
  assert config.local_task.files == '*.txt'
  assert config.eval.checkpoints == '200'  # the text as typed, where a string is wanted
  assert config.train.deterministic is True


@pytest.mark.parametrize('text, expected', [
    ('[a-z]*.txt', '[a-z]*.txt'), ('a b.txt', 'a b.txt'), ("'quoted'", 'quoted'), ('3.txt', '3.txt'), ('', ''),
    ('a=b', 'a=b'), ("{'zh': 'z.txt', 'en': %X}", {'zh': 'z.txt', 'en': 'e.txt'}), ('%X', 'e.txt')])
def test_flag_values(load, text, expected):
  config = load('X = "e.txt"\nLocalTaskConfig.text_field = %X\n', f'LocalTaskConfig.files={text}')
  assert config.local_task.files == expected


def test_scopes(load):
  text = 'eval/DecodeConfig.rule = "beam"\nDecodeConfig.rule = "sample"\ntrain/N = 3\nN = 4\nTrainConfig.steps = %N\n'
  assert load(text).decode.rule == 'sample'
  assert load(text, scope='eval').decode.rule == 'beam'  # wherever it stands
  assert load(text, 'DecodeConfig.rule=greedy', scope='eval').decode.rule == 'greedy'
  assert load(text, scope='train').train.steps == 3
  assert load(text, scope='eval').train.steps == 4
  assert load('', 'eval/DecodeConfig.rule=beam', scope='eval').decode.rule == 'beam'


def test_later_files_win_and_macros_do_not_depend_on_order(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.gin').write_text('TrainConfig.steps = %N\nTrainConfig.seed = 1\nN = 1\n')
  (tmp_path / 'b.gin').write_text('TrainConfig.seed = 2\nN = 2\n')
  config = gin.load(['a.gin', 'b.gin'])
  assert (config.train.steps, config.train.seed) == (2, 2)
  config = gin.load(['b.gin', 'a.gin'])
  assert (config.train.steps, config.train.seed) == (1, 1)


def test_include_one_level(load, tmp_path):
  (tmp_path / 'b.gin').write_text('TrainConfig.steps = 5\nTrainConfig.seed = 5\n')
  assert load("include 'b.gin'\nTrainConfig.seed = 6\n").train == TrainConfig(steps=5, seed=6)
  assert load("include 'gin/models/cpm2_11b.gin'\n").model.d_model == 4096
  (tmp_path / 'c.gin').write_text("include 'b.gin'\n")
  with pytest.raises(ConfigError, match=r'a\.gin:1: c\.gin:1: .*cannot include another'):
    load("include 'c.gin'\n")


def test_search_path(load, tmp_path):
  assert load("include 'models/t5_1_1_small.gin'").model.d_ff == 1024
  (tmp_path / 'models').mkdir()
  (tmp_path / 'models' / 't5_1_1_small.gin').write_text('ModelConfig.d_ff = 7\n')
  assert load("include 'models/t5_1_1_small.gin'").model.d_ff == 7  # the current folder comes first
  assert load("include 'gin/models/t5_1_1_small.gin'").model.d_ff == 1024


def test_base_is_changed_and_not_mutated(load):
  base = Config(train=TrainConfig(steps=9, seed=8))
  assert load('TrainConfig.steps = 1\n', base=base).train == TrainConfig(steps=1, seed=8)
  assert base.train.steps == 9


MISTAKES = [
    # Names.
    ('TrainConfig.step = 3', r'a\.gin:1: TrainConfig has no field step\. Did you mean steps'),
    ('\nTrainConfig.learning_rate = 3', r'a\.gin:2: .*Did you mean OptimizerConfig\.learning_rate\?'),
    ('TrianConfig.steps = 3', r'a\.gin:1: unknown class TrianConfig\. Did you mean TrainConfig'),
    ('Zebra.qqq = 3', r'a\.gin:1: unknown class Zebra\. Known: ModelConfig'),
    ('TrainConfig = 3', r'TrainConfig is a class; bind one of its fields'),
    ('evla/TrainConfig.steps = 3', r"unknown scope 'evla'"),
    # Macros.
    ('STEPS = 3', r'a\.gin:1: macro STEPS is defined but never used as %STEPS\. Did you mean TrainConfig\.steps'),
    ('STEPS = 3\nTrainConfig.steps = %STEP', r'a\.gin:2: macro %STEP is used but not defined\. Did you mean STEPS'),
    ('eval/TrainConfig.steps = %NO', r'macro %NO is used but not defined'),
    ('A = %B\nB = [%A]\nTrainConfig.steps = %A', r'macro %A refers to itself'),
    # Types.
    ('TrainConfig.steps = "3"', r"a\.gin:1: TrainConfig\.steps = '3' is of type str; expected int"),
    ('TrainConfig.steps = 3.0', r'is of type float; expected int'),
    ('TrainConfig.steps = True', r'is of type bool; expected int'),
    ('OptimizerConfig.learning_rate = False', r'is of type bool; expected float'),
    ('TrainConfig.deterministic = 1', r'is of type int; expected True or False'),
    ('TaskConfig.name = None', r'is of type NoneType; expected str'),
    ('LocalTaskConfig.files = {"a": 3}', r'is of type dict; expected one path, or a dict of name -> path'),
    ('LocalTaskConfig.rates = {"a": "b"}', r'expected dict\[str, float\]'),
    ('eval/TrainConfig.steps = "3"', r'expected int'),  # also in a scope that does not apply
    # Values: what a dataclass refuses is told with its place.
    ('\n\nTrainConfig.batch_size = 0', r'TrainConfig\.batch_size = 0.*set in a\.gin:3'),
    # Grammar.
    ('TaskConfig.name = local', r"a\.gin:1: .*local is not a value; a string needs quotes.*'local'"),
    ('TrainConfig.steps = 3 4', r"a\.gin:1: cannot parse 'TrainConfig\.steps = 3 4'"),
    ('\nTrainConfig.steps', r'a\.gin:2: cannot parse'),
    ('TrainConfig:\nsteps = 3', r'a\.gin:2: .*indentation'),
    ('\nLocalTaskConfig.rates = {"a": 1', r'a\.gin:.*(not closed|cannot parse)'),
    ('TaskConfig.name = @reference', r'a\.gin:1: @reference is a gin reference'),
    ('LocalTaskConfig.files = {"a": @f()}', r'a\.gin:1: @f is a gin reference'),
    ('import os', r'a\.gin:1: gin files cannot import; use the flag --import=os'),
    ("include 'gin/models/cpm2_tniy.gin'", r"a\.gin:1: gin file .*not found.*Did you mean .*gin/models/cpm2_tiny\.gin"),
]


@pytest.mark.parametrize('text, message', MISTAKES, ids=[text.strip() for text, _ in MISTAKES])
def test_mistakes_in_files(load, text, message):
  with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
    load(text + '\n')


FLAG_MISTAKES = [
    ('STPES=3', r'--gin\.STPES=3: macro STPES is defined but never used as %STPES\. Did you mean STEPS'),
    ('TrainConfig.step=3', r'--gin\.TrainConfig\.step=3: .*Did you mean steps'),
    ('TrainConfig.steps=many', r"--gin\.TrainConfig\.steps=many: .*'many' is of type str; expected int"),
    ('TrainConfig.deterministic=true', r"'true' is of type str; expected True or False"),
    ('TrainConfig.steps', r'--gin\.TrainConfig\.steps: expected --gin\.CLASS\.FIELD=VALUE'),
    ('TrainConfig.steps=-1', r'TrainConfig\.steps = -1.*set in --gin\.TrainConfig\.steps=-1'),
    ("LocalTaskConfig.files={'zh': 'a.txt'", r'a bracket or a quote is missing'),
    ('LocalTaskConfig.files={"zh": 3}', r'is of type dict'),
    ('TaskConfig.name=@x', r'@x is a gin reference'),
    ('TrainConfig.steps=\x1b[2J\n5', r'--gin\.TrainConfig\.steps=\\x1b\[2J\\n5: TrainConfig.steps = .* is of type str'),
    ('TrainConfig\ud800.steps=5', r'expected --gin\.CLASS\.FIELD'),
    ('TrainConfig.steps=%' + 'x' * 5000, r'macro %x+\.\.\. \(5,000 characters\) is used but not defined'),
]


@pytest.mark.parametrize('flag, message', FLAG_MISTAKES, ids=[flag for flag, _ in FLAG_MISTAKES])
def test_mistakes_in_flags(load, flag, message):
  with pytest.raises(ConfigError, match=message) as error:
    load('STEPS = 1\nTrainConfig.steps = %STEPS\n', flag)
  assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_missing_file_names_the_places_and_the_neighbours(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'mine.gin').write_text('')
  with pytest.raises(ConfigError, match='not found') as error:
    gin.load(['mien.gin'])
  assert str(tmp_path) in str(error.value)
  assert 'gin_files' in str(error.value)
  assert 'Did you mean mine.gin' in str(error.value)
  with pytest.raises(ConfigError, match='not UTF-8'):
    (tmp_path / 'latin.gin').write_bytes(b"TaskConfig.name = '\xe9'\n")
    gin.load(['latin.gin'])


def random_config(rng: random.Random) -> Config:
  """A valid configuration with many unusual values."""
  word = lambda: ''.join(rng.choice('ab\'"\\%@#\n\t 中é') for _ in range(rng.randint(0, 8)))  # noqa: E731
  parts = {}
  for part in dataclasses.fields(Config):
    values = getattr(Config(), part.name)
    changes = {}
    for field in dataclasses.fields(values):
      value = getattr(values, field.name)
      if field.name in ('cache_dir', 'vocabulary', 'init_from', 'wandb_project', 'text_field', 'files'):
        changes[field.name] = word()
      elif isinstance(value, float) and field.name in ('learning_rate', 'z_loss', 'weight_decay', 'clip_norm'):
        changes[field.name] = rng.random() * 10 ** rng.randint(-12, 3)
      elif isinstance(value, bool) and field.name != 'train_base':  # which needs a method
        changes[field.name] = rng.random() < 0.5
    parts[part.name] = dataclasses.replace(values, **changes)
  files = {word(): word() for _ in range(3)}
  parts['local_task'] = LocalTaskConfig(files=files, rates={name: rng.random() + 0.1 for name in files})
  return Config(**parts)


def test_a_template_may_begin_with_a_field(load):
  for text in ('{sum}', '{a} and {b}', '{{x}} {a}'):
    assert load('', f'LocalTaskConfig.targets_template={text}').local_task.targets_template == text
  with pytest.raises(ConfigError, match='a bracket or a quote is missing'):
    load('', 'LocalTaskConfig.rates={a')


def test_dump_parses_back_to_the_same_config(load):
  seed = random.randrange(2**31)
  print('seed', seed)
  rng = random.Random(seed)
  for config in [Config()] + [random_config(rng) for _ in range(20)]:
    text = gin.dump(config)
    assert load(text) == config
    names = sum(len(dataclasses.fields(getattr(config, part.name))) for part in dataclasses.fields(Config))
    names += len(dataclasses.fields(config.model.moe)) - 1  # in the place of ModelConfig.moe
    assert len(re.findall(r'^\w+\.\w+ = ', text, re.MULTILINE)) == names  # every field is there


def test_it_keeps_no_state_and_imports_neither_jax_nor_tensorflow():
  code = ('import sys; from t5x_cpm.config import gin; gin.load(["gin/models/cpm2_11b.gin"]); import gin; '
          'assert not gin.config._CONFIG; print([m for m in ("jax", "tensorflow", "numpy", "flax") if m in sys.modules])')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# What a mutation inserts, swaps in or repeats: words of gin, and values that something chokes on.
WORDS = [
    'TrainConfig.steps = 3\n', 'MeshConfig.data = 0\n', 'OptimizerConfig.learning_rate = ', 'LocalTaskConfig.rates = ',
    'eval/', '1e999', '-1e999', 'nan', '9' * 400, '9' * 5000, '{[1]: 2}', '{{}: 1}', '{%A: 1}', 'A = [1]\n', '[' * 3000,
    '(' * 200, '[' * 30 + ']' * 30, '%A', 'A = %A\n', '@f()', "include 'gin/runs/pretrain.gin'\n",
    "include 'foo://a/b.gin'\n", f"include '{'a' * 5000}'\n", 'include "a\\0b"\n', 'import os\n', "'", '"""', '\\',
    "'\\ud800'", "'a\\0b'", '\ufeff', '\0', '\r', '\n  ', '\t', ' = ', '.', ':', ',', '}', ']', ')', '#', 'None', 'True',
    '0x', '1_', 'b"x"', '1j', '文', 'Ａ', '-', '2 ** 70', '18446744073709551616', "''", '{}', '[]']


def mutated(text: str, rng: random.Random) -> str:
  """The text after up to three changes of a character, a word, a line or a stretch."""
  for _ in range(rng.randint(1, 3)):
    at, other = sorted(rng.randint(0, len(text)) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0:
      text = text[:at] + rng.choice(WORDS) + text[at:]
    elif kind == 1:
      text = text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) + text[at + 1:]
    elif kind == 2:
      text = text[:at] + text[min(other, at + 20):]
    elif kind == 3:
      text = re.sub(r'(?<= = ).*', lambda match: rng.choice((rng.choice(WORDS), match[0])), text, count=rng.randint(1, 9))
    elif kind == 4:
      text = text[:at] + text[at:other] * 2 + text[other:]
    elif kind == 5:
      lines = text.splitlines(keepends=True)
      rng.shuffle(lines)
      text = ''.join(lines)
    else:
      words = re.findall(r'\w+', text) or ['x']
      text = re.sub(rf'\b{re.escape(rng.choice(words))}\b', rng.choice(words), text, count=1)
  return text


@pytest.mark.parametrize('count', [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_mutated_file_is_accepted_or_refused_with_its_place(monkeypatch, count):
  files = {}  # 'a.gin' -> its bytes; writing it would take longer than reading

  class File:
    def read_text(self, encoding):
      return files['a.gin'].decode(encoding)

  def load(text):
    files['a.gin'] = text.encode()
    return gin.load(['a.gin'])

  find = gin.find
  monkeypatch.setattr(gin, 'find', lambda path: File() if path == 'a.gin' else find(path))
  seed = random.randrange(2**31)
  print('seed', seed)
  rng = random.Random(seed)
  dumped = [line for line in gin.dump(random_config(rng)).splitlines(keepends=True) if ' = ' in line]
  bases = [text + '\n' for text, _ in MISTAKES] + [''.join(rng.sample(dumped, 4)) for _ in range(3 * len(MISTAKES))]
  outcomes = collections.Counter()
  for number in range(count):
    text = mutated(rng.choice(bases), rng)
    try:
      config = load(text)
    except ConfigError as error:
      outcomes['refused'] += 1
      message = str(error)
      assert 'a.gin' in message and '\n' not in message and len(message) < 2000, (number, message)
    else:
      outcomes['accepted'] += 1
      assert load(gin.dump(config)) == config, (number, text)
  print(outcomes)
  assert min(outcomes['accepted'], outcomes['refused']) > count / 100
