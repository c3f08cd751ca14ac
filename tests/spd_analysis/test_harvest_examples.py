import numpy as np
import torch

from spd_analysis.harvest.examples import best, candidates, importance_of, scrambled, windows


def test_scrambled_numbers_stay_different_and_in_range():
    numbers = torch.cat([torch.arange(200_000), 2**31 - 1 - torch.arange(200_000)])
    mixed = scrambled(numbers)
    assert len(mixed.unique()) == 400_000
    assert mixed.min() >= 0 and mixed.max() < 2**31
    # Neighbours end up anywhere: half of them below the middle, and in no order.
    below = (mixed[:200_000] < 2**30).float().mean()
    assert abs(below - 0.5) < 0.01
    assert abs((mixed[1:200_000] > mixed[: 200_000 - 1]).float().mean() - 0.5) < 0.01


def test_the_largest_importances_are_the_candidates():
    ci = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    ci[:, 2] *= 0.1  # never above the threshold
    nothing = torch.full((3,), -1)
    who, samples, keys = candidates(ci, 1000, 0.5, 4, nothing)
    for c in range(2):
        mine = who == c
        wanted = ci[:, c].topk(4)
        assert samples[mine].tolist() == wanted.indices.tolist()
        assert importance_of(keys[mine].numpy()).tolist() == wanted.values.tolist()
    assert not (who == 2).any()
    # Against what is known already, only larger ones.
    to_beat = torch.stack([keys[who == 0][1], keys[who == 1][3], torch.tensor(-1)])
    who, samples, _ = candidates(ci, 1000, 0.5, 4, to_beat)
    assert [(who == c).sum().item() for c in range(3)] == [1, 3, 0]


def test_equal_importances_are_told_apart_by_their_place_alone():
    ci = torch.ones(64, 1)
    whole = candidates(ci, 0, 0.0, 10, torch.tensor([-1]))
    halves = [candidates(ci[i : i + 32], i, 0.0, 10, torch.tensor([-1])) for i in (0, 32)]
    joined = torch.cat([half[2] for half in halves]).sort(descending=True).values[:10]
    assert torch.equal(whole[2], joined)
    assert sorted(whole[1].tolist()) != list(range(10))


def test_windows_end_where_the_sequence_does():
    tokens = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    rows, positions = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3])
    assert windows(tokens, rows, positions, 2).tolist() == [
        [-1, -1, 10, 11, 12], [20, 21, 22, 23, -1], [21, 22, 23, -1, -1],
    ]  # fmt: skip
    assert windows(tokens, rows, positions, 0).tolist() == [[10], [22], [23]]


def test_the_best_rows_of_each_are_kept():
    rng = np.random.default_rng(0)
    rows = {
        "subcomponent": rng.integers(0, 4, 60),
        "key": rng.permutation(60),
        "x": rng.random((60, 2)),
    }
    halves = [{k: v[i::2] for k, v in rows.items()} for i in (1, 0)]
    kept = best(halves, 5)
    wanted = []
    for who in range(4):
        mine = [i for i in range(60) if rows["subcomponent"][i] == who]
        wanted += sorted(mine, key=lambda i: -rows["key"][i])[:5]
    assert kept["key"].tolist() == rows["key"][wanted].tolist()
    assert (kept["x"] == rows["x"][wanted]).all()
