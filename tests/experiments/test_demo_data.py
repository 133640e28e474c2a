"""The digits and their batches."""

import numpy as np
import pytest

from experiments.demo import data


@pytest.fixture(scope="module")
def split():
    return data.load(0.4)


def test_images_are_unit_scaled_nhwc(split):
    for part in split:
        assert part.images.shape == (len(part.labels), 8, 8, 1)
        assert part.images.dtype == np.float32
        assert part.labels.dtype == np.int32
        assert part.images.min() == 0.0
        assert part.images.max() == 1.0


def test_the_split_is_whole_fixed_and_stratified(split):
    train, test = split
    assert (len(train.labels), len(test.labels)) == (1078, 719)
    np.testing.assert_array_equal(data.load(0.4)[0].images, train.images)
    frequencies = [np.bincount(part.labels, minlength=10) / len(part.labels) for part in split]
    np.testing.assert_allclose(*frequencies, atol=0.002)


def test_batches_have_one_size_and_keep_images_with_their_labels(split):
    train, _ = split
    found = list(data.batches(train, 100))
    assert len(found) == data.steps_per_epoch(train, 100) == 10
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in found]), train.labels[:1000])
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in found]), train.images[:1000])


def test_the_seed_decides_the_order(split):
    numbered = data.Split(split[0].images, np.arange(len(split[0].labels)))

    def order(seed):
        return [batch.labels.tolist() for batch in data.shuffled_batches(numbered, 100, epochs=2, seed=seed)]

    assert order(1) == order(1) != order(2)
    first, second = np.array(order(1)).reshape(2, -1)
    assert len(set(first.tolist())) == len(first)
    assert first.tolist() != second.tolist()


def test_a_batch_larger_than_the_split_is_refused(split):
    with pytest.raises(ValueError, match="only 719"):
        data.steps_per_epoch(split[1], 720)
