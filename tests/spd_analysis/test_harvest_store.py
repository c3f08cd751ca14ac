"""Shards and tables on disk, read as a user would."""

import json
import math
import re
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
from harvest_models import token_config, token_decomposition

from spd_analysis import harvest
from spd_analysis.harvest.collect import collect
from spd_analysis.harvest.config import DEFAULT, load_config
from spd_analysis.harvest.store import Shard, harvest_folder, merge, save_shard
from spd_core.run_dir import RunDir
from spd_launch.config import config_to_yaml

CONFIG = load_config(DEFAULT, ["threshold=0.2", "top_k=3", "window=2", "batches=4"])
C = {"wte": 4, "head": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A harvest in two shards."""
    run_dir = RunDir(tmp_path_factory.mktemp("out") / "runs" / "a_run")
    run_dir.path.mkdir(parents=True)
    run_dir.config_file.write_text(config_to_yaml(token_config()))
    d, place = token_decomposition(), harvest_folder(run_dir, "default")
    for index in (1, 0):
        shard = Shard("a_run", 5, index, 2, 6, C, CONFIG)
        save_shard(place, shard, collect(d, CONFIG, shard.batches, lambda: None))
    merge(place, [f"t{i}" for i in range(11)])
    return place


def read(folder, name):
    return pd.read_parquet(folder / "tables" / f"{name}.parquet")


@pytest.fixture(scope="module")
def whole():
    return collect(token_decomposition(), CONFIG, range(4), lambda: None)


def test_subcomponents(folder, whole):
    table = read(folder, "subcomponents")
    assert table["subcomponent"].tolist() == list(range(9))
    assert table["module"].tolist() == ["wte"] * 4 + ["head"] * 5
    assert table["index"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert table["firings"].tolist() == whole.firings.tolist()
    assert (table["density"] == table["firings"] / whole.n_positions).all()
    assert table["mean_ci"].between(0, 1).all()
    record = json.loads((folder / "tables" / "harvest.json").read_text())
    assert (record["run"], record["step"], record["positions"]) == ("a_run", 5, whole.n_positions)


def test_examples_are_ranked_lists(folder, whole):
    table = read(folder, "examples")
    assert len(table) == len(whole.examples["key"])
    for _, rows in table.groupby("subcomponent"):
        assert rows["rank"].tolist() == list(range(len(rows)))
        assert (rows["importance"].diff().dropna() <= 0).all()
    for _, row in table.iterrows():
        assert row["importances"][row["center"]] == row["importance"]
        assert len(row["tokens"]) == len(row["importances"]) <= 5
        assert row["center"] == min(row["position"], 2) and row["row"] < 6


@pytest.mark.parametrize("name", ["input_tokens", "output_tokens"])
def test_pmi_is_that_of_the_counts(name, folder, whole):
    table = read(folder, name)
    n, firings = whole.n_positions, whole.firings
    assert len(table) == len(getattr(whole, name).pairs)
    totals = table.groupby("token")["token_count"]
    assert (totals.min() == totals.max()).all()
    for row in table.itertuples():
        both, one, other = row[3] / n, firings[row.subcomponent] / n, row.token_count / n
        assert row.pmi == pytest.approx(math.log2(both / (one * other)))


def test_cofirings_and_texts(folder, whole):
    table = read(folder, "cofirings")
    assert (table["a"] < table["b"]).all() and table["count"].sum() == whole.cofirings.counts.sum()
    assert read(folder, "tokens").iloc[7].tolist() == [7, "t7"]


def test_duckdb_joins_the_tables(folder):
    duckdb = pytest.importorskip("duckdb")
    examples, who = (folder / "tables" / f"{n}.parquet" for n in ("examples", "subcomponents"))
    query = f"SELECT count(*) FROM '{examples}' JOIN '{who}' USING (subcomponent)"
    assert duckdb.sql(query).fetchall() == [(len(read(folder, "examples")),)]


def test_columns_are_those_of_the_documentation(folder):
    text = harvest.__doc__
    for file in (folder / "tables").glob("*.parquet"):
        start = re.search(rf"\b{re.escape(file.name)}", text).start()
        section = text[start:].split("\n\n")[0]
        for field in pq.read_schema(file):
            kind = re.sub(r"<\w+: (\w+)>", r"<\1>", str(field.type))
            lines = [x for x in section.split("\n") if re.search(rf"\b{field.name}\b", x)]
            assert any(kind in line for line in lines), field


def test_merging_again_gives_the_same_bytes(folder):
    before = (folder / "tables" / "examples.parquet").read_bytes()
    merge(folder, [f"t{i}" for i in range(11)])
    assert (folder / "tables" / "examples.parquet").read_bytes() == before


def test_missing_and_foreign_shards_are_named(folder, tmp_path):
    other = tmp_path / "runs" / "a_run" / "harvests" / "x"
    with pytest.raises(ValueError, match=r"no shards in .*harvest a_run --name x"):
        merge(other, None)
    shutil.copytree(folder / "shards" / "1_of_2", other / "shards" / "1_of_2")
    with pytest.raises(ValueError, match=r"lacks 1 of 2 shards, 0/2: .* --shard 0/2"):
        merge(other, None)
    shutil.copytree(folder / "shards" / "0_of_2", other / "shards" / "0_of_2")
    record = json.loads((other / "shards" / "0_of_2" / "shard.json").read_text())
    for change in ({"step": 6}, {"n": 3}, {"config": {**record["config"], "top_k": 9}}):
        (other / "shards" / "0_of_2" / "shard.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match="are of different harvests"):
            merge(other, None)
    assert not (other / "tables").exists()
