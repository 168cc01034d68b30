"""Arithmetic stories in Chinese and English, made on the fly: text with something that can really be learned.

`story(index, language)` is a pure function: the same arguments give the same story on every machine, so that a story
needs no file, and a split is a range of indices, for example training 0..99,999 and validation 1,000,000..1,000,999.
A story adds, subtracts or multiplies two small numbers; its text ends with the result, which follows from the text before
it, and so do the names and the things that it repeats. Seven stories in ten keep every number at or below 20, so that even
a tiny model sees each sum often; the others go to 99.

    >>> story(3, 'en').text
    'On Monday morning, Ben made 14 waffles for a party. Anna and the other guests ate 6 of them. The guests left 8 waffles.'
    >>> story(3, 'en').question  # doctest: +ELLIPSIS
    '...Anna and the other guests ate 6 of them. How many waffles did the guests leave?'
    >>> story(3, 'zh')[2:]
    ('2只兔子', (10, 8), 'subtract')

There are tens of millions of stories in each language. Two indices may still give the same story: about 1 index in 1,000
repeats another one among the first 100,000, and 8 in 1,000 among the first million.
"""

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LANGUAGES = ('zh', 'en')
OPERATIONS = {'add': operator.add, 'subtract': operator.sub, 'multiply': operator.mul}


class Story(NamedTuple):
  """One story.

  Attributes:
    text: the whole story as one line; its last sentence gives the answer.
    question: the same story with a question instead of its last sentence.
    answer: the result in digits with its unit, as it stands in `text`: '7 apples', '7个苹果'.
    operands: the two numbers in the order of the operation, each from 1 to 99; both occur in `text` and `question`.
    operation: a key of `OPERATIONS`; the operation on the operands gives the number in `answer`, from 0 to 99.
  """

  text: str
  question: str
  answer: str
  operands: tuple[int, int]
  operation: str


class Template(NamedTuple):
  """A kind of story: `unit` names the list of counted things, the other texts have fields of `_fields`."""

  operation: str
  unit: str
  body: str
  question: str
  conclusion: str


