"""Batches: every sample once an epoch, decided by seed and step alone, documents isolated."""

import time

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.data import loader, order
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.loader import Batch, Batching, Stream, open_loader, prefetched

EOD = 0


def count_up(length: int) -> np.ndarray:
    """Tokens that are their own positions, so that a window says where it was cut."""
    return np.arange(1, length + 1, dtype=np.uint32)


def opened(tokens, *, batch=4, context=16, seed=0, vocab_size=2**32, **settings):
    stream = Stream("text", tokens, EOD)
    return open_loader([stream], Batching(seed, batch, context, vocab_size, **settings))


def read(tokens, step, *, rows=slice(None), **settings):
    return opened(tokens, **settings).read(step, rows)


def windows_of(tokens, context):
    return loader.epoch_windows(Stream("text", tokens, EOD), context)


def starts(tokens, count, *, context, seed=0) -> np.ndarray:
    """Where the first `count` windows of the endless sequence begin."""
    mine = opened(tokens, batch=1, context=context, seed=seed)
    return np.array([mine.read(i).inputs[0, 0] - 1 for i in range(count)])


@given(length=st.integers(2, 400), context=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_every_window_once_an_epoch(length, context, seed):
    hypothesis.assume(length > context)
    tokens, windows = count_up(length), windows_of(count_up(length), context)
    first = starts(tokens, 2 * windows, context=context, seed=seed).reshape(2, windows)
    for epoch in np.sort(first):
        assert (np.diff(epoch) == context).all()
        assert epoch[0] >= 0 and epoch[-1] + context + 1 <= length
    assert length - windows * context < 2 * context  # what an epoch leaves out


def test_epochs_and_seeds_differ_in_phase_and_order():
    tokens, context = count_up(16 * 200), 16
    windows = windows_of(tokens, context)
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
    keys = list(range(10, 10 + order.ROUNDS))
    image = order._permute(np.arange(size), size, keys)
    assert sorted(image) == list(range(size))
    # A shuffle has correlation 0 +- 1/sqrt(n) with the identity and with itself one place on,
    # one fixed point on average, and neighbours a third of the range apart.
    assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 4 / np.sqrt(size)
    assert (image == np.arange(size)).sum() < 10
    assert np.abs(np.diff(image)).mean() == pytest.approx(size / 3, rel=0.1)


@given(size=st.integers(1, 3000), seed=st.integers(0, 100))
def test_permutation_of_any_size(size, seed):
    keys = list(order.epoch_keys(str(seed), 0)[1:])
    assert sorted(order._permute(np.arange(size), size, keys)) == list(range(size))


def assert_same(a: Batch, b: Batch) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None and y is None) or (x == y).all()


def test_pure_in_seed_and_step():
    tokens = count_up(5000)
    forward = [read(tokens, step) for step in range(60)]
    order.epoch_keys.cache_clear()
    for step in reversed(range(60)):
        again = read(tokens, step)
        assert_same(again, forward[step])


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
        for field, pieces in zip(whole[:3], zip(*shares, strict=True), strict=False):
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
        inputs, targets, reset, _ = read(tokens, step, batch=2, context=9, seed=seed)
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
        "text: the training documents have 16 tokens, one window needs 17 (train.context + 1):"
        " lower train.context or add text"
    )
    assert read(count_up(17), 3, batch=1, context=16).targets[0, -1] == 17


def test_steps_far_ahead():
    tokens, step = count_up(5_000), 10**12
    windows = windows_of(tokens, 16)
    epoch = -(-step // windows)
    mine = opened(tokens, batch=1)
    first = [mine.read(epoch * windows + i).inputs[0, 0] for i in range(windows)]
    assert (np.diff(np.sort(first)) == 16).all()


SETTINGS = [
    {},
    {"sampler": "magic_prime"},
    {"sampler": "sequential"},
    {"packing": "documents"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@given(
    lengths=st.lists(st.integers(20, 40), min_size=60, max_size=80),
    parts=st.sampled_from([1, 2, 3, 6]),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 1000),
)
def test_every_order_is_shared_out_and_reached_alike(settings, lengths, parts, step, seed):
    tokens = np.concatenate([np.append(np.arange(1, n), EOD) for n in lengths]).astype(np.uint16)
    mine = opened(tokens, batch=6, context=8, seed=seed, **settings)
    whole, size = mine.read(step), 6 // parts
    again = opened(tokens, batch=6, context=8, seed=seed, **settings)
    shares = [again.read(step, slice(i * size, (i + 1) * size)) for i in range(parts)]
    joined = (np.concatenate(x) if x[0] is not None else None for x in zip(*shares, strict=True))
    assert_same(whole, Batch(*joined))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), context=st.integers(2, 25))
