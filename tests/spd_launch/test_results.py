import csv
from pathlib import Path

import pytest
from launches import add_metrics, launched

from spd_launch.errors import LaunchError
from spd_launch.ledger import read_task_rows
from spd_launch.results import best, main, read_results


def names(launch) -> list[str]:
    return [row.name for row in read_task_rows(launch)]


def test_what_varies_and_the_last_metrics(tmp_path: Path) -> None:
    launch = launched(tmp_path, "finished", "failed")
    for name, loss in zip(names(launch), (0.5, 0.25), strict=True):
        add_metrics(launch, name, step=2, loss__total=9.0, eval__ci_l0=3.0)
        add_metrics(launch, name, step=4, loss__total=loss)
    one, two = read_results([(launch, None)])
    assert one == {
        "run": names(launch)[0], "seed": 0, "state": "finished", "step": 4, "loss/total": 0.5,
        "eval/ci_l0": 3.0,
    }  # fmt: skip
    assert (two["seed"], two["state"], two["loss/total"]) == (1, "failed", 0.25)
    assert read_results([(launch, names(launch)[1])]) == [
        {key: value for key, value in two.items() if key != "seed"}
    ]


def test_several_launches_show_what_varies_between_any_of_them(tmp_path: Path) -> None:
    first = launched(tmp_path, "finished", "finished")
    second = launched(tmp_path, "finished", train__steps=8, done=names(first)[1:])
    results = {r["run"]: r for r in read_results([(first, None), (second, None)])}
    assert len(results) == 3
    assert [(r["seed"], r["train.steps"]) for r in results.values()] == [(0, 4), (1, 4), (0, 8)]
    # Runs that had finished before are results of the later launch too.
    alone = read_results([(second, None)])
    assert [(r["seed"], r["train.steps"]) for r in alone] == [(0, 8), (1, 4)]


def test_best_runs_and_those_without_the_metric_last() -> None:
    results = [{"run": "a", "m": 2.0}, {"run": "b"}, {"run": "c", "m": float("nan")},
               {"run": "d", "m": 1.0}]  # fmt: skip
    assert [r["run"] for r in best(results, "m", "lowest")] == ["d", "a", "b", "c"]
    assert [r["run"] for r in best(results, "m", "highest")] == ["a", "d", "b", "c"]
    with pytest.raises(LaunchError, match="no run has a metric 'n'; valid: m"):
        best(results, "n", "lowest")


def test_tables_for_people_and_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    launch = launched(tmp_path / "o", "finished", "finished", "pending")
    for name, loss in zip(names(launch), (0.5, 0.25), strict=False):
        add_metrics(launch, name, step=4, eval__loss__total=loss, other=1.0)
    command = ["results", "latest", f"--out-dir={tmp_path / 'o'}", "--lowest", "eval/loss/total"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    header, first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "seed", "state", "loss/total"]
    assert first.split() == [names(launch)[1], "1", "finished", "0.25"]
    assert second.split() == [names(launch)[0], "0", "finished", "0.5"]
    assert third.split() == [names(launch)[2], "2", "pending"]
    files = [f"--csv={tmp_path / 'r.csv'}", f"--parquet={tmp_path / 'r.parquet'}"]
    monkeypatch.setattr("sys.argv", [*command, "--top=2", *files])
    assert main() == 0
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["seed"], row["eval/loss/total"], row["other"]) for row in rows] == [
        ("1", "0.25", "1.0"),
        ("0", "0.5", "1.0"),
    ]
    table = pq.read_table(tmp_path / "r.parquet").to_pydict()
    assert table["eval/loss/total"] == [0.25, 0.5] and table["seed"] == [1, 0]
