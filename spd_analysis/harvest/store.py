"""A harvest on disk: `shards/I_of_N/` as they are collected, `tables/` when they are merged."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spd_analysis.harvest import examples
from spd_analysis.harvest.collect import UNIT, Harvest, total
from spd_analysis.harvest.config import HarvestConfig
from spd_analysis.harvest.counts import Counts
from spd_analysis.harvest.examples import Rows
from spd_analysis.launches import rewritten
from spd_core.run_dir import RunDir

TABLES = ("cofirings", "input_tokens", "output_tokens", "all_inputs", "all_outputs")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `n`; `C` is module -> subcomponents."""

    run: str
    step: int
    index: int
    n: int
    batch_size: int
    C: dict[str, int]
    config: HarvestConfig

    @property
    def batches(self) -> range:
        return range(self.index, self.config.batches, self.n)

    @property
    def name(self) -> str:
        return f"{self.index}_of_{self.n}"

    def record(self) -> dict[str, object]:
        return {**vars(self), "config": self.config.model_dump(mode="json")}


def harvest_folder(run_dir: RunDir, name: str) -> Path:
    return run_dir.path / "harvests" / name


def read_shard(folder: Path) -> Shard:
    record = json.loads((folder / "shard.json").read_text())
    return Shard(**{**record, "config": HarvestConfig.model_validate(record["config"])})


def save_shard(folder: Path, shard: Shard, harvest: Harvest) -> None:
    """Write `shards/I_of_N/` whole: shard.json, and shard.npz with every array."""
    arrays = {"n_positions": np.array(harvest.n_positions)}
    arrays |= {name: getattr(harvest, name) for name in ("firings", "ci_units")}
    arrays |= {f"examples/{name}": column for name, column in harvest.examples.items()}
    for name in TABLES:
        counts: Counts = getattr(harvest, name)
        arrays |= {f"{name}/pairs": counts.pairs, f"{name}/counts": counts.counts}
    # Another task may have written the same meanwhile.
    with rewritten(folder / "shards" / shard.name) as new:
        np.savez_compressed(new / "shard.npz", allow_pickle=False, **arrays)
        (new / "shard.json").write_text(json.dumps(shard.record(), indent=1) + "\n")


def _load_shard(folder: Path) -> Harvest:
    with np.load(folder / "shard.npz") as arrays:
        rows = {k.removeprefix("examples/"): arrays[k] for k in arrays if k.startswith("examples/")}
        tables = (Counts(arrays[f"{name}/pairs"], arrays[f"{name}/counts"]) for name in TABLES)
        n_positions = int(arrays["n_positions"])
        return Harvest(n_positions, arrays["firings"], arrays["ci_units"], rows, *tables)


def find_shards(folder: Path) -> list[Path]:
    """The shards of a harvest, in their order: all that there must be.

    Raises:
        ValueError: shards are missing, or are of different runs, options, or numbers of shards.
    """
    found = [f for f in folder.glob("shards/*") if re.fullmatch(r"\d+_of_\d+", f.name)]
    again = f"python -m spd_analysis.harvest {folder.parent.parent.name} --name {folder.name}"
    if not found:
        raise ValueError(f"no shards in {folder / 'shards'}: {again}")
    shards = {path: read_shard(path) for path in found}
    first = shards[found[0]]
    for path, shard in shards.items():
        if {**vars(shard), "index": 0} != {**vars(first), "index": 0}:
            raise ValueError(
                f"{path} and {found[0]} are of different harvests (run, step, options, or number "
                "of shards): remove those that are not wanted"
            )
    if missing := sorted(set(range(first.n)) - {shard.index for shard in shards.values()}):
        shown = ", ".join(f"{i}/{first.n}" for i in missing)
        raise ValueError(
            f"{folder} lacks {len(missing)} of {first.n} shards, {shown}: "
            f"{again} --shard {missing[0]}/{first.n}"
        )
    return sorted(found, key=lambda path: shards[path].index)


