"""The benchmark of packed runs: its arithmetic, and that it works as a user runs it."""

import pytest

from benchmarks.pack import launch, runs_an_hour, sweep


def test_runs_an_hour_of_rounds_side_by_side() -> None:
    # Two rounds of two runs, each 5 s and 300 steps of 10 ms.
    found = runs_an_hour(2 * (5 + 3), 0.01, n_rounds=2, pack=2, steps=300, own_steps=700)
    assert found["beside_steps_s"] == pytest.approx(5)
    assert found["runs_per_hour"] == pytest.approx(2 * 3600 / 12)


@pytest.mark.slow
def test_a_failed_launch_is_told(tmp_path) -> None:
    words = ["+experiment=tms_5-2", "cluster=local", "train.batch_size=64", "target.steps=nine"]
    with pytest.raises(RuntimeError, match=r"target\.steps"):
        launch(sweep(words, n_runs=2, steps=2, pack=2), tmp_path)
