"""Statistics of causal importances that are gathered while training."""

from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config.metrics import AliveComponentsConfig, CiL0Config
from spd_core.distributed import Dist, all_min, all_sum
from spd_core.metrics.ci import l0_sums


@dataclass
class AliveComponents:
    """How many positions ago each subcomponent was last important, on this rank's data.

    A subcomponent is alive when that was within the last `n_examples` positions of training, of
    all ranks together.
    """

    config: AliveComponentsConfig
    positions_ago: dict[str, Int[Tensor, "C"]]

    @classmethod
    def start(cls, config: AliveComponentsConfig | None, model: ComponentModel) -> Self | None:
        """Before training nothing was ever important; None where the metric is off."""
        if config is None:
            return None
        return cls(
            config,
            {
                name: torch.full((c.C,), config.n_examples, device=c.V.device)
                for name, c in model.components.items()
            },
        )

    @torch.no_grad()
    def observe(self, ci: dict[str, CausalImportance], dist: Dist) -> None:
        # Of the first module: another may run at fewer positions, as position embeddings do.
        n_positions = next(iter(ci.values())).lower[..., 0].numel()
        for name, module_ci in ci.items():
            important = (module_ci.lower > self.config.threshold).flatten(0, -2)
            ago = self.positions_ago[name] + n_positions * dist.world_size
            self.positions_ago[name] = ago.masked_fill(important.any(0), 0)

    def tensors(self, dist: Dist) -> dict[str, Int[Tensor, "C"]]:
        """The state over all ranks, for a checkpoint."""
        return {f"alive:{n}": all_min(ago, dist) for n, ago in self.positions_ago.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint; one that was written without this metric starts anew."""
        for name, ago in self.positions_ago.items():
            if f"alive:{name}" in tensors:
                ago.copy_(tensors[f"alive:{name}"])

    def n_alive(self, dist: Dist) -> dict[str, float]:
        ago = self.tensors(dist)
        return {
            name.removeprefix("alive:"): float((module_ago < self.config.n_examples).sum())
            for name, module_ago in ago.items()
        }


@dataclass
class CiObserver:
    """Watches the importances of one step's microbatches; `l0` is None where it is not logged."""

    l0: CiL0Config | None
    alive: AliveComponents | None
    dist: Dist
    sums: dict[str, Float[Tensor, "2"]] = field(default_factory=dict)

    def observe(self, ci: dict[str, CausalImportance]) -> None:
        if self.alive is not None:
            self.alive.observe(ci, self.dist)
        if self.l0 is not None:
            for name, part in l0_sums(ci, self.l0).items():
                self.sums[name] = self.sums[name] + part if name in self.sums else part

    def ci_l0(self) -> dict[str, float]:
        """Mean number of active subcomponents per module and group, over all ranks."""
        if not self.sums:
            return {}
        total = all_sum(torch.stack(list(self.sums.values())), self.dist)
        return dict(zip(self.sums, (total[:, 0] / total[:, 1]).tolist(), strict=True))
