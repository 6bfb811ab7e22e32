import time

import pytest
import torch

from fastseg.training.batches import prefetch, training_batch


def test_each_epoch_contains_every_sample_once():
    class Numbers:
        def __len__(self):
            return 7

        def sample(self, index, epoch):
            return torch.full((3, 1, 1), float(index)), torch.full((1, 1), epoch)

    batches = [training_batch(Numbers(), 3, seed=5, step=step) for step in range(7)]
    indices = torch.cat([images[:, 0].flatten() for images, _ in batches]).int().tolist()
    epochs = torch.cat([masks.flatten() for _, masks in batches]).tolist()
    assert epochs == [0] * 7 + [1] * 7 + [2] * 7
    orders = [indices[:7], indices[7:14], indices[14:]]
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1] != orders[2]
    assert [m.tolist() for m in training_batch(Numbers(), 3, 5, 4)] == [m.tolist() for m in batches[4]]
    assert not torch.equal(training_batch(Numbers(), 7, 6, 0)[0], training_batch(Numbers(), 7, 5, 0)[0])


def test_prefetch_keeps_the_order_and_raises_errors_of_its_threads():
    def make(index):
        time.sleep(0.01 * (index % 3 == 0))
        if index == 9:
            raise ValueError("nine")
        return index

    items = prefetch(make, range(3, 20), workers=4)
    assert [next(items) for _ in range(6)] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="nine"):
        next(items)
