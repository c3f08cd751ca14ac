"""Language models: how much worse the next-token prediction gets under masks."""

from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from spd_core.component_model import ComponentModel, MaskInfo
from spd_core.config.metrics import ModuleSet
from spd_core.data.batches import Batch
from spd_core.losses.distance import distance
from spd_core.losses.recon import draw_masks
from spd_core.routing import route_all

Pairs = dict[str, Float[Tensor, "2"]]
"""Values as (sum, count), by name."""

RESERVED = ("target", "zero_masked")
"""What no set of modules may be called, because every result holds these."""


@torch.no_grad()
def ce_and_kl_sums(model: ComponentModel, batch: Batch, rounding_threshold: float) -> Pairs:
    """CE against the next token and KL from the target, in nats, for six kinds of masks.

    unmasked: all ones; ci: the importances; stochastic: as in training, delta included;
    random: U(0, 1); rounded: importance above the threshold; zero: nothing but biases.
    """
    noise = batch.randomness.batch_stream("ce_and_kl:random")
    lower = {name: ci.lower for name, ci in batch.ci.items()}
    masks = {
        "unmasked": {n: torch.ones_like(ci) for n, ci in lower.items()},
        "ci_masked": lower,
        "random_masked": {n: noise.uniform(*ci.shape[1:]) for n, ci in lower.items()},
        "rounded_masked": {n: (ci > rounding_threshold).float() for n, ci in lower.items()},
        "zero_masked": {n: torch.zeros_like(ci) for n, ci in lower.items()},
    }
    infos = {kind: {n: MaskInfo(m, None, None) for n, m in v.items()} for kind, v in masks.items()}
    infos["stochastic_masked"] = draw_masks(
        model, batch, route_all(list(lower)), "ce_and_kl:stochastic"
    )
    return _pairs(model, batch, infos)


@torch.no_grad()
def subset_ce_and_kl_sums(
    model: ComponentModel, batch: Batch, subsets: dict[str, ModuleSet]
) -> Pairs:
    """The same with stochastic masks on the named sets of modules only, and with zero masks."""
    infos = {
        "zero_masked": {
            n: MaskInfo(torch.zeros_like(ci.lower), None, None) for n, ci in batch.ci.items()
        }
    }
    pairs = {}
    for sample in range(model.config.n_mask_samples):
        for subset, modules in subsets.items():
            routes = route_all(modules_of(modules, list(batch.ci)))
            infos[subset] = draw_masks(model, batch, routes, f"subset_ce_and_kl:{subset}:{sample}")
        for name, pair in _pairs(model, batch, infos).items():
            pairs[name] = pairs[name] + pair if name in pairs else pair
    return pairs


def modules_of(modules: ModuleSet, names: list[str]) -> list[str]:
    """The names that some pattern includes and none excludes."""

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [n for n in names if matches(n, modules.include) and not matches(n, modules.exclude)]


def ce_and_kl_values(sums: Pairs) -> dict[str, float]:
    """Per kind of mask: kl, ce_difference from the target, and ce_unrecovered.

    ce_unrecovered is the difference as a fraction of what zero masks lose; NaN if they lose none.
    """
    mean = {name: (pair[0] / pair[1]).item() for name, pair in sums.items()}
    lost = mean["ce/zero_masked"] - mean["ce/target"]
    values = {"ce/target": mean["ce/target"]}
    for name in mean:
        measure, kind = name.split("/", 1)
        if measure == "kl":
            difference = mean[f"ce/{kind}"] - mean["ce/target"]
            values[f"kl/{kind}"] = mean[name]
            values[f"ce_difference/{kind}"] = difference
            values[f"ce_unrecovered/{kind}"] = difference / lost if lost else float("nan")
    return values


def _pairs(model: ComponentModel, batch: Batch, infos: dict[str, dict[str, MaskInfo]]) -> Pairs:
    pairs = {"ce/target": _next_token_ce(batch.target_out, batch.examples)}
    for kind, masks in infos.items():
        logits = model.run_masked(batch.examples, masks)
        pairs[f"ce/{kind}"] = _next_token_ce(logits, batch.examples)
        kl, count = distance("kl", logits, batch.target_out)
        pairs[f"kl/{kind}"] = torch.stack([kl, torch.full_like(kl, count)])
    return pairs


def _next_token_ce(
    logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "2"]:
    """Position t predicts token t + 1; nothing predicts the token of position 0."""
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    ce = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return torch.stack([ce, torch.full_like(ce, int((labels != -100).sum()))])
