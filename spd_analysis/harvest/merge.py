"""Bring the shards of a harvest together into its tables.

    python -m spd_analysis.harvest.merge RUN [--name NAME]

The package's docstring says what is in them. Shards are left where they are; they may be removed.
"""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from spd_analysis import command
from spd_analysis.harvest.store import harvest_folder, merge
from spd_core.config import load_config
from spd_core.data.batches import token_data
from spd_core.data.text import load_tokenizer
from spd_core.load import find_run
from spd_core.run_dir import RunDir
from spd_core.targets.config import TextDataConfig


def merge_harvest(run_dir: RunDir, name: str, console: Console) -> None:
    """Merge, show what is in the tables, and say what to do with them.

    Raises:
        ValueError: as `store.merge`.
    """
    folder = harvest_folder(run_dir, name)
    place, shard, harvest = merge(folder, _token_texts(run_dir))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("module", "subcomponents", "that fired", "firing per position"):
        table.add_column(column, justify="left" if column == "module" else "right")
    first = 0
    for module, C in shard.C.items():
        firings = harvest.firings[first : first + C]
        per_position = f"{firings.sum() / harvest.n_positions:.3g}"
        table.add_row(module, str(C), str((firings > 0).sum()), per_position)
        first += C
    console.print(table)
    console.print(
        f"{harvest.n_positions:,} positions, {len(harvest.examples['key']):,} examples\n"
        f"wrote {place}\n"
        "next: pandas.read_parquet, or in DuckDB\n"
        f"  SELECT * FROM '{place}/examples.parquet' JOIN '{place}/subcomponents.parquet' "
        "USING (subcomponent) LIMIT 10",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _token_texts(run_dir: RunDir) -> list[str] | None:
    data = load_config(run_dir.config_file).data
    if not isinstance(data, TextDataConfig):
        return None
    tokens = token_data(data, run_dir.data)
    tokenizer = load_tokenizer(tokens)
    return [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokens.vocab_size)]


@command.errors_are_told
def main() -> int:
    parser = command.parser("spd_analysis.harvest.merge", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder or id of a run")
    parser.add_argument("--name", default="default", help="of the harvest; default: default")
    given = parser.parse_args()
    merge_harvest(find_run(given.run), given.name, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
