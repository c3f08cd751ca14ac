"""Evaluation: batches to metrics and figures. Runs under no_grad and leaves training untouched."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.config import metrics as options
from spd_core.config.losses import LossConfig, LossNames
from spd_core.data.batches import Batch, Batches, Decomposition, evaluation_batch, n_features
from spd_core.distributed import over_ranks, synchronise
from spd_core.losses import loss_parts, prepare_step
from spd_core.metrics import Sums, add, ci, matching, means, outputs
from spd_core.metrics.solutions import identity_ci_error, mmcs_ml2r, single_feature_ci
from spd_core.parts import load_part
from spd_core.schedule import annealed_ps


def due_metrics(config: RunConfig, step: int) -> dict[str, options.MetricConfig]:
    """The metrics whose turn it is after `step` steps; at the last one, all of them."""
    periods = {"fast": config.eval.every, "slow": config.eval.slow_every}
    return {
        name: m
        for name, m in config.eval.metrics.configured().items()
        if step == config.train.steps
        or step % (periods[m.when] if isinstance(m.when, str) else m.when) == 0
    }


# no_grad and not inference_mode: an adversarial loss needs gradients inside evaluation.
@torch.no_grad()
def evaluate(
    d: Decomposition,
    step: int,
    metrics: dict[str, options.MetricConfig],
    positions_ago: ci.PositionsAgo,
    step_s: float,
    figures: Path,
) -> dict[str, float]:
    """The given metrics as `eval/...`, and their cost in seconds and in training steps.

    Every rank calls it; values are whole on each, figures are drawn by rank 0.
    """
    at = Evaluation(d.config, d.model, d.dist, d.data, step / d.config.train.steps, positions_ago)
    sums: dict[str, Sums] = {name: {} for name in metrics}
    result, cost = dict[str, float](), defaultdict[str, float](float)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        synchronise(d.dist.device)
        started = time.perf_counter()
        yield
        synchronise(d.dist.device)
        cost[name] += time.perf_counter() - started

    with d.autocast():
        for i in range(d.config.eval.steps):
            with timed("batches"):
                batch = evaluation_batch(d, i, "eval")
            for name, metric in metrics.items():
                with timed(name):
                    add(sums[name], _sums(name, metric, at, batch, i))
        for name, metric in metrics.items():
            with timed(name):
                total = over_ranks("sum", {k: s.double() for k, s in sums[name].items()}, d.dist)
                match metric:
                    case options.FigureConfig() | options.CustomMetricConfig(kind="figure"):
                        if d.dist.is_main:
                            _draw(name, metric, at, total, figures / f"{name}.png")
                    case _:
                        result |= _under("eval", means(total))
    for name, seconds in {**cost, "total": sum(cost.values())}.items():
        result[f"eval_cost/seconds/{name}"] = seconds
        result[f"eval_cost/steps/{name}"] = seconds / step_s
    return result


def check_metrics(config: RunConfig, model: ComponentModel) -> None:
    """Refuse metrics that do not fit the decomposition, before any training."""
    names = list(model.components)
    for metric, o in config.eval.metrics.configured().items():
        for problem in _problems(o, config, names):
            where, known = f"eval.metrics.{metric}", ", ".join(names)
            raise ValueError(f"{where}.{problem}; decomposed are {known}; or set {where}=null")


def _problems(o: options.MetricConfig, config: RunConfig, names: list[str]) -> Iterator[str]:
    match o:
        case options.IdentityCiErrorConfig() | options.MmcsMl2rConfig():
            for name, pattern in o.modules.items():
                if name not in names:
                    yield f"modules names {name!r}, which is not decomposed"
                if isinstance(pattern, options.IdentityPattern) and pattern.n != n_features(config):
                    yield f"modules.{name}.n={pattern.n} of {n_features(config)} features"
        case options.CiL0Config():
            for group, patterns in o.groups.items():
                unmatched = [p for p in patterns if not matching(names, [p])]
                if unmatched or not patterns:
                    yield f"groups.{group}: no module for {unmatched}"
                if group in names:
                    yield f"groups.{group}: a name that is taken"
        case options.SubsetCeAndKlConfig():
            for subset, modules in o.subsets.items():
                if subset in outputs.RESERVED:
                    yield f"subsets.{subset} is a name that is taken"
                if not outputs.modules_of(modules, names):
                    yield f"subsets.{subset} holds no module"


@dataclass(frozen=True)
class Evaluation(Decomposition):
    """What every metric may look at; `position` in training goes from 0 to 1."""

    position: float
    positions_ago: ci.PositionsAgo

    def losses(self, losses: Mapping[str, LossConfig], batches: Batches, n: int) -> Sums:
        """Losses of n batches as those of one step, of which each is a part."""
        p, sums = annealed_ps(losses, self.position), Sums()
        step = prepare_step(self, losses, batches, n, p)
        for batch in batches():
            parts = {name: loss_parts(name, o, batch, step) for name, o in losses.items()}
            add(sums, self.pairs(parts))
        return sums

    def pairs(self, parts: Mapping[str, tuple[Any, float]]) -> Sums:
        """(sum, count) in double; a metric of the user's own may give plain numbers."""
        double = partial(torch.as_tensor, dtype=torch.float64, device=self.dist.device)
        return {name: torch.stack([double(s), double(n)]) for name, (s, n) in parts.items()}


