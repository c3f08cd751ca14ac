"""Harvests against counting position by position."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from harvest_models import N_TOKENS, SEQ, token_decomposition

from spd_analysis.harvest.collect import UNIT, collect, total
from spd_analysis.harvest.config import DEFAULT, load_config
from spd_analysis.harvest.examples import importance_of
from spd_analysis.observe import observe

SIZE = 6
CONFIG = load_config(DEFAULT, ["threshold=0.2", "top_k=4", "window=2", "batches=8", "seed=3"])


@pytest.fixture(scope="module")
def d():
    return token_decomposition()


@pytest.fixture(scope="module")
def direct(d):
    """Every position of all batches: (batch, row, place), importances, token, prediction."""
    found = []
    for batch in range(8):
        seen = observe(d, 3, batch, SIZE, "harvest")
        ci = np.concatenate([seen.ci["wte"].numpy(), seen.ci["head"].numpy()], axis=1)
        for i, values in enumerate(ci):
            row, place = divmod(i, SEQ)
            token, logits = seen.examples[row, place].item(), seen.target_out[row, place]
            at = (batch, row, place)
            found.append((at, values, token, logits.tolist().index(logits.max())))
    return found


@pytest.fixture(scope="module")
def whole(d):
    done = []
    harvest = collect(d, CONFIG, range(8), lambda: done.append(1))
    assert len(done) == 8
    return harvest


def test_firings_and_means(whole, direct):
    values = np.stack([ci for _, ci, _, _ in direct])
    assert whole.n_positions == len(values) == 8 * SIZE * SEQ
    assert (whole.firings == (values > 0.2).sum(0)).all()
    assert whole.firings[0] == 0 and (whole.firings[1:] > 0).any()
    wanted = values.astype(np.float64).mean(0)
    assert whole.ci_units * UNIT / whole.n_positions == pytest.approx(wanted, abs=1e-9)


def test_examples_are_the_largest_with_their_windows(whole, direct):
    at = {place: (ci, token) for place, ci, token, _ in direct}
    rows = whole.examples
    for who in range(9):
        mine = rows["subcomponent"] == who
        fired = sorted((ci[who] for _, ci, _, _ in direct if ci[who] > 0.2), reverse=True)
        assert importance_of(rows["key"][mine]).tolist() == [float(x) for x in fired[:4]]
        for i in np.flatnonzero(mine):
            batch, row = divmod(int(rows["example"][i]), SIZE)
            place = int(rows["position"][i])
            assert at[batch, row, place][0][who] == importance_of(rows["key"][i : i + 1])[0]
            window = [at.get((batch, row, p)) for p in range(place - 2, place + 3)]
            assert rows["tokens"][i].tolist() == [-1 if w is None else w[1] for w in window]
            importances = [-1.0 if w is None else w[0][who] for w in window]
            assert rows["importances"][i].tolist() == importances


def test_examples_among_ties_come_from_everywhere(whole, direct):
    n_ones = np.stack([ci == 1 for _, ci, _, _ in direct]).sum(0)
    who = int(n_ones.argmax())
    assert n_ones[who] > 40
    rows = whole.examples
    mine = rows["subcomponent"] == who
    assert (importance_of(rows["key"][mine]) == 1).all()
    assert len(set((rows["example"][mine] // SIZE).tolist())) > 1


def test_cofirings_and_tokens(whole, direct):
    cofirings, inputs, outputs = Counter(), Counter(), Counter()
    for _, ci, token, predicted in direct:
        fired = np.flatnonzero(ci > 0.2).tolist()
        cofirings.update((a, b) for a in fired for b in fired if a < b)
        inputs.update((who, token) for who in fired)
        outputs.update((who, predicted) for who in fired)
    tables = {"cofirings": cofirings, "input_tokens": inputs, "output_tokens": outputs}
    tables["all_inputs"] = Counter((token, 0) for _, _, token, _ in direct)
    tables["all_outputs"] = Counter((predicted, 0) for _, _, _, predicted in direct)
    assert len(tables["all_inputs"]) == N_TOKENS
    for name, wanted in tables.items():
        found = getattr(whole, name)
        pairs = zip(found.a.tolist(), found.b.tolist(), strict=True)
        assert Counter(dict(zip(pairs, found.counts.tolist(), strict=True))) == wanted, name


def same(one, other):
    assert one.n_positions == other.n_positions
    assert (one.firings == other.firings).all() and (one.ci_units == other.ci_units).all()
    for name, column in one.examples.items():
        assert (column == other.examples[name]).all(), name
    for table in ("cofirings", "input_tokens", "output_tokens", "all_inputs", "all_outputs"):
        assert (getattr(one, table).pairs == getattr(other, table).pairs).all()
        assert (getattr(one, table).counts == getattr(other, table).counts).all()


def test_shards_in_any_order_are_the_whole(d, whole):
    shards = [collect(d, CONFIG, range(i, 8, 3), lambda: None) for i in range(3)]
    for order in permutations(shards):
        same(total(list(order), 4), whole)
    same(total([total([shards[2], shards[0]], 4), shards[1]], 4), whole)
    same(collect(d, CONFIG, reversed(range(8)), lambda: None), whole)


def test_what_is_kept_does_not_grow_with_the_data(whole):
    assert np.bincount(whole.examples["subcomponent"]).max() == 4


def test_too_many_positions_are_refused(d):
    with pytest.raises(ValueError, match="too many positions"):
        collect(d, CONFIG, [2**31], lambda: None)
