"""Batches: every window once an epoch, decided by seed and step alone, documents kept apart."""

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.data import loader
from rwkv_jax.data.files import CorpusError

EOD = 0


def count_up(length: int) -> np.ndarray:
    """Tokens that are their own positions, so that a window says where it was cut."""
    return np.arange(1, length + 1, dtype=np.uint32)


def read(tokens, step, *, batch=4, context=16, seed=0, rows=slice(None)):
    return loader.batch(
        tokens, seed=seed, step=step, batch=batch, context=context, eod=EOD, rows=rows
    )


def starts(tokens, count, *, context, seed=0) -> np.ndarray:
    """Where the first `count` windows of the endless sequence begin."""
    batches = [read(tokens, i, batch=1, context=context, seed=seed) for i in range(count)]
    return np.array([b.inputs[0, 0] - 1 for b in batches])


@given(length=st.integers(2, 400), context=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_every_window_once_an_epoch(length, context, seed):
    hypothesis.assume(length > context)
    tokens, windows = count_up(length), loader.epoch_windows(length, context)
    begun = starts(tokens, 2 * windows, context=context, seed=seed).reshape(2, windows)
    for epoch in np.sort(begun):
        assert (np.diff(epoch) == context).all()
        assert epoch[0] >= 0 and epoch[-1] + context + 1 <= length
    assert length - windows * context < 2 * context  # what an epoch leaves out


def test_epochs_and_seeds_differ_in_phase_and_order():
    tokens, context = count_up(16 * 200), 16
    windows = loader.epoch_windows(len(tokens), context)
    orders = [
        starts(tokens, 3 * windows, context=context, seed=seed)[epoch * windows :][:windows]
        for seed in (0, 1)
        for epoch in range(3)
    ]
    assert len({order[0] % context for order in orders}) > 3
    ranks = {tuple(np.argsort(order)) for order in orders}
    assert len(ranks) == 6
    assert tuple(range(windows)) not in ranks


def test_order_is_as_irregular_as_a_shuffle():
    size = 4099
    keys = list(range(10, 10 + loader.ROUNDS))
    order = loader._permute(np.arange(size), size, keys)
    assert sorted(order) == list(range(size))
    # A shuffle has correlation 0 +- 1/sqrt(n) with the identity and with itself one place on,
    # one fixed point on average, and neighbours a third of the range apart.
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / np.sqrt(size)
    assert (order == np.arange(size)).sum() < 10
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.1)


@given(size=st.integers(1, 3000), seed=st.integers(0, 100))
def test_permutation_of_any_size(size, seed):
    keys = list(loader._epoch_keys(seed, 0)[1:])
    assert sorted(loader._permute(np.arange(size), size, keys)) == list(range(size))


def test_pure_in_seed_and_step():
    tokens = count_up(5000)
    forward = [read(tokens, step) for step in range(60)]
    loader._epoch_keys.cache_clear()
    for step in reversed(range(60)):
        again = read(tokens, step)
        assert all((x == y).all() for x, y in zip(again, forward[step], strict=True))


def test_the_order_is_part_of_the_format():
    # A run must resume with the order it began with: another order breaks every run under way.
    assert starts(count_up(2000), 8, context=16, seed=7).tolist() == [
        202,
        954,
        842,
        1946,
        1866,
        394,
        1114,
        1434,
    ]


def test_batch_size_cuts_one_sequence():
    tokens = count_up(3000)
    small = np.concatenate([read(tokens, step, batch=4).inputs for step in range(30)])
    large = np.concatenate([read(tokens, step, batch=12).inputs for step in range(10)])
    assert (small == large).all()


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_rows_are_the_same_however_they_are_shared_out(parts):
    tokens = count_up(700)
    tokens[::37] = EOD
    for step in range(20):  # several epochs, and batches that span two
        whole = read(tokens, step, batch=6)
        size = 6 // parts
        shares = [
            read(tokens, step, batch=6, rows=slice(i * size, (i + 1) * size)) for i in range(parts)
        ]
        for field, pieces in zip(whole, zip(*shares, strict=True), strict=True):
            assert (field == np.concatenate(pieces)).all()
    assert read(tokens, 0, rows=slice(0, 0)).inputs.shape == (0, 16)


@given(lengths=st.lists(st.integers(0, 12), min_size=20, max_size=60), seed=st.integers(0, 1000))
def test_targets_and_resets_against_brute_force(lengths, seed):
    """Each token carries its document's number, the id between two that of the second: where it
    changes, and only there, a state ends."""
    stream, owner = [], []
    for number, length in enumerate(lengths):
        stream += [1 + number] * length + [EOD]
        owner += [number] * length + [number + 1]
    tokens = np.array(stream, np.uint16)
    for step in range(6):
        inputs, targets, reset = read(tokens, step, batch=2, context=9, seed=seed)
        assert (inputs.dtype, targets.dtype, reset.dtype) == (np.int32, np.int32, bool)
        marked = np.arange(len(tokens), dtype=np.uint32)
        positions = read(marked, step, batch=2, context=9, seed=seed)
        for row in range(2):
            places = positions.inputs[row]
            assert (inputs[row] == tokens[places]).all()
            assert (targets[row] == tokens[places + 1]).all()
            for t, place in enumerate(places):
                starts = place > 0 and owner[place] != owner[place - 1]
                assert reset[row, t] == starts


def test_too_short_for_one_window():
    with pytest.raises(CorpusError) as caught:
        read(count_up(16), 0, context=16)
    assert str(caught.value) == (
        "the training documents have 16 tokens, one window needs 17 (train.context + 1):"
        " lower train.context or add text"
    )
    assert read(count_up(17), 3, batch=1, context=16).targets[0, -1] == 17


def test_steps_far_ahead():
    tokens, step = count_up(5_000), 10**12
    windows = loader.epoch_windows(len(tokens), 16)
    epoch = -(-step // windows)
    begun = [read(tokens, epoch * windows + i, batch=1).inputs[0, 0] for i in range(windows)]
    assert (np.diff(np.sort(begun)) == 16).all()
