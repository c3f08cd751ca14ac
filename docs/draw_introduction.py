"""Draw docs/introduction.png from a finished run of tms_5-2: `just docs RUN_FOLDER`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console

from spd_core import distributed
from spd_core.checkpoint import load_model, newest_valid_checkpoint
from spd_core.config import load_config
from spd_core.data.batches import n_features
from spd_core.metrics.solutions import permute_to_identity, single_feature_ci
from spd_core.run_dir import RunDir
from spd_core.train import build_model

MODULE = "linear1"


def main(run: Path) -> None:
    run_dir = RunDir(run)
    config = load_config(run_dir.config_file)
    dist = distributed.init(0, 1, 0, "", "cpu")
    model = build_model(config, run_dir.targets, dist, Console(quiet=True))
    load_model(newest_valid_checkpoint(run_dir)[0], model)
    components = model.components[MODULE]
    ci = single_feature_ci(model, n_features(config))[MODULE]
    alive = [int(c) for c in ci.max(0).values.gt(0.1).nonzero()[:, 0]]
    with torch.no_grad():
        # What subcomponent c writes for the feature that it reads most.
        feature = components.V[:, alive].abs().argmax(0)
        arrows = components.V[feature, alive][:, None] * components.U[alive]

    colors = plt.get_cmap("tab10").colors
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    _arrows(axes[0], components.weight.T, list(range(n_features(config))), colors)
    axes[0].set_title("target: columns of W")
    _arrows(axes[1], arrows, feature.tolist(), colors)
    axes[1].set_title(f"found: {len(alive)} of {components.C} subcomponents alive")
    image = axes[2].imshow(permute_to_identity(ci), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes[2].set(
        title="causal importance", xlabel="subcomponent (reordered)", ylabel="active feature"
    )
    figure.colorbar(image, ax=axes[2])
    path = Path(__file__).parent / "introduction.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def _arrows(ax, vectors: torch.Tensor, feature: list[int], colors) -> None:
    for vector, f in zip(vectors.tolist(), feature, strict=True):
        ax.annotate(
            "",
            xy=vector,
            xytext=(0, 0),
            arrowprops={"arrowstyle": "-|>", "color": colors[f], "lw": 2.5, "mutation_scale": 16},
        )
        ax.text(1.16 * vector[0], 1.16 * vector[1], f, color=colors[f], ha="center", va="center")
    limit = 1.35 * float(vectors.norm(dim=-1).max())
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.axhline(0, color="#d0d7de", lw=0.8, zorder=0)
    ax.axvline(0, color="#d0d7de", lw=0.8, zorder=0)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
