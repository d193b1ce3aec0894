"""Quantised numbers are near those before, and blocks fit their matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcap.exporting.quantise import block_of, per_block, per_column


@settings(max_examples=50)
@given(
    st.integers(1, 70), st.integers(1, 9), st.sampled_from([4, 8]), st.sampled_from([16, 32, 128]), st.integers(0, 99)
)
def test_blocks_give_back_what_went_in_within_a_step(inputs, outputs, bits, size, seed):
    matrix = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)
    numbers, scales = per_block(matrix, bits, size)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:2], size)
    back = (numbers.astype(np.float32) - 2 ** (bits - 1)) * scales[:, :, None]
    back = back.reshape(outputs, -1)[:, :inputs]
    step = np.repeat(np.abs(scales), size, 1)[:, :inputs]
    # The mirror image of the farthest number is one step beyond the last level.
    last = (numbers == 2**bits - 1).reshape(outputs, -1)[:, :inputs]
    assert (np.abs(back - matrix) <= np.where(last, 1.001, 0.501) * step).all()


def test_columns_keep_their_own_scale():
    matrix = np.array([[1.0, 100.0, 0.0], [-0.5, 50.0, 0.0]], np.float32)
    integers, scales = per_column(matrix)
    assert integers.dtype == np.int8
    assert np.allclose(integers * scales, matrix, atol=0.5)
    assert scales.tolist() == pytest.approx([1 / 127, 100 / 127, 1])
    assert integers[0].tolist() == [127, 127, 0]


@pytest.mark.parametrize(
    ("inputs", "size"), [(768, 128), (3072, 128), (192, 64), (96, 32), (32, 32), (50, 16), (8, 16)]
)
def test_the_largest_blocks_that_are_full_are_taken(inputs, size):
    assert block_of(inputs) == size