def test_packs_hold_every_token_once(lengths, context):
    """All of each document is a target once an epoch; nothing is beside it but its own beginning,
    after a fresh state, and padding that is not trained on."""
    names = iter(range(1, 10**6))
    documents = [[*(next(names) for _ in range(n - 1)), EOD] for n in lengths]
    tokens = np.concatenate(documents).astype(np.uint32)
    packed = opened(tokens, batch=1, context=context, packing="documents")
    before = {}
    for document in documents:
        before |= dict(zip(document, [EOD, *document], strict=False))
    for epoch in range(2):
        found = []
        for sample in range(packed.epoch[0]):
            inputs, targets, reset, mask = (
                x[0] for x in packed.read(epoch * packed.epoch[0] + sample) if x is not None
            )
            found += targets[mask].tolist()
            for t in np.flatnonzero(mask):
                if targets[t] != EOD:
                    assert inputs[t] == before[targets[t]]
                if not reset[t]:
                    assert inputs[t] == targets[t - 1] and mask[t - 1]
            assert (reset | (inputs != EOD)).all()
            assert reset[~mask].all()
        assert sorted(found) == sorted(tokens.tolist())


def test_packs_leave_little_empty():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5, 1, 20_000), 1, None).astype(np.int64)
    tokens = np.ones(sizes.sum(), np.uint16)
    tokens[np.cumsum(sizes) - 1] = EOD
    packed = opened(tokens, context=1024, packing="documents")
    assert packed.epoch[0] * 1024 < 1.001 * len(tokens)


def test_a_document_that_begins_elsewhere_begins_with_its_own_end():
    """Pairs whose documents do not end with the id: the token before belongs to another
    document."""
    ids = np.arange(1, 21, dtype=np.uint16)
    stream = Stream("text", ids, EOD, documents=np.array([0, 4, 20]))
    settings = {"seed": 0, "batch": 2, "context": 16, "vocab_size": 99, "packing": "documents"}
    inputs, targets, reset, mask = open_loader([stream], Batching(**settings)).read(0)
    rows = {int(targets[row, 0]): row for row in range(2)}
    row = rows[5]
    assert inputs[row].tolist() == [EOD, *range(5, 20)] and targets[row].tolist() == [*range(5, 21)]
    assert reset[row].tolist() == [True] + [False] * 15 and mask[row].all()
    row = rows[1]
    assert inputs[row].tolist() == [EOD, 1, 2, 3] + [EOD] * 12
    assert mask[row].tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize("sampler", ["shuffle", "sequential"])
def test_documents_that_do_not_end_with_the_id_start_afresh(sampler):
    """The index decides: the first token of each document is predicted from the id alone, from no
    token before."""
    tokens, starts = count_up(600), np.arange(0, 601, 20)
    stream = Stream("text", tokens, EOD, documents=starts)
    settings = {"seed": 0, "batch": 4, "context": 16, "vocab_size": 999, "sampler": sampler}
    mine = open_loader([stream], Batching(**settings))
    seen = 0
    for step in range(9):
        inputs, targets, reset, _ = mine.read(step)
        begins = (targets - 1) % 20 == 0
        assert (reset[:, 1:] == begins[:, 1:]).all()
        assert (inputs[begins] == EOD).all() and (inputs[~reset] == targets[~reset] - 1).all()
        seen += begins.sum()
    assert seen > 10


@given(length=st.integers(200, 2000), context=st.integers(1, 20), batch=st.integers(1, 5))
def test_rows_continue_where_they_stopped(length, context, batch):
    tokens = count_up(length)
    mine = opened(tokens, batch=batch, context=context, sampler="sequential")
    steps = mine.epoch[0] // batch
    batches = [mine.read(step) for step in range(2 * steps)]
    for row in range(batch):
        row_tokens = np.concatenate([x.inputs[row] for x in batches])
        assert (row_tokens[: steps * context] == row_tokens[0] + np.arange(steps * context)).all()
        assert (row_tokens[steps * context :] == row_tokens[: steps * context]).all()
        fresh = [x.reset[row] for x in batches]
        assert [x.any() for x in fresh] == [i % steps == 0 for i in range(2 * steps)]
        assert fresh[0].tolist() == [True] + [False] * (context - 1)
    first = sorted(batches[0].inputs[:, 0].tolist())
    assert first == [1 + row * steps * context for row in range(batch)]


