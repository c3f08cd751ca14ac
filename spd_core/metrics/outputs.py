"""Language models: how much worse the next-token prediction gets under masks."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from spd_core.component_model import ComponentModel, MaskInfo
from spd_core.config.metrics import ModuleSet
from spd_core.data.batches import Batch
from spd_core.losses.distance import distance
from spd_core.masks import stochastic_masks
from spd_core.metrics import Sums, add, matching

RESERVED = ("target", "zero_masked")  # no set of modules is called so: every result holds these


def ce_and_kl_sums(model: ComponentModel, batch: Batch, rounding_threshold: float) -> Sums:
    """CE against the next token and KL from the target, in nats, for six kinds of masks.

    unmasked: all ones; ci: the importances; stochastic: as in training, delta included;
    random: U(0, 1); rounded: importance above the threshold; zero: nothing but biases.
    """
    noise, everywhere = batch.randomness.batch_stream("ce_and_kl:random"), dict.fromkeys(batch.ci)
    masks = {
        "unmasked": _masks(batch, torch.ones_like),
        "ci_masked": _masks(batch, lambda ci: ci),
        "random_masked": _masks(batch, lambda ci: noise.uniform(*ci.shape[1:])),
        "rounded_masked": _masks(batch, lambda ci: (ci > rounding_threshold).float()),
        "zero_masked": _masks(batch, torch.zeros_like),
        "stochastic_masked": stochastic_masks(model, batch, everywhere, "ce_and_kl:stochastic"),
    }
    return _ce_and_kl(model, batch, masks)


def subset_ce_and_kl_sums(
    model: ComponentModel, batch: Batch, subsets: dict[str, ModuleSet]
) -> Sums:
    """The same with stochastic masks on the named sets of modules only, and with zero masks."""
    masks, sums = {"zero_masked": _masks(batch, torch.zeros_like)}, {}
    for sample in range(model.config.n_mask_samples):
        for subset, modules in subsets.items():
            routes = dict.fromkeys(modules_of(modules, list(batch.ci)))
            purpose = f"subset_ce_and_kl:{subset}:{sample}"
            masks[subset] = stochastic_masks(model, batch, routes, purpose)
        add(sums, _ce_and_kl(model, batch, masks))
    return sums


def modules_of(modules: ModuleSet, names: list[str]) -> list[str]:
    """The names that some pattern includes and none excludes."""
    excluded = matching(names, modules.exclude)
    return [name for name in matching(names, modules.include) if name not in excluded]


def _masks(batch: Batch, mask_of: Callable[[Tensor], Tensor]) -> dict[str, MaskInfo]:
    """Masks of all modules from their causal importances, without a delta."""
    return {name: MaskInfo(mask_of(ci.lower), None, None) for name, ci in batch.ci.items()}


def _ce_and_kl(model: ComponentModel, batch: Batch, kinds: dict[str, dict[str, MaskInfo]]) -> Sums:
    """Per kind of mask: kl, ce_difference from the target, and ce_unrecovered.

    ce_unrecovered is the difference as a fraction of what zero masks lose; no number if
    they lose none.
    """
    ce, pairs = {}, {"ce/target": _next_token_ce(batch.target_out, batch.examples)}
    target, n_labels = pairs["ce/target"]
    for kind, masks in kinds.items():
        logits = model.run_masked(batch.examples, masks)
        ce[kind], _ = _next_token_ce(logits, batch.examples)
        kl, count = distance("kl", logits, batch.target_out)
        pairs[f"kl/{kind}"] = torch.stack([kl, torch.full_like(kl, count)])
    lost = ce["zero_masked"] - target
    for kind in kinds:
        pairs[f"ce_difference/{kind}"] = torch.stack([ce[kind] - target, n_labels])
        pairs[f"ce_unrecovered/{kind}"] = torch.stack([ce[kind] - target, lost])
    return pairs


def _next_token_ce(
    logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "2"]:
    """Position t predicts token t + 1; nothing predicts the token of position 0."""
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1).flatten()
    ce = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    # In double, because masks may change little of it.
    return torch.stack([ce, torch.full_like(ce, tokens[:, 1:].numel())]).double()