def _sums(name: str, o: Any, at: Evaluation, batch: Batch, i: int) -> Sums:
    """What batch i adds to a metric or figure with the options `o`.

    A metric without need of a batch is measured with the first, and counts once.
    """
    match name:
        case "losses":
            return _under("loss", at.losses(at.config.losses.configured(), lambda: [batch], 1))
        case "ci_l0":
            return ci.l0_sums(batch.ci, o)
        case "ce_and_kl":
            return _under(name, outputs.ce_and_kl_sums(at.model, batch, o.rounding_threshold))
        case "stochastic_recon_subset_ce_and_kl":
            return _under(name, outputs.subset_ce_and_kl_sums(at.model, batch, o.subsets))
        case "alive_components" if i == 0:
            alive = ci.n_alive(at.positions_ago, o, at.dist)
            return _under(name, at.pairs({module: (n, 1) for module, n in alive.items()}))
        case "identity_ci_error" if i == 0:
            ci_of = single_feature_ci(at.model, n_features(at.config))
            errors = {m: identity_ci_error(ci_of[m], p, o.tolerance) for m, p in o.modules.items()}
            return _under(name, at.pairs({module: (n, 1) for module, n in errors.items()}))
        case "mmcs_ml2r" if i == 0:
            pairs = {}
            for module, side in o.modules.items():
                mmcs, ml2r = mmcs_ml2r(at.model.components[module], side)
                pairs |= {f"mmcs/{module}": (mmcs, 1), f"ml2r/{module}": (ml2r, 1)}
            return at.pairs(pairs)
        case "pgd_multibatch_recon" if i == 0:
            n, draw = o.n_batches, partial(evaluation_batch, at, purpose=name)
            return at.losses({name: o}, lambda: map(draw, range(n)), n)
        case "ci_histograms":
            return ci.histogram_sums(batch.ci)
        case "component_activation_density":
            return ci.component_sums(batch.ci, o.threshold)
        case "ci_mean_per_component" | "uv_plots":
            return ci.component_sums(batch.ci, threshold=None)
        case _ if name in LossNames.model_fields:
            return at.losses({name: o}, lambda: [batch], 1)
        case _ if isinstance(o, options.CustomMetricConfig) and o.kind == "metric":
            part = load_part(f"eval.metrics.{name}", o, "metric")
            return _under(name, at.pairs(part(at.model, batch)))
        case _:
            return {}


def _draw(name: str, o: Any, at: Evaluation, sums: Sums, file: Path) -> None:
    # Imported here: matplotlib takes long, and a run without figures does not need it.
    from spd_core.metrics import figures

    match name:
        case "ci_histograms":
            figure = figures.ci_histograms(sums)
        case "ci_mean_per_component":
            figure = figures.per_component(sums, "mean causal importance")
        case "component_activation_density":
            figure = figures.per_component(sums, "share of positions active")
        case "uv_plots":
            order = {n: s[:-1].argsort(descending=True).tolist() for n, s in sums.items()}
            figure = figures.uv(at.model.components, order)
        case "permuted_ci_plots":
            figure = figures.permuted_ci(single_feature_ci(at.model, n_features(at.config)))
        case _:
            part = load_part(f"eval.metrics.{name}", o, "figure")
            figure = part(at.model, evaluation_batch(at, 0, "eval"))
    figures.save(figure, file)


def _under(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{key}": value for key, value in values.items()}