def test_without_resets_nothing_is_marked():
    tokens = np.tile(np.array([1, 2, EOD], np.uint16), 400)
    mine = opened(tokens, sampler="magic_prime", reset=False, context=8)
    assert not any(mine.read(step).reset.any() for step in range(30))
    assert any(opened(tokens, context=8).read(step).reset.any() for step in range(30))


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=9), start=st.integers(0, 10**9))
def test_mixtures_hold_on_every_prefix(weights, start):
    samples = np.arange(3000)
    source, index = order.interleave(samples, weights)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), 0)
    expected = (samples[:, None] + 1) * (np.array(weights) / sum(weights))
    assert np.abs(counts - expected).max() <= 0.5 + 0.5 * np.ceil(np.log2(len(weights))) + 0.01
    for number in range(len(weights)):
        mine = index[source == number]
        assert (mine == np.arange(len(mine))).all()
    million = order.interleave(10**9 + samples, weights)[1][-1] + 1
    share = weights[order.interleave(10**9 + samples, weights)[0][-1]] / sum(weights)
    assert abs(million - share * (10**9 + len(samples))) < 3
    far = order.interleave(start + samples[:100], weights)
    assert (far[0][50:] == order.interleave(start + samples[50:100], weights)[0]).all()


def test_each_source_of_a_mixture_has_its_own_epochs():
    a, b = count_up(400), count_up(300) + 1000
    streams = [Stream("a", a, EOD, weight=0.25), Stream("b", b, EOD, weight=0.75)]
    mine = open_loader(streams, Batching(0, 8, 16, 10**4))
    rows = np.concatenate([mine.read(step).inputs[:, 0] for step in range(100)])
    for name, (stream, offset) in enumerate(((a, 0), (b, 1000))):
        first = rows[(rows > 1000) == bool(name)] - offset - 1
        windows = windows_of(stream, 16)
        for epoch in first[: len(first) // windows * windows].reshape(-1, windows):
            assert (np.diff(np.sort(epoch)) == 16).all()


def test_masks_follow_the_targets():
    tokens = count_up(500)
    mask = tokens % 3 == 0
    streams = [Stream("a", tokens, EOD, mask=mask), Stream("b", tokens + 1000, EOD)]
    mine = open_loader(streams, Batching(0, 4, 16, 10**4))
    for step in range(20):
        batch = mine.read(step)
        expected = (batch.targets % 3 == 0) | (batch.targets > 1000)
        assert (batch.mask == expected).all()
    packed = open_loader(streams[:1], Batching(0, 1, 64, 10**4, packing="documents"))
    batch = packed.read(0)
    assert (batch.mask == (batch.targets % 3 == 0) & (batch.targets > 0)).all()


def test_an_id_outside_the_vocabulary():
    tokens = count_up(500)
    with pytest.raises(CorpusError, match=r"text: token \d+ is \d+, but the model has 100 ids"):
        for step in range(10):
            read(tokens, step, vocab_size=100)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sampler": "sequential"}, "text: 20 tokens are too few for 4 rows"),
        ({"sampler": "magic_prime"}, "official order: of 20, 1 contexts of 16"),
    ],
)
def test_too_short_for_an_order(settings, message):
    with pytest.raises(CorpusError, match=message):
        opened(count_up(20), **settings)


def test_batches_are_read_ahead_in_order_and_errors_arrive():
    asked = []

    def slow(step):
        asked.append(step)
        if step == 7:
            raise CorpusError("seven")
        return step

    coming = prefetched(slow, range(3, 10), ahead=2)
    assert next(coming) == 3
    for _ in range(100):
        if asked == [3, 4, 5]:
            break
        time.sleep(0.01)
    assert asked == [3, 4, 5]  # two ahead, and no more
    assert [next(coming) for _ in range(3)] == [4, 5, 6]
    with pytest.raises(CorpusError, match="seven"):
        next(coming)
    assert list(prefetched(lambda step: step, range(1))) == [0]
    assert list(prefetched(lambda step: step, range(0))) == []
