from collections import Counter

import numpy as np

from spd_analysis.harvest.counts import count, total


def as_counter(counts):
    return Counter(dict(zip(zip(counts.a.tolist(), counts.b.tolist(), strict=True),
                            counts.counts.tolist(), strict=True)))  # fmt: skip


def test_pairs_are_counted():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 200), rng.integers(0, 2**31 - 1, 200) % 7 + 2**31 - 8
    assert as_counter(count(a, b, None)) == Counter(zip(a.tolist(), b.tolist(), strict=True))


def test_weights_and_sums():
    rng = np.random.default_rng(1)
    parts, wanted = [], Counter()
    for _ in range(3):
        a, b, n = (rng.integers(1, 6, 30) for _ in range(3))
        parts.append(count(a, b, n))
        for x, y, k in zip(a.tolist(), b.tolist(), n.tolist(), strict=True):
            wanted[x, y] += k
    assert as_counter(total(parts)) == wanted
    assert (total(parts).pairs == total(parts[::-1]).pairs).all()
    assert (np.diff(total(parts).pairs) > 0).all()


def test_nothing_is_counted_as_nothing():
    empty = np.zeros(0, np.int64)
    assert len(total([count(empty, empty, None), count(empty, empty, empty)]).pairs) == 0
