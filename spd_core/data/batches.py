"""From a config to the batches of a step, with all that the losses share."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.data.induction import induction_sequences
from spd_core.data.sparse import sparse_features
from spd_core.data.text import TokenData, load_or_tokenise, token_batch
from spd_core.distributed import Dist
from spd_core.randomness import StepRandomness
from spd_core.rows import ROUND
from spd_core.targets.config import (
    CustomTargetConfig,
    InductionDataConfig,
    ResidMLPTargetConfig,
    SparseFeatureDataConfig,
    TextDataConfig,
    TMSTargetConfig,
)


@dataclass(frozen=True)
class Decomposition:
    """What a step or an evaluation works on: this rank's model, and where the rank stands.

    `data` is the folder of tokenised corpora; only text is read from there.
    """

    config: RunConfig
    model: ComponentModel
    dist: Dist
    data: Path

    def autocast(self) -> torch.autocast:
        """The precision of forward passes: bf16 where it is safe, or float32 throughout."""
        enabled = self.config.train.autocast == "bf16"
        return torch.autocast(self.dist.device.type, dtype=torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Batch:
    """The examples of one rank, or of one of its microbatches.

    `own_acts` are x V on the target's own inputs, of some modules. `distinct_ci` are causal
    importances, and `place` says which are an example's; None = those at its own place. `active`
    holds the examples at which some decomposed module has an input other than zero; None = all. At
    the others every masked module gives exactly what the target's own gives, so that they add
    nothing to a reconstruction loss, nor to its gradient.
    """

    examples: Float[Tensor, "batch ..."]
    target_out: Float[Tensor, "batch ..."]
    inputs: dict[str, Float[Tensor, "batch ... d_in"]]
    distinct_ci: dict[str, CausalImportance]
    randomness: StepRandomness
    own_acts: dict[str, Float[Tensor, "batch ... C"]]
    place: Int[Tensor, "batch"] | None = None
    active: "Batch | None" = None

    @cached_property
    def ci(self) -> dict[str, CausalImportance]:
        """Causal importances of every example."""
        if self.place is None:
            return self.distinct_ci
        # Kept for every loss, also where a search without gradients asks first.
        with torch.enable_grad():
            return {name: _at(self.place, ci) for name, ci in self.distinct_ci.items()}

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of one example's positions: () or (seq,)."""
        return tuple(next(iter(self.distinct_ci.values())).lower.shape[1:-1])

    @property
    def n_positions(self) -> int:
        return len(self.examples) * math.prod(self.positions)


Batches = Callable[[], Iterable[Batch]]
"""All parts of a rank's batch, the same ones at every call."""

FeatureTarget = TMSTargetConfig | ResidMLPTargetConfig | CustomTargetConfig


def draw_examples(
    config: RunConfig, data: Path, randomness: StepRandomness, purpose: str
) -> Float[Tensor, "batch ..."]:
    match config.data:
        case SparseFeatureDataConfig():
            stream = randomness.batch_stream(f"{purpose}:data")
            return sparse_features(config.data, n_features(config), stream)
        case InductionDataConfig():
            stream = randomness.batch_stream(f"{purpose}:data")
            return induction_sequences(config.data, stream)[:, :-1]
        case TextDataConfig():
            split = "eval" if randomness.phase == "eval" else "train"
            return token_batch(token_data(config.data, data), split, randomness)


def token_data(config: TextDataConfig, store: Path) -> TokenData:
    """The tokenised corpus, opened once per process."""
    return _token_data(config.model_dump_json(), store)


@cache
def _token_data(config_json: str, store: Path) -> TokenData:
    return load_or_tokenise(TextDataConfig.model_validate_json(config_json), store, Console())


def n_features(config: RunConfig) -> int:
    """Size of the target's input, where that is a vector of features.

    Raises:
        ValueError: it is not, or nobody says how many there are.
    """
    target = config.target
    if isinstance(target, FeatureTarget) and target.n_features is not None:
        return target.n_features
    raise ValueError(f"target.kind={target.kind} has no features (target.n_features)")


