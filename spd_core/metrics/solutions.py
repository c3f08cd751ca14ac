"""Known answers: how far a decomposition is from the solution that we know is right."""

from typing import Literal

import scipy  # scipy.optimize is loaded where it is used: half a second, and few runs need it
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from spd_core.component_model import ComponentModel
from spd_core.components import LinearComponents
from spd_core.config.metrics import DensePattern, IdentityPattern, SolutionPattern

FEATURE_VALUE = 0.75
NEGLIGIBLE = 0.01


@torch.no_grad()
def single_feature_ci(
    model: ComponentModel, n_features: int
) -> dict[str, Float[Tensor, "n_features C"]]:
    """Causal importances (lower) when each feature in turn is alone, at 0.75."""
    device = model.component_parameters()[0].device
    _, inputs = model.run_target(FEATURE_VALUE * torch.eye(n_features, device=device))
    ci, _ = model.causal_importances(inputs, noise=None, checkpointing="off")
    return {name: module_ci.lower for name, module_ci in ci.items()}


def permute_to_identity(ci: Float[Tensor, "n_features C"]) -> Float[Tensor, "n_features C"]:
    """Columns reordered so that the diagonal is as large as it can be; the rest by size."""
    chosen = scipy.optimize.linear_sum_assignment(-ci.cpu().numpy())[1].tolist()
    by_size = ci.sum(0).argsort(descending=True).tolist()
    return ci[:, [*chosen, *(c for c in by_size if c not in chosen)]]


def identity_ci_error(
    ci: Float[Tensor, "n_features C"], pattern: SolutionPattern, tolerance: float
) -> int:
    """Number of wrong entries (identity) or of missing and surplus columns (dense).

    identity(n): after the best column permutation, entries further than `tolerance` from the
    identity. dense(k): distance between k and the number of columns that are ever above it.
    """
    match pattern:
        case IdentityPattern(n=n):
            # With fewer subcomponents than features, the missing ones count as never active.
            permuted = permute_to_identity(F.pad(ci, (0, max(n - ci.shape[1], 0))))
            wanted = torch.eye(*permuted.shape, device=ci.device)
            return int(((permuted - wanted).abs() > tolerance).sum())
        case DensePattern(k=k):
            return abs(int((ci > tolerance).any(0).sum()) - k)


def mmcs_ml2r(
    components: LinearComponents, side: Literal["features_in", "features_out"]
) -> tuple[float, float]:
    """Mean max cosine similarity and mean L2 ratio (SPD paper, table 1).

    For each feature j: the subcomponent c whose contribution U[c] V[j, c] points most along
    W[:, j], and the ratio of its length to that of W[:, j]. With `features_out` the features are
    the rows of W, and V and U change places. A contribution below 1 % of W[:, j] does not compete:
    among many dead subcomponents one points along any direction by chance.
    """
    V, U, W = components.V, components.U, components.weight
    features, other, weight = (V, U, W.T) if side == "features_in" else (U.T, V.T, W)
    contributions: Float[Tensor, "n_features C d"] = torch.einsum("jc,cd->jcd", features, other)
    cosine = torch.cosine_similarity(contributions, weight[:, None, :], dim=-1)
    ratio = contributions.norm(dim=-1) / weight.norm(dim=-1)[:, None]
    best, index = cosine.masked_fill(ratio < NEGLIGIBLE, 0.0).max(dim=1)
    return best.mean().item(), ratio.gather(1, index[:, None]).mean().item()
