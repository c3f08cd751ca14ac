"""One shard: a pass over its batches, added up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from scipy import sparse
from torch import Tensor

from spd_analysis.harvest import counts, examples
from spd_analysis.harvest.config import HarvestConfig
from spd_analysis.harvest.counts import Counts
from spd_analysis.harvest.examples import Rows
from spd_analysis.observe import Observed, observe
from spd_core.data.batches import Decomposition

# Importances are added up as integers of this unit: sums of floats depend on their order.
UNIT = 2.0**-32


@dataclass(frozen=True)
class Harvest:
    """Sums over batches, and the best examples; `total` adds them up. C is over all modules.

    The tables of tokens pair subcomponent and token, or (token, 0) for all positions. They are
    empty where examples are no tokens.
    """

    n_positions: int
    firings: Int[np.ndarray, "C"]
    ci_units: Int[np.ndarray, "C"]
    examples: Rows
    cofirings: Counts
    input_tokens: Counts
    output_tokens: Counts
    all_inputs: Counts
    all_outputs: Counts


def total(parts: list[Harvest], top_k: int) -> Harvest:
    """The same, in whatever order the parts come."""
    tables = ("cofirings", "input_tokens", "output_tokens", "all_inputs", "all_outputs")
    return Harvest(
        sum(part.n_positions for part in parts),
        np.sum([part.firings for part in parts], axis=0),
        np.sum([part.ci_units for part in parts], axis=0),
        examples.best([part.examples for part in parts], top_k),
        *(counts.total([getattr(part, table) for part in parts]) for table in tables),
    )


def collect(
    d: Decomposition, config: HarvestConfig, batches: Iterable[int], done: Callable[[], None]
) -> Harvest:
    """Harvest these batches; `done` is called after each.

    Raises:
        ValueError: there are too many positions to number.
    """
    size = config.batch_size or d.config.eval.batch_size // d.config.dp
    so_far, recent = None, []
    for batch in batches:
        seen = observe(d, config.seed, batch, size, "harvest")
        to_beat = _to_beat(so_far, config.top_k, sum(ci.shape[1] for ci in seen.ci.values()))
        recent.append(_of_one_batch(seen, batch * size, config, to_beat))
        # Together when as much is new as is old: each row is moved a few times only.
        old = [] if so_far is None else [so_far]
        if so_far is None or sum(map(_size, recent)) > _size(so_far):
            so_far, recent = total([*old, *recent], config.top_k), []
        done()
    assert so_far is not None, "a shard without a batch"
    return total([so_far, *recent], config.top_k)


def _size(part: Harvest) -> int:
    return len(part.examples["key"]) + len(part.cofirings.pairs) + len(part.input_tokens.pairs)


def _to_beat(so_far: Harvest | None, top_k: int, C: int) -> Int[np.ndarray, "C"]:
    """The least key among a subcomponent's examples, where it has enough of them; else -1."""
    least = np.full(C, -1)
    if so_far is not None:
        who = so_far.examples["subcomponent"]
        last = np.flatnonzero(np.diff(who, append=C))
        full = last[np.bincount(who, minlength=C)[who[last]] == top_k]
        least[who[full]] = so_far.examples["key"][full]
    return least


def _of_one_batch(
    seen: Observed, first_example: int, config: HarvestConfig, to_beat: Int[np.ndarray, "C"]
) -> Harvest:
    n_positions, seq = seen.positions.numel(), seen.positions[1:].numel()
    if (first_example + len(seen.examples)) * seq >= 2**examples.BITS:
        raise ValueError(f"too many positions: at most 2^{examples.BITS}, in fewer batches")
    of_tokens = not seen.examples.is_floating_point()
    firings, ci_units, best, fired = [], [], [], []
    first = 0
    for ci in seen.ci.values():
        C = ci.shape[1]
        firing = ci > config.threshold
        firings.append(firing.sum(0))
        ci_units.append((ci.double() / UNIT).round().long().sum(0))
        fired.append(firing.cpu().numpy())
        least = torch.from_numpy(to_beat[first : first + C]).to(ci.device)
        who, samples, keys = examples.candidates(
            ci, first_example * seq, config.threshold, config.top_k, least
        )
        rows, positions = samples // seq, samples % seq
        best.append({
            "subcomponent": first + who,
            "key": keys,
            "example": first_example + rows,
            "position": positions,
            "importances": examples.windows(
                ci.view(-1, seq, C).transpose(1, 2).flatten(0, 1), rows * C + who, positions,
                config.window,
            ),
            **(
                {"tokens": examples.windows(seen.examples, rows, positions, config.window).int()}
                if of_tokens
                else {"inputs": seen.examples[rows]}
            ),
        })  # fmt: skip
        first += C
    columns = {name: torch.cat([part[name] for part in best]).cpu().numpy() for name in best[0]}
    active = sparse.csr_array(np.concatenate(fired, axis=1))
    return Harvest(
        n_positions,
        torch.cat(firings).cpu().numpy(),
        torch.cat(ci_units).cpu().numpy(),
        columns,
        _pairs(active),
        *(_token_counts(seen, active) if of_tokens else [NOTHING] * 4),
    )


NOTHING = Counts(np.zeros(0, np.int64), np.zeros(0, np.int64))


def _pairs(active: sparse.csr_array) -> Counts:
    """How often two fire at one position."""
    ones = active.astype(np.int32)
    both = sparse.triu(ones.T @ ones, k=1).tocoo()
    return counts.count(both.row, both.col, both.data)


def _token_counts(seen: Observed, active: sparse.csr_array) -> list[Counts]:
    """Of the tokens at each position, and of those predicted there where the target does so."""
    samples, who = active.nonzero()

    def tables(tokens: Int[Tensor, "batch seq"]) -> tuple[Counts, Counts]:
        flat = tokens.flatten().cpu().numpy()
        everywhere = counts.count(flat, np.zeros(len(flat), np.int64), None)
        return counts.count(who, flat[samples], None), everywhere

    inputs, outputs = tables(seen.examples), (NOTHING, NOTHING)
    if seen.target_out.shape[:-1] == seen.examples.shape:
        outputs = tables(seen.target_out.argmax(-1))
    return [inputs[0], outputs[0], inputs[1], outputs[1]]