# Counted things are (singular, plural) in English and (noun, measure word) in Chinese.
_WORDS: dict[str, dict[str, Any]] = {
  'en': {
    'person': ['Anna', 'Emma', 'Grace', 'Helen', 'Julia', 'Kate', 'Lily', 'Lucy', 'Maria', 'Nora', 'Rose', 'Sarah',
               'Ben', 'David', 'Henry', 'Jack', 'James', 'Leo', 'Max', 'Oscar', 'Paul', 'Peter', 'Sam', 'Tom'],
    'when': [f'On {day} {time}' for day in ('Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday', 'Sunday')
             for time in ('morning', 'afternoon', 'evening')],
    'place': ['in the garden', 'in the kitchen', 'in the park', 'at school', 'in the library', 'in the attic', 'on the bus',
              'behind the house', 'near the lake', 'on the beach', 'in the old tower', 'at the station'],
    'outdoors': ['by the river', 'in the field', 'near the farm', 'on the hill', 'by the pond', 'in the valley',
                 'at the edge of the forest', 'on the island', 'near the bridge', 'behind the barn'],
    'town': ['the harbour', 'the school', 'the market', 'the museum', 'the hospital', 'the old town', 'the library', 'the park',
             'the theatre', 'the airport', 'the station', 'the church'],
    'box': [('box', 'boxes'), ('bag', 'bags'), ('basket', 'baskets'), ('crate', 'crates'), ('tin', 'tins'), ('jar', 'jars')],
    'topic': ['horses', 'the sea', 'trains', 'stars', 'birds', 'history', 'dragons', 'music', 'ships', 'gardens', 'bees'],
    'thing': [('coin', 'coins'), ('stamp', 'stamps'), ('pencil', 'pencils'), ('card', 'cards'), ('shell', 'shells'),
              ('key', 'keys'), ('button', 'buttons'), ('marble', 'marbles'), ('postcard', 'postcards'), ('brush', 'brushes'),
              ('ribbon', 'ribbons'), ('stone', 'stones'), ('photo', 'photos'), ('candle', 'candles'), ('nut', 'nuts'),
              ('apple', 'apples'), ('pear', 'pears'), ('plum', 'plums'), ('cherry', 'cherries'), ('egg', 'eggs')],
    'food': [('cake', 'cakes'), ('sandwich', 'sandwiches'), ('cookie', 'cookies'), ('pancake', 'pancakes'), ('pie', 'pies'),
             ('dumpling', 'dumplings'), ('roll', 'rolls'), ('pizza', 'pizzas'), ('waffle', 'waffles')],
    'animal': [('duck', 'ducks'), ('goose', 'geese'), ('rabbit', 'rabbits'), ('sheep', 'sheep'), ('goat', 'goats'),
               ('horse', 'horses'), ('deer', 'deer'), ('fox', 'foxes'), ('pony', 'ponies'), ('mouse', 'mice'), ('hen', 'hens')],
    'plant': [('rose', 'roses'), ('tulip', 'tulips'), ('cabbage', 'cabbages'), ('sunflower', 'sunflowers'),
              ('tree', 'trees'), ('bush', 'bushes'), ('lily', 'lilies'), ('tomato', 'tomatoes'), ('pumpkin', 'pumpkins'),
              ('strawberry', 'strawberries')],
    'goods': [('book', 'books'), ('hat', 'hats'), ('toy', 'toys'), ('cup', 'cups'), ('ball', 'balls'), ('scarf', 'scarves'),
              ('lamp', 'lamps'), ('plate', 'plates'), ('brush', 'brushes'), ('ticket', 'tickets'), ('box', 'boxes')],
    'page': [('page', 'pages')], 'passenger': [('passenger', 'passengers')], 'dollar': [('dollar', 'dollars')],
    'mile': [('mile', 'miles')],
  },
  'zh': {
    'person': ['小明', '小红', '小华', '小丽', '小刚', '小强', '小梅', '小兰', '小军', '小芳', '丁丁', '冬冬',
               '李雷', '王芳', '张伟', '刘洋', '陈静', '赵亮', '周婷', '吴磊', '林林', '方方', '圆圆', '乐乐'],
    'when': [f'星期{day}{time}' for day in '一二三四五六天' for time in ('早上', '下午', '晚上')],
    'place': ['花园里', '厨房里', '公园里', '学校里', '图书馆里', '阁楼上', '汽车上', '院子里', '湖边',
              '沙滩上', '教室里', '车站里'],
    'outdoors': ['河边', '田野里', '农场旁边', '山坡上', '池塘边', '山谷里', '森林边上', '小岛上', '大桥旁边', '村口'],
    'town': ['码头', '学校', '菜市场', '博物馆', '医院', '老城', '图书馆', '公园', '电影院', '机场', '火车站', '体育馆'],
    'box': [('盒子', '个'), ('袋子', '个'), ('篮子', '个'), ('抽屉', '个'), ('箱子', '个'), ('罐子', '个')],
    'topic': ['动物', '大海', '火车', '星星', '小鸟', '历史', '机器人', '音乐', '飞机', '花草', '蜜蜂'],
    'thing': [('硬币', '枚'), ('邮票', '张'), ('铅笔', '支'), ('卡片', '张'), ('贝壳', '个'), ('钥匙', '把'), ('扣子', '颗'),
              ('玻璃球', '颗'), ('照片', '张'), ('彩带', '条'), ('石头', '块'), ('蜡烛', '根'), ('核桃', '个'), ('苹果', '个'),
              ('梨', '个'), ('桃子', '个'), ('糖', '颗'), ('鸡蛋', '个'), ('手套', '只'), ('书签', '张')],
    'food': [('蛋糕', '块'), ('包子', '个'), ('饼干', '块'), ('饺子', '个'), ('馒头', '个'), ('粽子', '个'), ('月饼', '块'),
             ('面包', '个'), ('春卷', '个')],
    'animal': [('鸭子', '只'), ('鹅', '只'), ('兔子', '只'), ('羊', '只'), ('牛', '头'), ('马', '匹'), ('小鹿', '只'),
               ('狐狸', '只'), ('猴子', '只'), ('麻雀', '只'), ('母鸡', '只')],
    'plant': [('玫瑰', '棵'), ('白菜', '棵'), ('向日葵', '棵'), ('小树', '棵'), ('辣椒', '棵'), ('茶树', '棵'), ('菊花', '棵'),
              ('玉米', '棵'), ('桃树', '棵'), ('草莓', '棵')],
    'goods': [('书', '本'), ('帽子', '顶'), ('玩具', '个'), ('杯子', '个'), ('球', '个'), ('围巾', '条'), ('台灯', '盏'),
              ('盘子', '个'), ('毛笔', '支'), ('电影票', '张'), ('雨伞', '把')],
    'page': [('', '页')], 'passenger': [('乘客', '位')], 'dollar': [('', '元')], 'mile': [('', '公里')],
  },
}

