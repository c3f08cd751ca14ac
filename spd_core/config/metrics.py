"""The options of every metric and figure."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spd_core.base_config import BaseConfig, Count, CustomConfig, Fraction
from spd_core.config.losses import LossConfig, LossNames, PGDMultibatchConfig, When

DATA_OF = {  # metrics that are measured on one kind of data only
    "ce_and_kl": "text",
    "stochastic_recon_subset_ce_and_kl": "text",
    "identity_ci_error": "sparse_features",
    "permuted_ci_plots": "sparse_features",
}


class MetricConfig(BaseConfig):
    when: When = Field(description="fast, slow, or every so many steps")


class CiL0Config(MetricConfig):
    threshold: Fraction = Field(description="a subcomponent counts where its ci is above")
    groups: dict[str, list[str]] = Field(description="sums over modules: name -> fnmatch patterns")


class FigureConfig(MetricConfig):
    """A figure without options."""


class DensityConfig(FigureConfig):
    threshold: Fraction


class AliveComponentsConfig(MetricConfig):
    """Subcomponents whose ci was above the threshold in the last examples of training."""

    threshold: Fraction
    n_examples: Count = Field(description="how many examples back; a token is an example")


class CeAndKlConfig(MetricConfig):
    rounding_threshold: Fraction = Field(description="rounded masks are 1 where ci is above")


class ModuleSet(BaseConfig):
    include: list[str] = Field(min_length=1, description="fnmatch patterns of module paths")
    exclude: list[str]


class SubsetCeAndKlConfig(MetricConfig):
    subsets: dict[str, ModuleSet] = Field(min_length=1)


class IdentityPattern(BaseConfig):
    """The known solution: an identity matrix over n features."""

    kind: Literal["identity"]
    n: Count


class DensePattern(BaseConfig):
    """The known solution: exactly k subcomponents active."""

    kind: Literal["dense"]
    k: Count


SolutionPattern = Annotated[IdentityPattern | DensePattern, Field(discriminator="kind")]


class IdentityCiErrorConfig(MetricConfig):
    tolerance: Fraction = Field(description="distance to 0 or 1 that still counts as right")
    modules: dict[str, SolutionPattern] = Field(min_length=1)


class MmcsMl2rConfig(MetricConfig):
    """Which side of each module's weight holds the features that are compared."""

    modules: dict[str, Literal["features_in", "features_out"]] = Field(min_length=1)


class CustomMetricConfig(MetricConfig, CustomConfig):
    """A metric or figure of the user's own."""

    kind: Literal["metric", "figure"]


class MetricsConfig(LossNames):
    """Metrics by name, every loss among them; others need a `path`."""

    losses: MetricConfig | None = Field(None, description="every loss that is trained")
    ci_l0: CiL0Config | None = None
    alive_components: AliveComponentsConfig | None = None
    identity_ci_error: IdentityCiErrorConfig | None = None
    mmcs_ml2r: MmcsMl2rConfig | None = None
    ce_and_kl: CeAndKlConfig | None = None
    stochastic_recon_subset_ce_and_kl: SubsetCeAndKlConfig | None = None
    pgd_multibatch_recon: PGDMultibatchConfig | None = None
    # figures
    ci_histograms: FigureConfig | None = None
    component_activation_density: DensityConfig | None = None
    ci_mean_per_component: FigureConfig | None = None
    permuted_ci_plots: FigureConfig | None = None
    uv_plots: FigureConfig | None = None
    __pydantic_extra__: dict[str, CustomMetricConfig | None]  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _each_has_a_frequency(self) -> Self:
        for name, loss in self.configured().items():
            if isinstance(loss, LossConfig) and (loss.when is None or loss.coeff is not None):
                raise ValueError(f"{name} needs a `when`, no coeff: eval.metrics.{name}.when=slow")
        return self
