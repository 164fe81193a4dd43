"""That the shapes in signatures are checked while these tests run (helpers/shapes.py)."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from post_training.data.prepared.packing import PackedRows, reorder
from post_training.models.logits import Scores
from post_training.train.reward_model import pair_losses


def test_argument_of_another_length_is_refused():
    with pytest.raises(TypeCheckError, match="rejected_N"):
        pair_losses(torch.zeros(3), torch.zeros(2), 0.0)


def test_argument_of_another_dtype_is_refused():
    rows = PackedRows(np.array([0, 1, 2]), np.array([1, 0]))
    with pytest.raises(TypeCheckError, match="order"):
        reorder(rows, np.array([1.0, 0.0]))


def test_field_of_a_dataclass_with_one_dimension_too_many_is_refused():
    with pytest.raises(TypeCheckError, match="tops"):
        Scores(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1))


def test_right_shapes_are_taken():
    assert pair_losses(torch.zeros(3), torch.zeros(3), 0.0).shape == (3,)