TEMPLATES = {
  'en': [Template(*row) for row in (
    ('add', 'thing', '{when}, {p} had {A}. {q} brought {b} more and gave them all to {p}.',
     'How many {items} did {p} have then?', 'Then {p} had {C}.'),
    ('add', 'thing', '{when}, {p} found {A} {place}, and {q} found {B} {outdoors}.',
     'How many {items} did they find?', 'Altogether, they found {C}.'),
    ('add', 'thing', '{p} and {q} met {place}. {p} brought {A}, and {q} brought {B}.',
     'How many {items} did they have together?', 'Together they had {C}.'),
    ('add', 'animal', '{when}, {p} saw {A} {outdoors}. A little later {b} more came.',
     'How many {items} were there in the end?', 'In the end there were {C}.'),
    ('add', 'page', '{p} has a book about {topic}. {when}, {p} read {A}, and the next day {p} read {B}.',
     'How many pages did {p} read in two days?', 'In two days {p} read {C}.'),
    ('subtract', 'thing', '{when}, {p} had {A}. {p} gave {b} of them to {q}.',
     'How many {items} did {p} have left?', 'Then {p} had {C} left.'),
    ('subtract', 'passenger', '{when}, {p} drove a bus with {A}. At {town}, {b} of them got off and nobody got on.',
     'With how many passengers did the bus go on?', 'The bus went on with {C}.'),
    ('subtract', 'food', '{when}, {p} made {A} for a party. {q} and the other guests ate {b} of them.',
     'How many {items} did the guests leave?', 'The guests left {C}.'),
    ('subtract', 'thing', '{p} and {q} counted their {items} {place}. {p} had {A}, and {q} had {B}.',
     'How many {items} more than {q} did {p} have?', '{p} had {C} more than {q}.'),
    ('subtract', 'animal', '{when}, {p} counted {A} {outdoors}. A dog barked, and {b} of them ran away.',
     'How many {items} stayed?', '{C} stayed.'),
    ('multiply', 'thing', '{when}, {p} and {q} filled {boxes}. They put {B} into each {box}.',
     'How many {items} did they put away?', 'In all, they put away {C}.'),
    ('multiply', 'plant', '{when}, {p} worked {outdoors}. {p} planted {a} rows of {items} with {b} in each row.',
     'How many {items} did {p} plant?', '{p} planted {C} in all.'),
    ('multiply', 'dollar', '{when}, {p} went to a shop near {town}. One {good} cost {B}, and {p} bought {a} {goods}.',
     'How many dollars did {p} pay?', '{p} paid {C}.'),
    ('multiply', 'mile', '{p} and {q} had a holiday. {when}, they started {outdoors}. They walked {B} every day for {a} days.',
     'How many miles did they walk?', 'In all, they walked {C}.'),
  )],
  'zh': [Template(*row) for row in (
    ('add', 'thing', '{when}，{p}有{A}，{q}又给了{p}{b}{m}。', '{p}现在一共有多少{items}？', '{p}现在一共有{C}。'),
    ('add', 'thing', '{when}，{p}在{place}找到了{A}，{q}在{outdoors}找到了{B}。',
     '他们一共找到了多少{items}？', '他们一共找到了{C}。'),
    ('add', 'thing', '{p}和{q}在{place}见面，{p}带来了{A}，{q}带来了{B}。', '合在一起有多少{items}？', '合在一起有{C}。'),
    ('add', 'animal', '{when}，{p}在{outdoors}看见了{A}，过了一会儿又来了{b}{m}。', '最后有多少{items}？', '最后有{C}。'),
    ('add', 'page', '{p}有一本讲{topic}的书，{when}读了{A}，第二天又读了{B}。',
     '{p}两天一共读了多少{items}？', '{p}两天一共读了{C}。'),
    ('subtract', 'thing', '{when}，{p}有{A}，送给{q}{b}{m}。', '{p}还剩下多少{items}？', '{p}还剩下{C}。'),
    ('subtract', 'passenger', '{when}，{p}开的公共汽车上有{A}，到了{town}，下去了{b}{m}，没有人上车。',
     '车上还有多少{items}？', '车上还有{C}。'),
    ('subtract', 'food', '{when}，{p}做了{A}，{q}和别的客人吃了{b}{m}。', '还剩下多少{items}？', '还剩下{C}。'),
    ('subtract', 'thing', '{p}和{q}在{place}数{noun}，{p}有{A}，{q}有{B}。', '{p}比{q}多多少{items}？', '{p}比{q}多{C}。'),
    ('subtract', 'animal', '{when}，{p}看见{outdoors}有{A}，小狗一叫，跑掉了{b}{m}。',
     '留下来的有多少{items}？', '留下来的有{C}。'),
    ('multiply', 'thing', '{when}，{p}和{q}收拾了{boxes}，在每个{box}里放进{B}。',
     '他们一共放了多少{items}？', '他们一共放了{C}。'),
    ('multiply', 'plant', '{when}，{p}在{outdoors}种了{a}行{noun}，每行有{b}{m}。',
     '{p}一共种了多少{items}？', '{p}一共种了{C}。'),
    ('multiply', 'dollar', '{when}，{p}去了{town}旁边的商店，一{good}要{B}，{p}买了{a}{good}。',
     '{p}一共付了多少{items}？', '{p}一共付了{C}。'),
    ('multiply', 'mile', '{when}，{p}和{q}从{outdoors}出发去旅行，每天走{B}，走了{a}天。',
     '他们一共走了多少{items}？', '他们一共走了{C}。'),
  )],
}