def merge(folder: Path, token_texts: list[str] | None) -> tuple[Path, Shard, Harvest]:
    """Write `tables/` from all shards; `token_texts` are what the token ids stand for.

    Raises:
        ValueError: as `find_shards`.
    """
    paths = find_shards(folder)
    shard = read_shard(paths[0])
    harvest = _load_shard(paths[0])
    for path in paths[1:]:  # one more in memory at a time
        harvest = total([harvest, _load_shard(path)], shard.config.top_k)
    with rewritten(folder / "tables") as new:
        tables = {
            "subcomponents": _subcomponents(harvest, shard.C),
            "examples": _examples(harvest.examples, shard.batch_size),
            "cofirings": pa.table({
                "a": harvest.cofirings.a, "b": harvest.cofirings.b,
                "count": harvest.cofirings.counts,
            }),
        }  # fmt: skip
        if len(harvest.all_inputs.pairs):
            tables["input_tokens"] = _tokens(harvest, harvest.input_tokens, harvest.all_inputs)
        if len(harvest.all_outputs.pairs):
            tables["output_tokens"] = _tokens(harvest, harvest.output_tokens, harvest.all_outputs)
        if token_texts is not None:
            ids = np.arange(len(token_texts), dtype=np.int32)
            tables["tokens"] = pa.table({"token": ids, "text": token_texts})
        for name, table in tables.items():
            pq.write_table(table, new / f"{name}.parquet", compression="zstd")
        record = {
            "run": shard.run, "step": shard.step, "positions": harvest.n_positions,
            "batch_size": shard.batch_size, "shards": shard.n,
            "config": shard.config.model_dump(mode="json"),
        }  # fmt: skip
        (new / "harvest.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder / "tables", shard, harvest


def _subcomponents(harvest: Harvest, C: dict[str, int]) -> pa.Table:
    indices = np.concatenate([np.arange(n, dtype=np.int32) for n in C.values()])
    return pa.table({
        "subcomponent": np.arange(len(indices), dtype=np.int32),
        "module": [module for module, n in C.items() for _ in range(n)],
        "index": indices,
        "firings": harvest.firings,
        "density": harvest.firings / harvest.n_positions,
        "mean_ci": harvest.ci_units * UNIT / harvest.n_positions,
    })  # fmt: skip


def _examples(rows: Rows, batch_size: int) -> pa.Table:
    who = rows["subcomponent"]
    width = rows["importances"].shape[1]
    inside = rows["importances"] >= 0  # the rest of a window is outside of the sequence
    columns = {
        "subcomponent": who.astype(np.int32),
        "rank": (np.arange(len(who)) - np.searchsorted(who, who)).astype(np.int32),
        "importance": examples.importance_of(rows["key"]),
        "batch": rows["example"] // batch_size,
        "row": rows["example"] % batch_size,
        "position": rows["position"],
        "importances": _lists(rows["importances"], inside),
        "center": inside[:, : width // 2].sum(1).astype(np.int32),
    }
    if "tokens" in rows:
        columns["tokens"] = _lists(rows["tokens"], inside)
    else:
        inputs = rows["inputs"].reshape(len(who), -1)
        columns["inputs"] = _lists(inputs, np.ones(inputs.shape, bool))
    return pa.table(columns)


def _lists(values: np.ndarray, inside: np.ndarray) -> pa.Array:
    ends = np.concatenate([[0], inside.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[inside]))


def _tokens(harvest: Harvest, pairs: Counts, everywhere: Counts) -> pa.Table:
    """Counts of (subcomponent, token), and their pointwise mutual information in bits."""
    token_count = everywhere.counts[np.searchsorted(everywhere.a, pairs.b)]
    expected = harvest.firings[pairs.a] * token_count / harvest.n_positions
    return pa.table({
        "subcomponent": pairs.a,
        "token": pairs.b,
        "count": pairs.counts,
        "token_count": token_count,
        "pmi": np.log2(pairs.counts / expected),
    })  # fmt: skip
