"""Harvest what every subcomponent of a finished run does on its data.

    python -m spd_analysis.harvest RUN [--batches N] [--name NAME] [FIELD=VALUE ...]
    python -m spd_analysis.harvest RUN --shard I/N ...     one part of it, I from 0 to N - 1
    python -m spd_analysis.harvest.merge RUN               when all parts are there

writes `harvests/NAME/` into the run's folder; `tables/` is what to read (docs/harvest.md). Fields
are those of spd_analysis/harvest/config.py, for example top_k=100 threshold=0.1 window=32.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from spd_analysis import command
from spd_analysis.harvest.collect import collect
from spd_analysis.harvest.config import DEFAULT, HarvestConfig, load_config
from spd_analysis.harvest.merge import merge_harvest
from spd_analysis.harvest.store import Shard, harvest_folder, read_shard, save_shard
from spd_analysis.observe import load_decomposition
from spd_core.load import find_run
from spd_core.run_dir import RunDir


def harvest_shard(
    run_dir: RunDir,
    name: str,
    config: HarvestConfig,
    part: tuple[int, int],
    device: Literal["auto", "cpu", "cuda"],
    console: Console,
) -> None:
    """Collect and write part (i, n); one that is there already is left as it is.

    Raises:
        ValueError: the run does not load, or another harvest has the name.
    """
    folder, (index, n) = harvest_folder(run_dir, name), part
    if n > config.batches:
        raise ValueError(f"{n} shards of {config.batches} batches leave some without any")
    for other in folder.glob("shards/*_of_*"):
        if (there := read_shard(other)).config != config or there.n != n:
            raise ValueError(
                f"{other} has other options, or another number of shards: give this harvest "
                "another --name, or remove that one"
            )
        if there.index == index:
            console.print(f"{other} is there already", soft_wrap=True, highlight=False)
            return
    d, step = load_decomposition(run_dir, device)
    C = {module: components.C for module, components in d.model.components.items()}
    size = config.batch_size or d.config.eval.batch_size // d.config.dp
    shard = Shard(run_dir.path.name, step, index, n, size, C, config)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("harvest", total=len(shard.batches))
        harvest = collect(d, config, shard.batches, lambda: progress.advance(bar))
    save_shard(folder, shard, harvest)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: I/N, with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


@command.errors_are_told
def main() -> int:
    parser = command.parser("spd_analysis.harvest", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder or id of a run; or a W&B run")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--batches", metavar="N", help="short for batches=N")
    parser.add_argument("--shard", type=_part, metavar="I/N", help="only this part; then merge")
    parser.add_argument(
        "--name", type=command.name, default="default", help="of the results; default: default"
    )
    parser.add_argument("--config", type=Path, default=DEFAULT, metavar="FILE", help="a YAML file")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    given = parser.parse_intermixed_args()
    overrides = [*given.overrides, *([f"batches={given.batches}"] if given.batches else [])]
    console = Console()
    config, run_dir = load_config(given.config, overrides), find_run(given.run)
    harvest_shard(run_dir, given.name, config, given.shard or (0, 1), given.device, console)
    if given.shard is None:
        merge_harvest(run_dir, given.name, console)
    else:
        console.print(
            f"shard {given.shard[0]} of {given.shard[1]} is in "
            f"{harvest_folder(run_dir, given.name)}\nnext, when all are there: "
            f"python -m spd_analysis.harvest.merge {given.run} --name {given.name}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
