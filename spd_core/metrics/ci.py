"""Causal importances: what of them adds up over positions, and which subcomponents are alive."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config.metrics import AliveComponentsConfig, CiL0Config
from spd_core.distributed import Dist, all_min
from spd_core.metrics import matching, over_ranks

N_BINS = 50
RANGES = {"lower": (0.0, 1.0), "upper": (0.0, 1.1), "pre_sigmoid": (-3.0, 3.0)}


def l0_sums(ci: dict[str, CausalImportance], config: CiL0Config) -> dict[str, Float[Tensor, "2"]]:
    """(active subcomponents, positions) of every module and group; the key has the threshold."""
    n_positions = _n_positions(ci)
    active = {}
    for name, module_ci in ci.items():
        above = (module_ci.lower > config.threshold).flatten(0, -2)
        active[name] = above.sum() * (n_positions / len(above))
    for group, patterns in config.groups.items():
        active[group] = torch.stack([active[n] for n in matching(list(ci), patterns)]).sum()
    return {
        f"ci_l0_{config.threshold}/{name}": torch.stack([n, torch.full_like(n, n_positions)])
        for name, n in active.items()
    }


def component_sums(
    ci: dict[str, CausalImportance], threshold: float | None
) -> dict[str, Float[Tensor, "C_plus_1"]]:
    """Per module, of every subcomponent the sum of lower (or, with a threshold, how often it was
    above), then the number of positions."""
    sums = {}
    for name, module_ci in ci.items():
        lower = module_ci.lower.flatten(0, -2)
        values = lower if threshold is None else (lower > threshold).float()
        sums[name] = torch.cat([values.sum(0), lower.new_tensor([float(len(lower))])])
    return sums


def histogram_sums(ci: dict[str, CausalImportance]) -> dict[str, Float[Tensor, "3 n_bins"]]:
    """Per module, counts of lower, upper and pre-sigmoid values.

    Values outside a histogram's range fall into its outermost bins.
    """

    def histogram(values: Tensor, low: float, high: float) -> Float[Tensor, "n_bins"]:
        # histc counts in float32, which stops at 2**24: in parts, added up in double.
        parts = [part.clamp(low, high) for part in values.flatten().split(2**24)]
        return torch.stack([part.histc(N_BINS, low, high).double() for part in parts]).sum(0)

    return {
        name: torch.stack([histogram(getattr(c, kind), *ends) for kind, ends in RANGES.items()])
        for name, c in ci.items()
    }


@dataclass
class AliveComponents:
    """How many positions ago each subcomponent was last important, on this rank's data.

    A subcomponent is alive when that was within the last `n_examples` positions of training, of
    all ranks together.
    """

    config: AliveComponentsConfig
    positions_ago: dict[str, Int[Tensor, "C"]]

    @classmethod
    def start(cls, config: AliveComponentsConfig, model: ComponentModel) -> Self:
        """Before training nothing was ever important."""
        never = {n: torch.full((c.C,), config.n_examples) for n, c in model.components.items()}
        return cls(config, {n: ago.to(model.components[n].V.device) for n, ago in never.items()})

    def observe(self, ci: dict[str, CausalImportance], dist: Dist) -> None:
        n_positions = _n_positions(ci) * dist.world_size
        for name, module_ci in ci.items():
            important = (module_ci.lower > self.config.threshold).flatten(0, -2).any(0)
            ago = self.positions_ago[name] + n_positions
            self.positions_ago[name] = ago.masked_fill(important, 0)

    def tensors(self, dist: Dist) -> dict[str, Int[Tensor, "C"]]:
        """The state over all ranks, for a checkpoint."""
        state = {f"alive:{name}": ago for name, ago in self.positions_ago.items()}
        return over_ranks(all_min, state, dist)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint; one that was written without this metric starts anew."""
        for name, ago in self.positions_ago.items():
            if f"alive:{name}" in tensors:
                ago.copy_(tensors[f"alive:{name}"])

    def n_alive(self, dist: Dist) -> dict[str, float]:
        ago = over_ranks(all_min, self.positions_ago, dist)
        return {n: float((a < self.config.n_examples).sum()) for n, a in ago.items()}


def _n_positions(ci: dict[str, CausalImportance]) -> int:
    """Of the first module: another may run at fewer positions, as position embeddings do."""
    return next(iter(ci.values())).lower[..., 0].numel()