def _operands(operation: str, pick: Callable[[Sequence], Any]) -> tuple[int, int]:
  """Two numbers with a result from 0 to 99, chosen so that 'them' and 'each' never refer to a single thing."""
  limit = pick([20] * 7 + [99] * 3)
  if operation == 'multiply':
    return pick([(a, b) for a in range(2, 10) for b in range(2, min(12, limit // a) + 1)])
  total = pick(range(3, limit + 1))
  if operation == 'subtract':
    return total, pick(range(1, total + 1))
  a = pick(range(1, total - 1))
  return a, total - a


def _count(language: str, number: int, word: tuple[str, str]) -> str:
  if language == 'zh':
    return f'{number}{word[1]}{word[0]}'
  return f'{number} {word[0] if number == 1 else word[1]}'


def _fields(language: str, words: dict[str, Any], unit: str, a: int, b: int, result: int) -> dict[str, str]:
  """What templates may name: p and q, two people; A, B and C, the operands and the result with their unit; and plain words."""
  fields = {name: words[name] for name in ('when', 'place', 'outdoors', 'town', 'topic')}
  fields.update(p=words['person'], q=words['other'], a=str(a), b=str(b), box=words['box'][0])
  fields.update({name: _count(language, n, words[unit]) for name, n in (('A', a), ('B', b), ('C', result))})
  fields['boxes'] = _count(language, a, words['box'])
  noun, second = words[unit]
  good, goods = words['goods']
  if language == 'en':
    return fields | {'items': second, 'good': good, 'goods': goods}
  return fields | {'noun': noun, 'm': second, 'items': second + noun, 'good': goods + good}


def story(index: int, language: str) -> Story:
  """Makes one story.

  Args:
    index: which story; any integer from 0 on.
    language: 'zh' or 'en'.

  Returns:
    The story; equal arguments give equal stories.

  Raises:
    ValueError: unknown language, or a negative index.
    TypeError: an index that is not an integer.
  """
  if language not in LANGUAGES:
    raise ValueError(f'stories exist in the languages {LANGUAGES}, not in {language!r}')
  if operator.index(index) < 0:
    raise ValueError(f'the index of a story is 0 or more, not {index}')
  # Of Python's generator, only seeding by a string and random() are promised to stay the same in later versions.
  uniform = random.Random(f'{language}:{index}').random

  def pick(options: Sequence) -> Any:
    return options[int(uniform() * len(options))]

  words = {name: pick(options) for name, options in _WORDS[language].items()}
  template = pick(TEMPLATES[language])
  words['other'] = pick([name for name in _WORDS[language]['person'] if name != words['person']])
  a, b = operands = _operands(template.operation, pick)
  result = OPERATIONS[template.operation](a, b)
  fields = _fields(language, words, template.unit, a, b, result)
  body, question, conclusion = (text.format_map(fields) for text in template[2:])
  space = ' ' if language == 'en' else ''
  return Story(f'{body}{space}{conclusion}', f'{body}{space}{question}', fields['C'], operands, template.operation)
