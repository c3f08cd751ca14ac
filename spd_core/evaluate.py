"""Evaluation: batches to metrics and figures. Runs under no_grad and leaves training untouched."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.config.losses import AnyLossConfig
from spd_core.config.metrics import (
    AliveComponentsConfig,
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
from spd_core.data.batches import Batch, autocast, draw_examples, make_batch, n_features
from spd_core.distributed import Dist, all_sum, synchronise
from spd_core.losses import loss_parts, prepare_step
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
    at = _Evaluation(config, model, step / config.train.steps, alive, dist)
    cost: dict[str, float] = defaultdict(float)

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        synchronise(dist.device)
        started = time.perf_counter()
        result = work(*arguments)
        synchronise(dist.device)
        cost[name] += time.perf_counter() - started
        return result

    result: dict[str, float] = {}
    with autocast(config, dist.device):
        sums: dict[str, Sums] = {name: {} for name in metrics}
        for i in range(config.eval.steps):
            batch = timed("batches", at.batch, i, "eval")
            for name, metric in metrics.items():
                for key, part in timed(name, at.measure, name, metric, batch).items():
                    sums[name][key] = sums[name][key] + part if key in sums[name] else part
        for name, metric in metrics.items():
            totals = timed(name, at.over_ranks, sums[name])
            values = timed(name, at.values, name, metric, totals)
            result |= {f"eval/{key}": value for key, value in values.items()}
            if dist.is_main:
                timed(name, at.draw, name, metric, totals, figures)
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
    one = StepRandomness(config.seed, 0, 0, 1, 1, torch.device("cpu"))
    has_tokens = not draw_examples(config, one, "eval").is_floating_point()

    def refuse(what: str, problem: str) -> ValueError:
        return ValueError(f"eval.metrics.{what} {problem}; decomposed are {', '.join(names)}")

    for metric, options in metrics.configured().items():
        match options:
            case IdentityCiErrorConfig(modules=modules) | MmcsMl2rConfig(modules=modules):
                for name in modules.keys() - names:
                    raise refuse(f"{metric}.modules", f"names {name!r}, which is not decomposed")
            case CiL0Config(groups=groups):
                for group, patterns in groups.items():
                    unmatched = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
                    if unmatched or not patterns:
                        raise refuse(f"{metric}.groups.{group}:", f"no module for {unmatched}")
                    if group in names:
                        raise refuse(f"{metric}.groups.{group}:", "a name that is taken")
            case SubsetCeAndKlConfig(subsets=subsets):
                for subset, modules in subsets.items():
                    if subset in outputs.RESERVED:
                        raise refuse(f"{metric}.subsets.{subset}", "is a name that is taken")
                    if not outputs.modules_of(modules, names):
                        raise refuse(f"{metric}.subsets.{subset}", "holds no module")
        if isinstance(options, CeAndKlConfig | SubsetCeAndKlConfig) and not has_tokens:
            raise ValueError(
                f"eval.metrics.{metric} needs a language model, which predicts the next token; "
                f"the {config.target.kind} target has no tokens: eval.metrics.{metric}=null"
            )


@dataclass(frozen=True)
class _Evaluation:
    """What every metric may look at; `position` in training goes from 0 to 1."""

    config: RunConfig
    model: ComponentModel
    position: float
    alive: AliveComponents | None
    dist: Dist

    def batch(self, i: int, purpose: str) -> Batch:
        """Batch i of an evaluation; each evaluation sees the same ones, so that values compare."""
        rank, n_ranks, device = self.dist.rank, self.dist.world_size, self.dist.device
        seed, size = self.config.seed, self.config.eval.batch_size
        randomness = StepRandomness(seed, i, rank, n_ranks, size, device, phase="eval")
        return make_batch(self.config, self.model, randomness, purpose)

    def measure(self, name: str, metric: MetricConfig, batch: Batch) -> Sums:
        """What one batch adds to a metric."""
        match metric:
            case CustomMetricConfig(kind="metric"):
                values = load_part(f"eval.metrics.{name}", metric, "metric")(self.model, batch)
                return {f"{name}/{key}": self.pair(parts) for key, parts in values.items()}
            case CiL0Config():
                return ci.l0_sums(batch.ci, metric)
            case DensityConfig():
                return ci.component_sums(batch.ci, metric.threshold)
            case CeAndKlConfig():
                return outputs.ce_and_kl_sums(self.model, batch, metric.rounding_threshold)
            case SubsetCeAndKlConfig():
                return outputs.subset_ce_and_kl_sums(self.model, batch, metric.subsets)
        match name:
            case "losses":
                losses = self.losses(self.config.losses.configured(), batch)
                return {f"loss/{loss}": pair for loss, pair in losses.items()}
            case "ci_histograms":
                return ci.histogram_sums(batch.ci)
            case "ci_mean_per_component" | "uv_plots":
                return ci.component_sums(batch.ci, threshold=None)
            case _ if isinstance(metric, AnyLossConfig):
                return self.losses({name: metric}, batch)
        return {}

    def losses(self, losses: dict[str, AnyLossConfig], batch: Batch) -> Sums:
        step = prepare_step(losses, self.model, lambda: [batch], 1, self.position, self.dist)
        return {
            name: self.pair(loss_parts(name, loss, self.model, batch, step))
            for name, loss in losses.items()
        }

    def pair(self, parts: LossParts) -> Tensor:
        """(sum, count) in double; a metric of the user's own may give plain numbers."""
        device = self.dist.device
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in parts])

    def over_ranks(self, sums: Sums) -> Sums:
        """Everything that a metric added up, over all ranks in one collective."""
        if not sums:
            return {}
        flat = all_sum(torch.cat([part.flatten().double() for part in sums.values()]), self.dist)
        parts = flat.split([part.numel() for part in sums.values()])
        return {k: t.view_as(s) for (k, s), t in zip(sums.items(), parts, strict=True)}

    def values(self, name: str, metric: MetricConfig, sums: Sums) -> dict[str, float]:
        """A metric's values from its sums, or from the model alone."""
        match metric:
            case CeAndKlConfig() | SubsetCeAndKlConfig():
                return {f"{name}/{k}": v for k, v in outputs.ce_and_kl_values(sums).items()}
            case IdentityCiErrorConfig(modules=modules, tolerance=tolerance):
                single = self.single_feature_ci()
                return {
                    f"{name}/{module}": identity_ci_error(single[module], pattern, tolerance)
                    for module, pattern in modules.items()
                }
            case MmcsMl2rConfig(modules=modules):
                values = {}
                for module, side in modules.items():
                    mmcs, ml2r = mmcs_ml2r(self.model.components[module], side)
                    values |= {f"mmcs/{module}": mmcs, f"ml2r/{module}": ml2r}
                return values
            case PGDMultibatchConfig():
                return {name: self.multibatch_pgd(name, metric)}
            case AliveComponentsConfig():
                assert self.alive is not None
                return {f"{name}/{k}": n for k, n in self.alive.n_alive(self.dist).items()}
            case DensityConfig() | PlainMetricConfig() if name != "losses":
                return {}
        return {key: (pair[0] / pair[1]).item() for key, pair in sums.items()}

    def single_feature_ci(self) -> dict[str, Tensor]:
        return single_feature_ci(self.model, n_features(self.config), self.dist.device)

    def multibatch_pgd(self, name: str, options: PGDMultibatchConfig) -> float:
        """Mean distance under the worst sources that many batches share, one batch in memory."""

        def batches() -> Iterator[Batch]:
            return (self.batch(i, name) for i in range(options.n_batches))

        routing = options.routing
        sources = shared_sources(self.model, batches, options, routing, name, self.dist)
        parts = [pgd_recon(self.model, batch, sources, routing, name) for batch in batches()]
        sum_, count = all_sum(torch.stack([self.pair(part) for part in parts]).sum(0), self.dist)
        return (sum_ / count).item()

    def draw(self, name: str, metric: MetricConfig, sums: Sums, folder: Path) -> None:
        """Draw the figure of a metric that has one, as NAME.png."""
        own = isinstance(metric, CustomMetricConfig) and metric.kind == "figure"
        built_in = isinstance(metric, DensityConfig | PlainMetricConfig) and name != "losses"
        if not own and not built_in:
            return
        # Imported here: matplotlib takes long, and a run without figures does not need it.
        from spd_core.metrics import figures

        match name:
            case "permuted_ci_plots":
                figure = figures.permuted_ci(self.single_feature_ci())
            case "uv_plots":
                order = {n: s[:-1].argsort(descending=True).tolist() for n, s in sums.items()}
                figure = figures.uv(self.model.components, order)
            case "ci_histograms":
                figure = figures.ci_histograms(sums)
            case "component_activation_density":
                figure = figures.per_component(sums, "share of positions active")
            case "ci_mean_per_component":
                figure = figures.per_component(sums, "mean causal importance")
            case _:
                assert isinstance(metric, CustomMetricConfig)
                part = load_part(f"eval.metrics.{name}", metric, "figure")
                figure = part(self.model, self.batch(0, "eval"))
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=130)
        figures.plt.close(figure)
