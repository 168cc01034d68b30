"""Runs the matrix products of a traced program without the rest: the least time that XLA needs. Not a program of its own.

`against_pytorch.py` prints that time in the column *products*.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from side_by_side import Run


def _products(jaxpr: Any, operands: dict[Any, object]) -> Iterator[tuple[Any, object, object]]:
  """Each product, with one object for each of its operands: the same object wherever the same value is used.

  Args:
    jaxpr: the program, or a program within it.
    operands: the objects of variables that are known from outside; those found are added.
  """

  def operand(variable: Any) -> object:
    return operands.setdefault(variable, object()) if isinstance(variable, jax.extend.core.Var) else object()

  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      left, right = equation.invars
      yield equation, operand(left), operand(right)
      continue
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        assert equation.primitive.name not in ('scan', 'while', 'cond'), 'a loop: how often it runs is not known here'
        known = zip(inner.invars, equation.invars) if len(inner.invars) == len(equation.invars) else ()
        yield from _products(inner, {theirs: operand(ours) for theirs, ours in known})


def alone(fn: Callable[..., Any], *args: Any) -> Run:
  """Prepares the products of fn(*args), on random numbers, in the order of the program; shared operands stay shared."""
  found = list(_products(jax.make_jaxpr(fn)(*args).jaxpr, {}))
  shapes = {key: variable.aval for equation, *keys in found for key, variable in zip(keys, equation.invars, strict=True)}
  rng = np.random.default_rng(0)
  operands = {key: jax.device_put(rng.standard_normal(aval.shape, np.float32)) for key, aval in shapes.items()}
  number = {key: index for index, key in enumerate(operands)}

  @jax.jit
  def products(operands: list[Any]) -> Any:
    total: Any = 0.0
    for equation, left, right in found:  # each waits for the one before, as in a program whose products need each other
      a, b, total = jax.lax.optimization_barrier((operands[number[left]], operands[number[right]], total))
      product = equation.primitive.bind(a, b, **equation.params)
      total += jax.lax.optimization_barrier(product)[(0,) * product.ndim]  # otherwise only this number would be computed
    return total

  given = list(operands.values())
  return lambda: products(given).block_until_ready()
