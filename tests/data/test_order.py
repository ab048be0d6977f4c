"""The official order against numbers of the official trainer, and its properties."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.order import magic_prime, magic_slots, official_sample

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "data_lr.json").read_text())["data"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['tokens']}-{case['ctx']}")
def test_official_numbers(case):
    prime = magic_prime(case["tokens"], case["ctx"])
    assert prime == case["magic_prime"]
    offsets = magic_slots(np.arange(8), prime) * case["ctx"]
    assert offsets.tolist() == case["offsets_ii_1_to_8"]


@given(contexts=st.integers(60, 3000), context=st.integers(1, 9))
def test_every_context_once(contexts, context):
    try:
        prime = magic_prime(contexts * context + context - 1, context)
    except CorpusError:
        return  # few primes are near some small numbers
    slots = magic_slots(np.arange(prime), prime)
    assert sorted(slots) == list(range(prime))
    assert (magic_slots(np.arange(prime, 2 * prime), prime) == slots).all()


@pytest.mark.parametrize("world, micro_batch", [(1, 16), (2, 8), (8, 30), (3, 4)])
def test_devices_together_have_the_samples_of_one(world, micro_batch):
    """Whatever the devices, a step sees the same samples, and a mini-epoch 40,320 in order."""
    batch = world * micro_batch
    for step in (0, 1, 40320 // batch - 1, 40320 // batch, 3 * 40320 // batch + 7):
        seen = sorted(
            official_sample(step, row, micro_batch=micro_batch, rank=rank, world=world)
            for rank in range(world)
            for row in range(micro_batch)
        )
        assert seen == list(range(step * batch, (step + 1) * batch))


def test_batches_that_the_official_trainers_refuse():
    with pytest.raises(ValueError, match="11 x 1 samples a step do not divide 40,320"):
        official_sample(0, 0, micro_batch=11)


def test_too_few_contexts():
    with pytest.raises(CorpusError, match=r"of 5,120, 10 contexts of 512, it would use 5"):
        magic_prime(5120, 512)
