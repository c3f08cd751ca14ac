"""Evaluation: batches to metrics and figures. Runs under no_grad and leaves training untouched."""

import time
from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.config.base import CustomConfig
from spd_core.config.losses import AnyLossConfig
from spd_core.config.metrics import (
    CeAndKlConfig,
    CiL0Config,
    CustomMetricConfig,
    DensityConfig,
    IdentityCiErrorConfig,
    MetricConfig,
    MmcsMl2rConfig,
    PGDMultibatchConfig,
    PlainMetricConfig,
    SubsetCeAndKlConfig,
)
from spd_core.data.batches import autocast, draw_examples, make_batch, n_features
from spd_core.distributed import Dist, all_sum, synchronise
from spd_core.losses import loss_parts, prepare_step
from spd_core.losses.batch import Batch
from spd_core.losses.distance import LossParts
from spd_core.losses.pgd import pgd_recon, shared_sources
from spd_core.metrics import ci, outputs
from spd_core.metrics.solutions import identity_ci_error, mmcs_ml2r, single_feature_ci
from spd_core.metrics.training import AliveComponents
from spd_core.parts import load_part
from spd_core.randomness import StepRandomness

Sums = dict[str, Tensor]
"""What a metric adds up over batches and ranks, by key."""


def due_metrics(config: RunConfig, step: int) -> dict[str, MetricConfig]:
    """The metrics whose turn it is after `step` steps; at the last one, all of them."""

    def due(metric: MetricConfig) -> bool:
        match metric.when:
            case "fast":
                period = config.eval.every
            case "slow":
                period = config.eval.slow_every
            case int(n):
                period = n
        return step % period == 0 or step == config.train.steps

    return {name: m for name, m in config.eval.metrics.configured().items() if due(m)}


# no_grad and not inference_mode: an adversarial loss needs gradients inside evaluation.
@torch.no_grad()
def evaluate(
    config: RunConfig,
    model: ComponentModel,
    step: int,
    metrics: dict[str, MetricConfig],
    alive: AliveComponents | None,
    step_s: float,
    dist: Dist,
    figures: Path,
) -> dict[str, float]:
    """The given metrics as `eval/...`, and their cost in seconds and in training steps.

    Every rank calls it; values are whole on each, figures are drawn by rank 0.
    """
    cost: dict[str, float] = defaultdict(float)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        synchronise(dist.device)
        started = time.perf_counter()
        result = work()
        synchronise(dist.device)
        cost[name] += time.perf_counter() - started
        return result

    result: dict[str, float] = {}
    with autocast(config, dist.device):
        sums: dict[str, Sums] = {name: {} for name in metrics}
        for i in range(config.eval.steps):
            batch = timed("batches", partial(_batch, config, model, i, dist, "eval"))
            for name, metric in metrics.items():
                measure = partial(_measure, name, metric, config, model, batch, step, dist)
                for key, part in timed(name, measure).items():
                    sums[name][key] = sums[name][key] + part if key in sums[name] else part
        for name, metric in metrics.items():
            totals = timed(name, partial(_over_ranks, sums[name], dist))
            finish = partial(_values, name, metric, config, model, totals, alive, dist)
            result |= {f"eval/{key}": value for key, value in timed(name, finish).items()}
            if dist.is_main:
                draw = partial(_draw, name, metric, config, model, totals, dist, figures)
                timed(name, draw)
    for name, seconds in {**cost, "total": sum(cost.values())}.items():
        result[f"eval_cost/seconds/{name}"] = seconds
        result[f"eval_cost/steps/{name}"] = seconds / step_s
    return result


