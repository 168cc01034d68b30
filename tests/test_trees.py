"""Nested dicts: names, splitting, merging."""

import pytest

from t5x_cpm import trees

TREE = {'a': {'b': 1, 'c': {'d': 2}}, 'e': {'f': 3}, 'g': 4}


def test_names_and_back():
  assert trees.named(TREE) == {'a/b': 1, 'a/c/d': 2, 'e/f': 3, 'g': 4}
  assert trees.nested(trees.named(TREE)) == TREE


@pytest.mark.parametrize('chosen', [{'yes'}, {'no'}, {'yes', 'no'}, set()])
def test_split_and_merged_are_inverse(chosen):
  labels = {'a': {'b': 'yes', 'c': {'d': 'no'}}, 'e': {'f': 'no'}, 'g': 'yes'}
  yes, no = trees.split(TREE, labels, lambda label: label in chosen)
  assert trees.merged(yes, no) == trees.merged(no, yes) == TREE
  if chosen == {'yes'}:
    assert (yes, no) == ({'a': {'b': 1}, 'g': 4}, {'a': {'c': {'d': 2}}, 'e': {'f': 3}})


def test_the_second_of_two_leaves_is_taken():
  assert trees.merged(TREE, {'a': {'c': {'d': 5}}, 'h': {'i': 6}}) == TREE | {'a': {'b': 1, 'c': {'d': 5}}, 'h': {'i': 6}}
