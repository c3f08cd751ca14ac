"""How much the clusterings of an ensemble agree, along the merge and where each is best.

    python -m spd_analysis.clustering.distances RUN [--name NAME] [--n N] [--points N]

reads `clusterings/NAME/seed_*/` of a run's folder and writes `clusterings/NAME/distances/`:

distances.npz    seeds (m,) int32                  the members, whose order is that of all axes m
                 iterations (T,) int32             along the merge, up to the shortest history's end
                 hamming, matching (T, m, m)       distances after as many iterations, in [0, 1]
                 hamming_best, matching_best (m, m) between the members' partitions of least cost
                 labels_best (m, n) int32          those partitions of the common subcomponents
distances.json   subcomponents (`module:index`, n), alive_in (of how many members), run, ...
distances.png

Members see different data, and so find different subcomponents alive. Common are those that are
alive in any; one that is dead in a member is a group of its own there.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from spd_analysis import command
from spd_analysis.clustering.history import History, Source, load, members
from spd_analysis.launches import rewritten
from spd_core.load import find_run
from spd_core.run_dir import RunDir

Labels = Int[np.ndarray, "n"]


def _contingency(a: Labels, b: Labels) -> sparse.csr_array:
    """How many subcomponents each group of `a` shares with each of `b`."""
    rows, columns = (np.unique(labels, return_inverse=True)[1] for labels in (a, b))
    return sparse.coo_array((np.ones(len(a), np.int64), (rows, columns))).tocsr()


def hamming_distance(a: Labels, b: Labels) -> float:
    """The share of subcomponents in another group, where labels are matched one to one at best.

    Groups that share nobody, not even by way of others, are matched apart from each other.
    """
    shared = _contingency(a, b)
    n_rows = shared.sum(axis=1).size
    graph = sparse.block_array([[None, shared], [shared.T, None]])
    part = sparse.csgraph.connected_components(graph, directed=False)[1]
    rows, columns = part[:n_rows], part[n_rows:]
    alone = (np.bincount(rows) == 1) & (np.bincount(columns) == 1)
    kept = shared.sum(axis=1)[alone[rows]].sum()
    for p in np.flatnonzero(~alone):
        block = shared[np.flatnonzero(rows == p)][:, np.flatnonzero(columns == p)].toarray()
        kept += block[linear_sum_assignment(-block)].sum()
    return float(1 - kept / len(a))


def matching_distance(a: Labels, b: Labels) -> float:
    """The share of pairs of subcomponents that are together in only one of the partitions."""
    shared = _contingency(a, b)
    together = [(counts.astype(np.int64) ** 2).sum() for counts in
                (shared.sum(axis=1), shared.sum(axis=0), shared.data)]  # fmt: skip
    n = len(a)
    return float(together[0] + together[1] - 2 * together[2]) / max(n * (n - 1), 1)


@dataclass(frozen=True)
class Ensemble:
    """Clusterings of one run; `places` are their subcomponents among the common ones."""

    seeds: list[int]
    histories: list[History]
    sources: list[Source]
    subcomponents: list[str]
    places: list[Int[np.ndarray, "n_member"]]

    def labels(self, member: int, iterations: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T n"]:
        """Partitions of the common subcomponents after these iterations, in rising order."""
        n, places = len(self.subcomponents), self.places[member]
        labels = np.tile(np.arange(n, dtype=np.int32), (len(iterations), 1))
        labels[:, places] = places[self.histories[member].labels(len(places), iterations)]
        return labels


def load_ensemble(folder: Path, n: int | None) -> Ensemble:
    """Every member in the folder, each once by its seed; with `n`, seeds 0 to n - 1 must be there.

    Raises:
        ValueError: members are missing, alone, or of different runs or configs.
    """
    names = [name for f in folder.glob("seed_*") if (name := re.fullmatch(r"seed_(\d+)", f.name))]
    found = {int(name[1]): load(folder / name[0]) for name in names}
    wanted = range(n or 0)
    run = folder.parent.parent.name
    again = f"python -m spd_launch +pipeline=clustering run={run} name={folder.name} n="
    if missing := [str(seed) for seed in wanted if seed not in found]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {n} members, seed {', '.join(missing)}: {again}{n}"
        )
    if len(found) < 2:
        raise ValueError(
            f"{folder} holds {len(found)} clustering(s): distances need two members, {again}8"
        )
    seeds = sorted(found)
    histories, sources, configs = zip(*(found[seed] for seed in seeds), strict=True)
    for seed, source, config in zip(seeds, sources, configs, strict=True):
        if config.seed != seed:
            raise ValueError(f"{folder}: seed_{seed} is the clustering of seed {config.seed}")
        if config.model_copy(update={"seed": seeds[0]}) != configs[0]:
            raise ValueError(f"{folder}: seed_{seed} has another config than seed_{seeds[0]}")
        if (source.run, source.step) != (sources[0].run, sources[0].step):
            raise ValueError(
                f"{folder}: seed_{seed} is of {source.run} at step {source.step}, "
                f"seed_{seeds[0]} of {sources[0].run} at step {sources[0].step}"
            )
    alive = {name for source in sources for name in source.subcomponents}
    subcomponents = sorted(alive, key=lambda name: (name.rpartition(":")[0], _index(name)))
    place = {name: i for i, name in enumerate(subcomponents)}
    places = [np.array([place[name] for name in source.subcomponents]) for source in sources]
    return Ensemble(seeds, list(histories), list(sources), subcomponents, places)


def _index(name: str) -> int:
    return int(name.rpartition(":")[2])


def pairwise(
    labels: Int[np.ndarray, "m n"], distance: Callable[[Labels, Labels], float]
) -> Float[np.ndarray, "m m"]:
    m = len(labels)
    result = np.zeros((m, m))
    for i in range(m):
        for j in range(i):
            result[i, j] = result[j, i] = distance(labels[i], labels[j])
    return result


def measure(ensemble: Ensemble, n_points: int, console: Console) -> dict[str, np.ndarray]:
    """The arrays of distances.npz."""
    shortest = min(history.iters for history in ensemble.histories)
    iterations = np.unique(np.linspace(0, shortest, n_points).astype(np.int32))
    m = len(ensemble.seeds)
    along = np.stack([ensemble.labels(i, iterations) for i in range(m)], axis=1)
    best = np.concatenate(
        [ensemble.labels(i, np.array([ensemble.histories[i].best])) for i in range(m)]
    )
    arrays = {
        "seeds": np.array(ensemble.seeds, np.int32),
        "iterations": iterations,
        "labels_best": best,
    }
    distances = {"hamming": hamming_distance, "matching": matching_distance}
    for name, distance in distances.items():
        points = track(along, f"{name} distances", console=console, transient=True)
        arrays[name] = np.stack([pairwise(labels, distance) for labels in points])
        arrays[f"{name}_best"] = pairwise(best, distance)
    return arrays


def draw_distances(arrays: dict[str, np.ndarray], title: str, file: Path) -> None:
    """Distances along the merge (mean and extremes over pairs), and at the members' best."""
    from spd_core.metrics import figures  # matplotlib takes long

    plt = figures.plt
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", width_ratios=(1.6, 1))
    figure.suptitle(title)
    seeds, pairs = arrays["seeds"], np.triu_indices(len(arrays["seeds"]), 1)
    words = {
        "hamming": "share of subcomponents in another group",
        "matching": "share of pairs together in one only",
    }
    for (left, right), (name, word) in zip(axes, words.items(), strict=True):
        values = arrays[name][:, *pairs]
        left.fill_between(arrays["iterations"], values.min(1), values.max(1), alpha=0.25)
        left.plot(arrays["iterations"], values.mean(1), color=figures.COLOR)
        left.set(title=f"{name}: {word}", ylim=(0, None), xlabel="iteration")
        left.grid(alpha=0.25)
        matrix = arrays[f"{name}_best"]
        image = right.imshow(matrix, "Blues", vmin=0, vmax=max(matrix.max(), 0.01))
        right.set(title="at each member's lowest cost", xlabel="seed", ylabel="seed")
        for axis in (right.xaxis, right.yaxis):
            axis.set_ticks(range(len(seeds)), [str(seed) for seed in seeds])
        figure.colorbar(image, ax=right)
    figures.save(figure, file)


