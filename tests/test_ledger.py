"""What the segments of an epoch come to: pure functions, without Keras."""

import numpy as np
import pytest
from common import one_backend

from keras_dwa._ledger import (
    Segment,
    averages,
    is_known,
    loss_parts,
    mean_weights,
    total,
    weights_of_batch,
)

pytestmark = one_backend
UNKNOWN = np.full(5, np.nan)


def segment(weights, end, losses=None, counts=(1.0, 1.0), total=None):
    """One whose losses average to `losses`."""
    if losses is None:
        return Segment(np.array(weights), end, UNKNOWN)
    sums = [*np.multiply(losses, counts), *counts, counts[0] if total is None else total]
    return Segment(np.array(weights), end, np.array(sums, dtype=float))


def test_losses_have_their_own_counts_and_the_parts_those_of_the_total():
    ledger = [
        segment([1.0, 1.0], 3, (1.0, 4.0), (6, 18), total=6),
        segment([1.0, 0.5], 4, (3.0, -80.0), (2, 2), total=6),
    ]
    losses = averages(total(ledger))
    assert is_known(ledger)
    np.testing.assert_allclose(losses, [1.5, -4.4])
    np.testing.assert_allclose(mean_weights(ledger), [1.0, 0.75])
    np.testing.assert_allclose(loss_parts(ledger, losses), [2.0, -18.0])
    np.testing.assert_allclose(loss_parts(ledger, losses, np.array([2.0, 1.0])), [4.0, -38.0])


def test_weights_that_stay_are_exact_and_the_logged_losses_theirs():
    ledger = [segment([0.1, 0.7], end, (1.0, 1.0), (3, 3)) for end in (1, 2, 3)]
    assert mean_weights(ledger).tolist() == [0.1, 0.7]
    np.testing.assert_array_equal(loss_parts(ledger, np.array([2.0, 3.0])), [0.2, 0.7 * 3])


@pytest.mark.parametrize(
    "sums", [{}, {"losses": (1.0, 1.0), "counts": (0, 0)}], ids=["unknown", "nothing counted"]
)
def test_batches_whose_losses_are_not_known_count_one_each(sums):
    ledger = [segment([1.0, 0.0], 3), segment([5.0, 1.0], 4, **sums)]
    assert not is_known(ledger)
    np.testing.assert_allclose(mean_weights(ledger), [2.0, 0.25])
    np.testing.assert_allclose(loss_parts(ledger, np.array([2.0, 8.0])), [4.0, 2.0])


def test_segment_without_a_loss_leaves_the_others_as_they_are():
    ledger = [segment([2.0, 1.0], 1, (1.0, 3.0)), segment([4.0, 1.0], 2, (0.0, 0.0), (0, 0))]
    np.testing.assert_array_equal(averages(ledger[1].sums), [np.nan, np.nan])
    losses = averages(total(ledger))
    np.testing.assert_allclose(losses, [1.0, 3.0])
    np.testing.assert_allclose(loss_parts(ledger, losses), [2.0, 3.0])


def test_batch_had_the_weights_of_its_segment_or_the_current_ones():
    ledger = [segment([1.0, 1.0], 2), segment([2.0, 1.0], 2), segment([3.0, 1.0], 5)]
    found = [weights_of_batch(ledger, batch, np.array([4.0, 1.0]))[0] for batch in range(7)]
    assert found == [1.0, 1.0, 3.0, 3.0, 3.0, 4.0, 4.0]
    assert weights_of_batch([], 3, np.array([4.0, 1.0]))[0] == 4.0
