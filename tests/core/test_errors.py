"""The tree of errors: what is drawn is what there is, and each can be caught as what Python calls it."""

from __future__ import annotations

import re

import pytest

from torchspan.core import errors


@pytest.mark.once
def test_the_drawn_tree_is_the_one_that_there_is() -> None:
    rows = re.findall(r"^ {4}([│├└ ─]*)(\w+Error)", str(errors.__doc__), flags=re.MULTILINE)
    drawn = {name: len(indent) // 4 for indent, name in rows}
    there = {
        name: len([base for base in kind.__mro__ if issubclass(base, errors.TorchspanError)]) - 1
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.TorchspanError)
    }
    assert drawn == there


@pytest.mark.once
def test_an_unknown_name_is_a_key_error_with_a_suggestion_and_the_exit_code_of_bad_input() -> None:
    error = errors.unknown_name("pass", "bucket", ["buckets"], "there are: buckets")
    assert isinstance(error, KeyError) and error.exit_code == 2
    assert str(error) == "no pass 'bucket'; did you mean 'buckets'? there are: buckets"
    assert isinstance(errors.UnsupportedError(), NotImplementedError)
