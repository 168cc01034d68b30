"""Public text to pre-train on, from TensorFlow Datasets. None has a vocabulary of its own: set TaskConfig.vocabulary."""

from t5x_cpm.tasks.table import MixtureRow, Row

# Layout marks that a builder leaves in its text: (pattern, replacement).
CLEAN = {'wiki40b': (('\n?_START_(ARTICLE|SECTION|PARAGRAPH)_\n', '\n'), ('_NEWLINE_', '\n'), ('^\\n+', ''))}
_MC4 = {'train': 'zh', 'validation': 'zh-validation'}

ROWS = (
    Row('pretrain_zh', 'mC4, Chinese', 'tfds', 'c4/multilingual:3.1.0', splits=_MC4, field='text'),
    Row('pretrain_en', 'C4, English', 'tfds', 'c4/en:3.1.0', field='text'),
    MixtureRow('pretrain_zh_en', "mC4 Chinese and C4 English at the paper's 2:1", {'pretrain_zh': 2, 'pretrain_en': 1}),
    Row('wiki_zh', 'Wikipedia, Chinese', 'tfds', 'wiki40b/zh-cn:1.3.0', field='text'),
    Row('wiki_en', 'Wikipedia, English', 'tfds', 'wiki40b/en:1.3.0', field='text'),
    MixtureRow('wiki_zh_en', "Wikipedia, Chinese and English at the paper's 2:1", {'wiki_zh': 2, 'wiki_en': 1}),
)


def tfds_row(name: str) -> Row:
  """The task 'tfds:BUILDER', or 'tfds:BUILDER@SPLIT' where the splits of the builder have names of their own."""
  builder, _, split = name.removeprefix('tfds:').partition('@')
  return Row(name, f'text of the TFDS builder {builder}', 'tfds', builder, splits={'train': split} if split else {})