def check_metrics(config: RunConfig, model: ComponentModel) -> None:
    """Refuse metrics that do not fit the decomposition, before any training.

    Raises:
        ValueError: names the metric, what it asks for, and what there is.
    """
    metrics, names = config.eval.metrics, list(model.components)
    decomposed = f"decomposed are {', '.join(names)}"
    exact = {"identity_ci_error": metrics.identity_ci_error, "mmcs_ml2r": metrics.mmcs_ml2r}
    for metric, options in exact.items():
        for name in [] if options is None else options.modules:
            if name not in names:
                raise ValueError(
                    f"eval.metrics.{metric}.modules names {name!r}, which is not decomposed; "
                    f"{decomposed}"
                )
    for group, patterns in metrics.ci_l0.groups.items() if metrics.ci_l0 else ():
        unmatched = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
        if unmatched or group in names or not patterns:
            problem = f"no module for {unmatched}" if unmatched else "a name or list that is taken"
            raise ValueError(f"eval.metrics.ci_l0.groups.{group}: {problem}; {decomposed}")
    subsets = metrics.stochastic_recon_subset_ce_and_kl
    for subset, modules in subsets.subsets.items() if subsets else ():
        if subset in outputs.RESERVED or not outputs.modules_of(modules, names):
            problem = "is a name that is taken" if subset in outputs.RESERVED else "holds no module"
            raise ValueError(
                f"eval.metrics.stochastic_recon_subset_ce_and_kl.subsets.{subset} {problem}; "
                f"{decomposed}"
            )
    _check_tokens(config)


def _check_tokens(config: RunConfig) -> None:
    metrics = config.eval.metrics
    of_tokens = {
        "ce_and_kl": metrics.ce_and_kl,
        "stochastic_recon_subset_ce_and_kl": metrics.stochastic_recon_subset_ce_and_kl,
    }
    one = StepRandomness(config.seed, 0, 0, 1, 1, torch.device("cpu"))
    for name, metric in of_tokens.items():
        if metric is not None and draw_examples(config, one, "eval").is_floating_point():
            raise ValueError(
                f"eval.metrics.{name} needs a language model, which predicts the next token; the "
                f"{config.target.kind} target has no tokens: eval.metrics.{name}=null"
            )


def _batch(config: RunConfig, model: ComponentModel, i: int, dist: Dist, purpose: str) -> Batch:
    """Batch i of an evaluation; each evaluation sees the same ones, so that values compare."""
    size = config.eval.batch_size
    parts = (dist.rank, dist.world_size)
    randomness = StepRandomness(config.seed, i, *parts, size, dist.device, phase="eval")
    return make_batch(config, model, randomness, purpose)


def _measure(
    name: str,
    metric: MetricConfig,
    config: RunConfig,
    model: ComponentModel,
    batch: Batch,
    step: int,
    dist: Dist,
) -> Sums:
    """What one batch adds to a metric."""
    position = step / config.train.steps
    match metric:
        case CustomMetricConfig(kind="metric"):
            values = load_part(f"eval.metrics.{name}", metric, "metric")(model, batch)
            return {f"{name}/{key}": _pair(parts, dist) for key, parts in values.items()}
        case CiL0Config():
            return ci.l0_sums(batch.ci, metric)
        case DensityConfig():
            return ci.component_sums(batch.ci, metric.threshold)
        case CeAndKlConfig():
            return outputs.ce_and_kl_sums(model, batch, metric.rounding_threshold)
        case SubsetCeAndKlConfig():
            return outputs.subset_ce_and_kl_sums(model, batch, metric.subsets)
    match name:
        case "losses":
            losses = config.losses.configured()
            parts = _losses(losses, model, batch, position, dist)
            return {f"loss/{loss}": _pair(parts[loss], dist) for loss in losses}
        case "ci_histograms":
            return ci.histogram_sums(batch.ci)
        case "ci_mean_per_component" | "uv_plots":
            return ci.component_sums(batch.ci, threshold=None)
        case _ if isinstance(metric, AnyLossConfig) and not isinstance(metric, CustomConfig):
            parts = _losses({name: metric}, model, batch, position, dist)
            return {name: _pair(parts[name], dist)}
    return {}


def _losses(
    losses: dict[str, AnyLossConfig],
    model: ComponentModel,
    batch: Batch,
    position: float,
    dist: Dist,
) -> dict[str, LossParts]:
    step = prepare_step(losses, model, lambda: [batch], 1, position, dist)
    return {name: loss_parts(name, loss, model, batch, step) for name, loss in losses.items()}