def write_distances(run_dir: RunDir, name: str, n: int | None, n_points: int) -> Path:
    """Measure the ensemble, write and show what came out.

    Raises:
        ValueError: as `load_ensemble`.
    """
    console = Console()
    folder = run_dir.path / "clusterings" / name
    ensemble = load_ensemble(folder, n)
    arrays = measure(ensemble, n_points, console)
    alive_in = Counter(name for source in ensemble.sources for name in source.subcomponents)
    record = {
        "run": run_dir.path.name,
        "step": ensemble.sources[0].step,
        "name": name,
        "seeds": ensemble.seeds,
        "subcomponents": ensemble.subcomponents,
        "alive_in": [alive_in[each] for each in ensemble.subcomponents],
    }
    place = folder / "distances"
    with rewritten(place) as new:
        np.savez_compressed(new / "distances.npz", allow_pickle=False, **arrays)
        (new / "distances.json").write_text(json.dumps(record, indent=1) + "\n")
        title = f"{run_dir.path.name}: {len(ensemble.seeds)} clusterings of {name}"
        draw_distances(arrays, title, new / "distances.png")
    _print(ensemble, arrays, console)
    return place


def _print(ensemble: Ensemble, arrays: dict[str, np.ndarray], console: Console) -> None:
    pairs = np.triu_indices(len(ensemble.seeds), 1)
    table = Table(box=box.SIMPLE_HEAD, title="between pairs, at the lowest costs")
    for column in ("distance", "mean", "least", "largest"):
        table.add_column(column, justify="right")
    for name in ("hamming", "matching"):
        values = arrays[f"{name}_best"][pairs]
        table.add_row(name, *(f"{v:.4f}" for v in (values.mean(), values.min(), values.max())))
    console.print(table)
    several = [
        {tuple(group) for group in members(labels) if len(group) > 1}
        for labels in arrays["labels_best"]
    ]
    same = set.intersection(*several)
    console.print(
        f"{len(same)} groups of several members are the same in all {len(several)} clusterings, "
        f"which have {min(map(len, several))} to {max(map(len, several))} each"
    )


@command.errors_are_told
def main() -> int:
    parser = command.parser("spd_analysis.clustering.distances", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder or id of a run")
    parser.add_argument("--name", default="ensemble", help="of the ensemble; default: ensemble")
    parser.add_argument("--n", type=int, help="members that must be there: seeds 0 to N - 1")
    parser.add_argument("--points", type=int, default=50, help="along the merge; default: 50")
    given = parser.parse_args()
    folder = write_distances(find_run(given.run), given.name, given.n, given.points)
    print(
        f"wrote {folder}: look at distances.png\n"
        f"next: python -m spd_launch +pipeline=clustering run={given.run} name={given.name} n=N\n"
        "      (more members, up to N; those that are there stay)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
