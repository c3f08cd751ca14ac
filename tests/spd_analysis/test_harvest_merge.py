"""What the token ids of a corpus stand for."""

import pandas as pd
import pytest
from harvest_models import token_config, token_decomposition
from rich.console import Console

from spd_analysis.harvest.collect import collect
from spd_analysis.harvest.config import DEFAULT, load_config
from spd_analysis.harvest.merge import merge_harvest
from spd_analysis.harvest.store import Shard, harvest_folder, save_shard
from spd_launch.compose import compose
from spd_launch.config import config_to_yaml, run_config
from spd_launch.validate import validate

STORIES = (
    "+experiment=ss_gpt2_simple-1L", "data=stories", "size=small", "cluster=local",
    "data.n_documents=60", "data.vocab_size=280", "data.seq_len=16",
)  # fmt: skip


@pytest.mark.parametrize("data", ["induction", "stories"])
def test_text_has_its_tokens_in_words(data, make_run_dir):
    config = token_config()
    if data == "stories":
        config = run_config(validate(compose(list(STORIES), multirun=False)[0].values))
    run_dir, options = make_run_dir("a_run"), load_config(DEFAULT, ["batches=1"])
    run_dir.config_file.write_text(config_to_yaml(config))
    harvest = collect(token_decomposition(), options, [0], lambda: None)
    shard = Shard("a_run", 5, 0, 1, 6, {"wte": 4, "head": 5}, options)
    save_shard(harvest_folder(run_dir, "default"), shard, harvest)
    console = Console(record=True, width=200)
    merge_harvest(run_dir, "default", console)
    shown = console.export_text()
    assert "54 positions" in shown and "next: pandas.read_parquet" in shown
    file = harvest_folder(run_dir, "default") / "tables" / "tokens.parquet"
    assert file.exists() == (data == "stories")
    if data == "stories":
        texts = pd.read_parquet(file)
        assert texts["token"].tolist() == list(range(280))
        assert {" the", "a"} <= set(texts["text"])
