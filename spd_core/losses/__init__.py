"""The registry of losses: every configured one, computed once, for training and evaluation."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config import (
    FaithfulnessConfig,
    ImportanceMinimalityConfig,
    LossesConfig,
    ReconConfig,
    SubsetReconConfig,
)
from spd_core.distributed import Dist
from spd_core.losses.distance import LossParts
from spd_core.losses.faithfulness import faithfulness
from spd_core.losses.minimality import importance_minimality
from spd_core.losses.recon import MaskSource, recon
from spd_core.randomness import StepRandomness
from spd_core.schedule import annealed_p

AnyLossConfig = FaithfulnessConfig | ImportanceMinimalityConfig | ReconConfig | SubsetReconConfig


@dataclass(frozen=True)
class Batch:
    """One rank's examples with all that the losses share, computed once."""

    examples: Float[Tensor, "batch ..."]
    target_out: Float[Tensor, "batch ..."]
    ci: dict[str, CausalImportance]
    randomness: StepRandomness


def configured(losses: LossesConfig) -> dict[str, AnyLossConfig]:
    """The losses that are on, by name."""
    by_name = {name: getattr(losses, name) for name in type(losses).model_fields}
    return {name: loss for name, loss in by_name.items() if loss is not None}


def loss_parts(
    name: str,
    config: AnyLossConfig,
    model: ComponentModel,
    batch: Batch,
    step: int,
    steps: int,
    dist: Dist,
) -> LossParts:
    """One loss on this rank as (sum, count); see `distributed` for how ranks add up."""
    match config:
        case FaithfulnessConfig():
            return faithfulness(model.components)
        case ImportanceMinimalityConfig():
            return importance_minimality(
                batch.ci, annealed_p(config, step, steps), config.beta, dist
            )
        case SubsetReconConfig():
            routing = config.routing
        case ReconConfig():
            routing = "layerwise" if name.endswith("_layerwise") else "all"
    return recon(
        model,
        batch.examples,
        batch.target_out,
        batch.ci,
        _mask_source(name),
        routing,
        batch.randomness,
        name,
    )


def _mask_source(name: str) -> MaskSource:
    prefix = name.split("_recon")[0]
    match prefix:
        case "unmasked":
            return "unmasked"
        case "ci_masked":
            return "ci"
        case "stochastic":
            return "stochastic"
        case _:
            raise AssertionError(name)
