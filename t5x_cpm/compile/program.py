"""What a compiled program does: bytes that each chip sends to others, and bytes that it reads and writes in its own memory.

Both are read from the compiler's text (XLA's HLO). XLA's own cost analysis counts the body of a loop once; here it counts as
often as it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

# Bytes of one element, by XLA's name of its type.
BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
         's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
# Instructions that move nothing themselves: names for values, and calls of bodies, which are counted where they are walked.
FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
        'partition-id', 'replica-id', 'async-start', 'async-update', 'async-done', 'opt-barrier', 'optimization-barrier'}
READ_A_PART = {'dynamic-slice', 'slice', 'gather'}  # only a part of their first operand
# replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
MESH_GROUPS = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
SHAPE = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program: `name = type opcode(arguments), attributes`."""

  name: str
  type: str
  opcode: str
  arguments: str  # operands, the number of a parameter, or the value of a constant
  operands: tuple[str, ...]
  attributes: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: XLA's name of it, or 'between slices'.
    sent: bytes that each chip sends each time it runs.
    times: how often it runs in a step.
    group: the devices of one of its groups, as indices into the mesh.
  """

  kind: str
  sent: float
  times: int
  group: tuple[int, ...]


def _balanced(text: str, start: int) -> int:
  """The index after the bracket that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if not depth:
      return index + 1
  return len(text)


def _instruction(line: str) -> Instruction | None:
  """The instruction of a line, or None for a line that has none."""
  match = re.match(r'\s*(?:ROOT )?%?([\w.-]+) = ', line)
  if not match:
    return None
  start = match.end()
  end = _balanced(line, start) if line[start] == '(' else line.index(' ', start)
  opening = line.find('(', end)
  closing = _balanced(line, opening)
  arguments = line[opening + 1:closing - 1]
  return Instruction(match[1], line[start:end], line[end:opening].strip(), arguments,
                     tuple(re.findall(r'%([\w.-]+(?:#\d+)?)', arguments)), line[closing:])


def _element(kind: str, index: int) -> str:
  """The type of one element of a tuple, given the tuple's type."""
  depth, starts = 0, [1]
  for position, character in enumerate(kind):
    depth += (character in '({[') - (character in ')}]')
    if character == ',' and depth == 1:
      starts.append(position + 1)
  return kind[starts[index]:(starts + [len(kind)])[index + 1] - 1]


def _bytes(shape: str, *, hbm_only: bool = False) -> float:
  """Bytes of an array or a tuple of arrays, `hbm_only` leaves out other memories: 1 is the scratchpad, 5 the host."""
  total = 0.0
  for dtype, sizes, layout in SHAPE.findall(shape):
    if dtype in BYTES and not (hbm_only and re.search(r'S\([1-9]\)', layout)):
      total += BYTES[dtype] * math.prod(int(size) for size in sizes.split(',') if size)
  return total


def _group(attributes: str) -> tuple[int, ...]:
  """The first group of a collective, whichever of XLA's notations it is written in."""
  if match := re.search(MESH_GROUPS, attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    ids = np.arange(math.prod(sizes.values()))
    if match[2]:
      ids = ids.reshape([int(size) for size in match[2].split(',')])
      if match[3]:
        ids = ids.transpose([int(axis) for axis in match[3].split(',')])
    ids = ids.reshape(list(sizes.values()))
    mine = re.findall(r"'([^']+)'", match[4])
    return tuple(ids[tuple(slice(None) if name in mine else 0 for name in sizes)].ravel().tolist())
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    ids = np.arange(int(match[1]) * int(match[2])).reshape([int(size) for size in match[3].split(',')])
    if match[4]:
      ids = ids.transpose([int(axis) for axis in match[4].split(',')])
    return tuple(ids.reshape(int(match[1]), int(match[2]))[0].tolist())
  if match := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes):
    return tuple(int(index) for index in match[1].split(','))
  return ()


def _sent(kind: str, given: float, size: int) -> float:
  """Bytes that each of `size` chips sends for a collective by the best ring algorithm, if each gives `given` bytes."""
  if kind == 'collective-permute':
    return given
  share = (size - 1) / size
  return {'all-gather': given * (size - 1), 'all-reduce': 2 * given * share}.get(kind, given * share)


