"""Everything that a clustering did, in two small files that numpy and json can read.

history.npz   merges (iters, 2) int32: labels of the group that stays and of the one that ends
              popped (iters,) int32: subcomponent that left its group after the merge, or -1
              change (iters,) float64: what the merge alone changed, in bits per sample
              cost (iters + 1,) float64: bits per sample, before and after every iteration
              n_groups (iters + 1,) int32
history.json  subcomponents (`module:index`, in the order of the labels), config, run, ...

At first each subcomponent is a group, labelled by its index. One iteration is

    labels[labels == ends] = stays
    if popped >= 0:
        labels[popped] = ends
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from spd_analysis.clustering.config import ClusteringConfig

ARRAYS = ("merges", "popped", "change", "cost", "n_groups")


@dataclass(frozen=True)
class Source:
    """What was clustered."""

    run: str
    step: int
    n_samples: int
    n_dead: int
    subcomponents: list[str]


@dataclass(frozen=True)
class History:
    merges: Int[np.ndarray, "iters 2"]
    popped: Int[np.ndarray, "iters"]
    change: Float[np.ndarray, "iters"]
    cost: Float[np.ndarray, "iters_plus_1"]
    n_groups: Int[np.ndarray, "iters_plus_1"]

    @property
    def iters(self) -> int:
        return len(self.merges)

    @property
    def best(self) -> int:
        """The iteration after which the cost was lowest."""
        return int(self.cost.argmin())

    def labels(self, n: int, iterations: Int[np.ndarray, "m"]) -> Int[np.ndarray, "m n"]:
        """The group of each of n subcomponents after these iterations, in rising order."""
        labels, rows = np.arange(n, dtype=np.int32), []
        wanted = set(iterations.tolist())
        for iteration in range(self.iters + 1):
            if iteration in wanted:
                rows.append(labels.copy())
            if iteration < self.iters:
                (stays, ends), popped = self.merges[iteration], self.popped[iteration]
                labels[labels == ends] = stays
                if popped >= 0:
                    labels[popped] = ends
        return np.stack(rows)


def members(labels: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "members"]]:
    """The subcomponents of each group, the largest group first, else by their first member."""
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def save(folder: Path, history: History, source: Source, config: ClusteringConfig) -> None:
    """Write both files into a folder that exists."""
    np.savez_compressed(folder / "history.npz", **{name: getattr(history, name) for name in ARRAYS})
    record = {
        **asdict(source),
        "config": config.model_dump(mode="json"),
        "iters": history.iters,
        "best_iteration": history.best,
    }
    (folder / "history.json").write_text(json.dumps(record, indent=1) + "\n")


def load(folder: Path) -> tuple[History, Source, ClusteringConfig]:
    """What `save` wrote.

    Raises:
        ValueError: the folder holds no clustering.
    """
    if not (folder / "history.json").is_file():
        raise ValueError(f"no clustering in {folder}: python -m spd_analysis.clustering RUN")
    record = json.loads((folder / "history.json").read_text())
    with np.load(folder / "history.npz") as arrays:
        history = History(**{name: arrays[name] for name in ARRAYS})
    source = Source(**{name: record[name] for name in Source.__dataclass_fields__})
    return history, source, ClusteringConfig.model_validate(record["config"])