def _pair(parts: LossParts, dist: Dist) -> Tensor:
    """(sum, count) in double; a metric of the user's own may give plain numbers."""
    return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=dist.device) for x in parts])


def _over_ranks(sums: Sums, dist: Dist) -> Sums:
    """Everything that a metric added up, over all ranks in one collective."""
    if not sums:
        return {}
    flat = all_sum(torch.cat([part.flatten().double() for part in sums.values()]), dist)
    parts = flat.split([part.numel() for part in sums.values()])
    return {k: t.view_as(s) for (k, s), t in zip(sums.items(), parts, strict=True)}


def _values(
    name: str,
    metric: MetricConfig,
    config: RunConfig,
    model: ComponentModel,
    sums: Sums,
    alive: AliveComponents | None,
    dist: Dist,
) -> dict[str, float]:
    """A metric's values from its sums, or from the model alone."""
    match metric:
        case CeAndKlConfig() | SubsetCeAndKlConfig():
            return {f"{name}/{k}": v for k, v in outputs.ce_and_kl_values(sums).items()}
        case IdentityCiErrorConfig(modules=modules, tolerance=tolerance):
            single = single_feature_ci(model, n_features(config), dist.device)
            return {
                f"{name}/{module}": identity_ci_error(single[module], pattern, tolerance)
                for module, pattern in modules.items()
            }
        case MmcsMl2rConfig(modules=modules):
            values = {}
            for module, side in modules.items():
                mmcs, ml2r = mmcs_ml2r(model.components[module], side)
                values |= {f"mmcs/{module}": mmcs, f"ml2r/{module}": ml2r}
            return values
        case PGDMultibatchConfig():
            return {name: _multibatch_pgd(name, metric, config, model, dist)}
        case DensityConfig() | PlainMetricConfig() if name != "losses":
            return {}
    if name == "alive_components":
        assert alive is not None
        return {f"{name}/{module}": n for module, n in alive.n_alive(dist).items()}
    return {key: (pair[0] / pair[1]).item() for key, pair in sums.items()}


def _multibatch_pgd(
    name: str, options: PGDMultibatchConfig, config: RunConfig, model: ComponentModel, dist: Dist
) -> float:
    """Mean distance under the worst sources that many batches share, batch by batch in memory."""

    def batches() -> Any:
        return (_batch(config, model, i, dist, name) for i in range(options.n_batches))

    sources = shared_sources(model, batches, options, options.routing, name, dist)
    parts = [pgd_recon(model, batch, sources, options.routing, name) for batch in batches()]
    sum_, count = all_sum(torch.stack([_pair(part, dist) for part in parts]).sum(0), dist)
    return (sum_ / count).item()


def _draw(
    name: str,
    metric: MetricConfig,
    config: RunConfig,
    model: ComponentModel,
    sums: Sums,
    dist: Dist,
    folder: Path,
) -> None:
    """Draw the figure of a metric that has one, as NAME.png."""
    own = isinstance(metric, CustomMetricConfig) and metric.kind == "figure"
    built_in = isinstance(metric, DensityConfig | PlainMetricConfig) and name != "losses"
    if not own and not built_in:
        return
    # Imported here: matplotlib takes long, and a run without figures does not need it.
    from spd_core.metrics import figures

    match name:
        case "permuted_ci_plots":
            single = single_feature_ci(model, n_features(config), dist.device)
            figure = figures.permuted_ci(single)
        case "uv_plots":
            order = {n: s[:-1].argsort(descending=True).tolist() for n, s in sums.items()}
            figure = figures.uv(model.components, order)
        case "ci_histograms":
            figure = figures.ci_histograms(sums)
        case "component_activation_density":
            figure = figures.per_component(sums, "share of positions active")
        case "ci_mean_per_component":
            figure = figures.per_component(sums, "mean causal importance")
        case _:
            assert isinstance(metric, CustomMetricConfig)
            part = load_part(f"eval.metrics.{name}", metric, "figure")
            figure = part(model, _batch(config, model, 0, dist, "eval"))
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    figures.plt.close(figure)