def make_batch(
    d: Decomposition,
    randomness: StepRandomness,
    purpose: str,
    examples: Float[Tensor, "batch ..."] | None = None,
) -> Batch:
    """Examples, if not given, the target's output and causal importances of one part of a step."""
    config, model, checkpointing = d.config, d.model, d.config.train.activation_checkpointing
    if examples is None:
        examples = draw_examples(config, d.data, randomness, purpose)
    target_out, inputs = model.run_target(examples)
    silent = torch.arange(0)
    if not randomness.has_fixed_shapes:
        silent = _silent_examples(config, inputs, len(examples))
    # Some count as active, so that a few numbers of rows come again and again (see Rows).
    silent = silent[(len(silent) - len(examples)) % ROUND :]
    if len(silent) < 2:
        noise = randomness.batch_stream(f"{purpose}:binomial")
        ci, own_acts = model.causal_importances(inputs, noise, checkpointing)
        return Batch(examples, target_out, inputs, ci, randomness, own_acts)
    # Causal importances once for all silent examples, in row 0.
    place = torch.ones(len(examples), dtype=torch.long).index_fill_(0, silent, 0)
    rows = place.nonzero()[:, 0]
    place[rows] = torch.arange(1, len(rows) + 1)
    kept = torch.cat([silent[:1], rows])
    few = {name: x.index_select(0, kept) for name, x in inputs.items()}
    ci, own_acts = model.causal_importances(few, None, checkpointing)
    active = Batch(
        examples.index_select(0, rows),
        target_out.index_select(0, rows),
        {name: x[1:] for name, x in few.items()},
        {name: _at(slice(1, None), importance) for name, importance in ci.items()},
        replace(randomness, rows=rows),
        {name: acts[1:] for name, acts in own_acts.items()},
    )
    active = active if len(rows) else None
    return Batch(examples, target_out, inputs, ci, randomness, {}, place, active)


def _at(rows: Int[Tensor, "n"] | slice, ci: CausalImportance) -> CausalImportance:
    """Those of some examples, or of the same one several times."""
    return CausalImportance(ci.lower[rows], ci.pre_sigmoid[rows], ci.sigmoid)


def _silent_examples(
    config: RunConfig, inputs: dict[str, Float[Tensor, "batch ... d_in"]], n: int
) -> Int[Tensor, "n_silent"]:
    """Examples at which the input of every decomposed module is zero: most of sparse toy data.

    None where that cannot be told (tokens), or where their importances may differ.
    """
    silent = torch.arange(n)
    if config.decompose.sampling == "binomial" or config.decompose.ci_fn.kind == "custom":
        return silent[:0]
    for x in inputs.values():
        if not x.is_floating_point() or len(x) != n:
            return silent[:0]
        silent = silent[~x.index_select(0, silent).flatten(1).any(1)]
    return silent


def training_batches(
    d: Decomposition,
    draw: int,
    counter: Int[Tensor, ""] | None = None,
    examples: Float[Tensor, "batch ..."] | None = None,
) -> tuple[Batches, int]:
    """This rank's microbatches of a step and their number.

    At every call they are made again, but for those with gradients that somebody still holds.
    `draw` is the number that they are drawn by; `counter`, that on the device. Examples may be
    given.
    """
    seed, train, dist = d.config.seed, d.config.train, d.dist
    per_rank = train.batch_size // dist.world_size
    n_micro = per_rank // (train.microbatch_size or per_rank)
    n_parts = n_micro * dist.world_size
    parts = [
        StepRandomness(seed, draw, part, n_parts, train.batch_size, dist.device, counter=counter)
        for part in range(dist.rank * n_micro, (dist.rank + 1) * n_micro)
    ]
    given = [None] * n_micro if examples is None else examples.split(per_rank // n_micro)
    alive = WeakValueDictionary[int, Batch]()

    def one(i: int) -> Batch:
        batch = alive.get(i) or make_batch(d, parts[i], "train", given[i])
        if torch.is_grad_enabled():
            alive[i] = batch
        return batch

    return lambda: (one(i) for i in range(n_micro)), n_micro


def evaluation_batch(d: Decomposition, i: int, purpose: str) -> Batch:
    """Batch i of an evaluation; each evaluation sees the same ones, so that values compare."""
    rank, n_ranks, device = d.dist.rank, d.dist.world_size, d.dist.device
    seed, size = d.config.seed, d.config.eval.batch_size
    randomness = StepRandomness(seed, i, rank, n_ranks, size, device, phase="eval")
    return make_batch(d, randomness, purpose)
