"""Input ids without the placeholders of dropped tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elision

IMAGE = 9


def test_placeholders_of_two_pictures() -> None:
    ids = np.array([[1, 9, 9, 9, 2, 9, 9, 9, 3], [9, 9, 9, 4, 5, 6, 9, 9, 9]])
    kept = np.array([[0, 2], [1, 2], [0, 1], [0, 2]])
    short, places = elision.drop_placeholders(ids, kept, IMAGE)
    assert short.tolist() == [[1, 9, 9, 2, 9, 9, 3], [9, 9, 4, 5, 6, 9, 9]]
    assert places.tolist() == [[0, 1, 3, 4, 6, 7, 8], [0, 1, 3, 4, 5, 6, 8]]


def test_class_tokens_are_no_placeholders_and_tensors_give_tensors() -> None:
    ids = torch.tensor([[1, 9, 9, 9, 2]])
    short, places = elision.drop_placeholders(ids, torch.tensor([[0, 1, 3]]), IMAGE, before=1)
    assert short.tolist() == [[1, 9, 9, 2]] and places.tolist() == [[0, 1, 3, 4]]
    assert short.dtype == torch.int64


def test_texts_of_different_lengths_take_padding() -> None:
    ids = np.array([[9, 9, 9, 1, 9, 9, 9], [9, 9, 9, 1, 2, 3, 4]])
    kept = np.array([[0], [0], [1]])
    with pytest.raises(elision.ElisionError, match="would have from 3 to 5 tokens: say which id is padding"):
        elision.drop_placeholders(ids, kept, IMAGE)
    short, places = elision.drop_placeholders(ids, kept, IMAGE, padding=0)
    assert short.tolist() == [[9, 1, 9, 0, 0], [9, 1, 2, 3, 4]]
    assert places.tolist() == [[0, 3, 4, 6, 6], [1, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([[0, 3]], "kept says token 3 of 3"),
        ([[-1, 0]], "kept says token -1 of 3"),
        ([[1, 1]], "kept says a token twice"),
        ([[0], [1]], "3 placeholders are no 2 pictures"),
        ([[0.5]], "kept must be integers"),
        ([0], "kept must be integers"),
    ],
)
def test_what_cannot_be_kept(kept: object, message: str) -> None:
    with pytest.raises(elision.ElisionError, match=message):
        elision.drop_placeholders(np.array([[1, 9, 9, 9]]), np.array(kept), IMAGE)


@given(st.data())
def test_what_is_left_is_what_stands_at_its_places(data: st.DataObject) -> None:
    rows, each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    words = data.draw(st.integers(0, 4))
    texts = []
    for _ in range(rows):
        order = data.draw(st.permutations([IMAGE] * each + [1] * words))
        texts.append(order)
    count = data.draw(st.integers(1, each))
    kept = np.array([sorted(data.draw(st.permutations(range(each)))[:count]) for _ in range(rows)])
    ids = np.array(texts)
    short, places = elision.drop_placeholders(ids, kept, IMAGE)
    assert short.shape == (rows, words + count)
    np.testing.assert_array_equal(short, np.take_along_axis(ids, places, 1))
    assert (np.diff(places) > 0).all() and ((short == IMAGE).sum(1) == count).all()
