"""Evaluation: batches to metrics and figures. Runs under no_grad and leaves training untouched."""

from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.config import MetricConfig, RunConfig
from spd_core.data.sparse import sparse_features
from spd_core.distributed import Dist, all_sum
from spd_core.losses import Batch, configured, loss_parts
from spd_core.metrics.ci import CiStatistic, ci_statistic, total
from spd_core.metrics.solutions import (
    identity_ci_error,
    mmcs_ml2r,
    single_feature_ci,
)
from spd_core.randomness import StepRandomness


def make_batch(
    config: RunConfig, model: ComponentModel, randomness: StepRandomness, purpose: str
) -> Batch:
    """Examples, the target's output and causal importances of one step, on this rank."""
    examples = sparse_features(
        config.data, config.target.n_features, randomness.batch_stream(f"{purpose}:data")
    )
    target_out, inputs = model.run_target(examples)
    ci = model.causal_importances(inputs, randomness.batch_stream(f"{purpose}:binomial"))
    return Batch(examples, target_out, ci, randomness)


# no_grad and not inference_mode: an adversarial loss needs gradients inside evaluation.
@torch.no_grad()
def evaluate(
    config: RunConfig,
    model: ComponentModel,
    step: int,
    when: Literal["fast", "slow"],
    dist: Dist,
    figures: Path,
) -> dict[str, float]:
    """All metrics due now, as `eval/NAME/...`; slow evaluations draw figures too (rank 0 only)."""
    sums, statistics = _run_batches(config, model, step, dist)
    metrics = config.eval.metrics
    result: dict[str, float] = {}
    if _due(metrics.losses, when):
        result |= {f"eval/loss/{name}": value for name, value in sums.items()}
    if metrics.ci_l0 is not None and _due(metrics.ci_l0, when):
        for name, statistic in statistics.items():
            l0 = (statistic.active_l0.sum() / statistic.n).item()
            result[f"eval/ci_l0_{metrics.ci_l0.threshold}/{name}"] = l0
    single_ci = single_feature_ci(model, config.target.n_features, dist.device)
    if metrics.identity_ci_error is not None and _due(metrics.identity_ci_error, when):
        for name, pattern in metrics.identity_ci_error.modules.items():
            result[f"eval/identity_ci_error/{name}"] = identity_ci_error(
                single_ci[name], pattern, metrics.identity_ci_error.tolerance
            )
    if metrics.mmcs_ml2r is not None and _due(metrics.mmcs_ml2r, when):
        for name, side in metrics.mmcs_ml2r.modules.items():
            mmcs, ml2r = mmcs_ml2r(model.components[name], side)
            result |= {f"eval/mmcs/{name}": mmcs, f"eval/ml2r/{name}": ml2r}
    if dist.is_main:
        _draw(config, model, single_ci, statistics, when, figures)
    return result


def _due(metric: MetricConfig | None, when: Literal["fast", "slow"]) -> bool:
    return metric is not None and (when == "slow" or metric.when == "fast")


def check_metric_modules(config: RunConfig, model: ComponentModel) -> None:
    """Refuse metrics of modules that are not decomposed, before any training.

    Raises:
        ValueError: names the metric, the module, and the modules that are decomposed.
    """
    metrics = config.eval.metrics
    named = {"identity_ci_error": metrics.identity_ci_error, "mmcs_ml2r": metrics.mmcs_ml2r}
    for metric, options in named.items():
        for name in [] if options is None else options.modules:
            if name not in model.components:
                raise ValueError(
                    f"eval.metrics.{metric}.modules names {name!r}, which is not decomposed; "
                    f"decomposed are {', '.join(model.components)}"
                )


def _run_batches(
    config: RunConfig, model: ComponentModel, step: int, dist: Dist
) -> tuple[dict[str, float], dict[str, CiStatistic]]:
    metrics = config.eval.metrics
    l0 = 0.0 if metrics.ci_l0 is None else metrics.ci_l0.threshold
    density = metrics.component_activation_density
    sums: dict[str, Tensor] = {}
    statistics: dict[str, list[CiStatistic]] = defaultdict(list)
    for i in range(config.eval.steps):
        # Every evaluation sees the same examples, so that its values can be compared over steps.
        randomness = StepRandomness(
            config.seed, i, dist.rank, dist.world_size, config.eval.batch_size, dist.device
        )
        batch = make_batch(config, model, randomness, "eval")
        for name, loss in configured(config.losses).items():
            sum_, count = loss_parts(name, loss, model, batch, step, config.train.steps, dist)
            part = torch.stack([sum_, sum_.new_tensor(float(count))])
            sums[name] = part if name not in sums else sums[name] + part
        for name, ci in batch.ci.items():
            statistics[name].append(
                ci_statistic(ci, l0, 0.0 if density is None else density.threshold)
            )
    totals = {name: all_sum(part, dist) for name, part in sums.items()}
    return (
        {name: (part[0] / part[1]).item() for name, part in totals.items()},
        {name: total(parts, dist) for name, parts in statistics.items()},
    )


def _draw(
    config: RunConfig,
    model: ComponentModel,
    single_ci: dict[str, Tensor],
    statistics: dict[str, CiStatistic],
    when: Literal["fast", "slow"],
    folder: Path,
) -> None:
    metrics = config.eval.metrics
    wanted = [
        metrics.permuted_ci_plots,
        metrics.uv_plots,
        metrics.ci_histograms,
        metrics.component_activation_density,
        metrics.ci_mean_per_component,
    ]
    if not any(_due(m, when) for m in wanted):
        return
    # Imported here: matplotlib takes long, and a run without figures does not need it.
    from spd_core.metrics import figures

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    if _due(metrics.permuted_ci_plots, when):
        drawn["permuted_ci"] = figures.permuted_ci(single_ci)
    if _due(metrics.uv_plots, when):
        order = {n: ci.sum(0).argsort(descending=True).tolist() for n, ci in single_ci.items()}
        drawn["uv"] = figures.uv(model.components, order)
    if _due(metrics.ci_histograms, when):
        drawn["ci_histograms"] = figures.ci_histograms(statistics)
    if _due(metrics.component_activation_density, when):
        density = {n: s.active_density / s.n for n, s in statistics.items()}
        drawn["component_activation_density"] = figures.per_component(
            density, "share of positions active"
        )
    if _due(metrics.ci_mean_per_component, when):
        mean = {n: s.lower_sum / s.n for n, s in statistics.items()}
        drawn["ci_mean_per_component"] = figures.per_component(mean, "mean causal importance")
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        figures.plt.close(figure)
