"""Histories come back as they were, and are read with numpy and json alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
from clustering_oracle import as_partition, binary, random_active

from spd_analysis.clustering.config import DEFAULT, load_config
from spd_analysis.clustering.history import Source, load, members, save
from spd_analysis.clustering.merge import cluster

N = 15


@pytest.fixture
def saved(tmp_path):
    config = load_config(DEFAULT, ["pop_component_prob=0.4", "iters=40"])
    history = cluster(binary(random_active(100, N, seed=0)), config, lambda _: None)
    source = Source("a_run", 7, 100, 3, [f"m:{i}" for i in range(N)])
    save(tmp_path, history, source, config)
    return tmp_path, history, source, config


def test_what_was_saved_is_loaded(saved):
    folder, history, source, config = saved
    again, its_source, its_config = load(folder)
    assert (its_source, its_config) == (source, config)
    assert (again.merges == history.merges).all() and (again.cost == history.cost).all()
    assert (again.popped >= 0).any()


def test_labels_at_chosen_iterations_are_those_of_the_way_there(saved):
    _, history, _, _ = saved
    labels, wanted = np.arange(N), [np.arange(N)]
    for (stays, ends), popped in zip(history.merges, history.popped, strict=True):
        labels = np.where(labels == ends, stays, labels)
        if popped >= 0:
            labels[popped] = ends
        wanted.append(labels)
    some = np.array([0, 3, history.best, history.iters])
    assert (history.labels(N, some) == np.array(wanted)[np.sort(some)]).all()


def test_groups_are_listed_largest_first():
    labels = np.array([4, 1, 4, 0, 1, 4])
    assert [g.tolist() for g in members(labels)] == [[0, 2, 5], [1, 4], [3]]
    assert sorted(g.tolist() for g in members(labels)) == sorted(as_partition(labels))


def test_the_documented_snippet_reads_it_without_this_package(saved):
    folder, history, _, _ = saved
    code = """
import json, sys
import numpy as np
record, arrays = json.load(open("history.json")), np.load("history.npz")
labels = np.arange(len(record["subcomponents"]))
for (stays, ends), popped in zip(arrays["merges"], arrays["popped"]):
    labels[labels == ends] = stays
    if popped >= 0:
        labels[popped] = ends
assert not any(name.startswith(("spd_", "torch")) for name in sys.modules)
dtypes = [str(arrays[name].dtype) for name in ("merges", "popped", "n_groups")]
print(json.dumps([labels.tolist(), dtypes, record["best_iteration"]]))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    labels, dtypes, best = json.loads(out.stdout)
    (last,) = history.labels(N, np.array([history.iters]))
    assert labels == last.tolist() and best == history.best
    assert dtypes == ["int32", "int32", "int32"]


def test_a_folder_without_a_clustering_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no clustering in"):
        load(tmp_path)