class Program:
  """A program as the compiler wrote it after all optimisations."""

  def __init__(self, text: str):
    self.bodies: dict[str, list[Instruction]] = {}
    self.entry = ''
    body: list[Instruction] = []
    for line in text.splitlines():
      if header := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
        body = self.bodies.setdefault(header[2], [])
        self.entry = header[2] if header[1] else self.entry
      elif (instruction := _instruction(line)) is not None:
        body.append(instruction)
    self.types = {name: {i.name: i.type for i in body} for name, body in self.bodies.items()}

  def _type(self, body: str, operand: str) -> str:
    """The type of an operand in a body; 'name#3' is element 3 of a tuple, as XLA writes it from jaxlib 0.12 on."""
    name, _, index = operand.partition('#')
    kind = self.types[body].get(name, '')
    return _element(kind, int(index)) if kind and index else kind

  def _trips(self, condition: str) -> int:
    """How often a loop runs whose counter starts at 0 and is compared with a constant."""
    constants = [i.arguments for i in self.bodies[condition] if i.opcode == 'constant']
    return max((int(constant) for constant in constants if constant.isdigit()), default=1)

  def _walk(self, name: str, times: int, fused: bool) -> Iterator[tuple[str, Instruction, int, bool]]:
    """Every instruction of a body and of those it calls: its body, itself, how often it runs, whether it is in a fusion."""
    for i in self.bodies.get(name, ()):
      yield name, i, times, fused
      if i.opcode == 'while':
        condition, body = (re.search(rf'{what}=%?([\w.-]+)', i.attributes) for what in ('condition', 'body'))
        assert condition and body
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes)
        yield from self._walk(body[1], times * (int(known[1]) if known else self._trips(condition[1])), fused)
        continue
      called = re.search(r'calls=%?([\w.-]+)', i.attributes)
      if i.opcode == 'call':
        called = re.search(r'to_apply=%?([\w.-]+)', i.attributes)
      if called:
        yield from self._walk(called[1], times, fused or i.opcode == 'fusion')
      if branches := re.search(r'branch_computations=\{([^}]*)\}', i.attributes):
        for branch in re.findall(r'%?([\w.-]+)', branches[1])[:1]:
          yield from self._walk(branch, times, fused)

  def collectives(self, slices: int = 1) -> list[Collective]:
    """All collectives of the program, each with how often it runs.

    What goes from slice to slice leaves through the hosts: each chip sends its part of what its slice has summed up. Such a
    collective has the kind 'between slices', and no group.

    Args:
      slices: how many TPU slices the program is for.
    """
    result = []
    for name, i, times, _ in self._walk(self.entry, 1, False):
      kind = i.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        given = sum(_bytes(self._type(name, operand)) for operand in i.operands)
        group = _group(i.attributes)
        result.append(Collective(kind, _sent(kind, given, max(len(group), 1)), times, group))
      elif kind == 'send' and 'megascale' in i.attributes:
        whole = re.search(r'megascale_transfer_type="(\w+)"', i.attributes)
        kind = whole[1].lower().replace('_', '-') if whole else 'all-gather'
        given = _bytes(self._type(name, i.operands[0]))
        result.append(Collective('between slices', _sent(kind, given, slices), times, ()))
    return result

  def hbm_bytes(self) -> float:
    """Bytes that a chip reads from its memory and writes to it; where only a part of an array is read, that part."""
    total = 0.0
    for name, i, times, fused in self._walk(self.entry, 1, False):
      if not fused and i.opcode not in FREE and not i.opcode.endswith('-done'):
        total += times * self._moved(name, i)
    return total

  def _moved(self, name: str, i: Instruction) -> float:
    """Bytes that one instruction of the body `name` reads and writes."""
    if i.opcode in READ_A_PART:
      return 2 * _bytes(i.type, hbm_only=True)
    if i.opcode == 'dynamic-update-slice':
      return 2 * _bytes(self._type(name, i.operands[1]), hbm_only=True)
    called = re.search(r'calls=%?([\w.-]+)', i.attributes) if i.opcode == 'fusion' else None
    body = self.bodies.get(called[1], []) if called else []
    read = 0.0
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for inner in body:
      for operand in inner.operands:
        users[operand].append(inner)
    parameters = {int(inner.arguments): inner for inner in body if inner.opcode == 'parameter'}
    written_into = set()
    for number, operand in enumerate(i.operands):
      size = _bytes(self._type(name, operand), hbm_only=True)
      parameter = parameters.get(number)
      uses = users[parameter.name] if parameter else []
      first = bool(size and uses) and all(use.operands[0] == parameter.name for use in uses)  # type: ignore[union-attr]
      if first and all(use.opcode in READ_A_PART for use in uses):
        size = min(size, sum(_bytes(use.type) for use in uses))
      elif first and all(use.opcode == 'dynamic-update-slice' for use in uses):
        written_into.update(uses)
        size = 0.0
      read += size
    inside = {inner.name: inner.type for inner in body}
    if written_into:  # the result shares the operand's memory, so that only the updates are written
      return read + sum(_bytes(inside.get(use.operands[1], '')) for use in written_into)
    return read + _bytes(i.type, hbm_only=True)


def arithmetic(jaxpr: Any) -> float:
  """Floating-point operations of all products of a traced program, on all devices together; loops count as often as they run.

  A ragged product, of runs of rows with a matrix each, counts all of its rows, even those that belong to no expert.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = parameters['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    elif name.startswith('ragged_dot'):
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
    else:
      times = parameters['length'] if name == 'scan' else parameters['mesh'].size if name == 'shard_map' else 1
      inner = [value for value in parameters.values() if hasattr(value, 'eqns') or hasattr(value, 'jaxpr')]
      if name == 'cond':
        inner = list(parameters['branches'])[:1]
      total += times * sum(arithmetic(getattr(part, 'jaxpr', part)) for part in inner)
  return total
