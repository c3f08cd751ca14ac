import threading

import pytest

from spd_core.run_dir import append_metrics, read_metrics, truncate_metrics, write_atomic


@pytest.fixture
def run_dir(make_run_dir):
    return make_run_dir("run")


def test_readers_see_whole_files_only(run_dir):
    texts = {"a" * 100_000, "b" * 50_000}
    file, seen, done = run_dir.path / "x", set(), threading.Event()
    write_atomic(file, "a" * 100_000)

    def read():
        while not done.is_set():
            seen.add(file.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for text in sorted(texts) * 10:
        write_atomic(file, text)
    done.set()
    reader.join()
    assert seen <= texts and len(list(run_dir.path.iterdir())) == 1


def test_metrics_append_and_truncate(run_dir):
    truncate_metrics(run_dir, 3)
    assert read_metrics(run_dir) == []
    for step in range(5):
        append_metrics(run_dir, {"step": step, "loss/a": step / 3})
    with open(run_dir.metrics_file, "a") as file:
        file.write('{"step": 2, "loss')  # a kill in the middle of a line
    truncate_metrics(run_dir, 2)
    records = read_metrics(run_dir)
    assert max(r["step"] for r in records) == 2
    assert records[1]["loss/a"] == 1 / 3


def test_a_half_written_last_line_does_not_stop_a_reader(run_dir):
    append_metrics(run_dir, {"step": 0, "loss/a": 1.0})
    with open(run_dir.metrics_file, "a") as file:
        file.write('{"step": 1, "loss')
    assert [r["step"] for r in read_metrics(run_dir)] == [0]


def test_targets_are_shared_by_runs(make_run_dir, tmp_path):
    stores = {make_run_dir(name).targets for name in ("a", "b")}
    assert stores == {tmp_path / "targets"}
