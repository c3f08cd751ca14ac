"""A frozen target with components beside it: hooks put masked outputs in, and take inputs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd_core.ci_fns import CausalImportance, CiFn, apply_sigmoid
from spd_core.components import LinearComponents, tie
from spd_core.config import DecomposeConfig
from spd_core.randomness import BatchStream, stream


@dataclass(frozen=True)
class MaskInfo:
    """How one module runs: masks of its subcomponents and delta, and where it runs on them."""

    mask: Float[Tensor, "... C"] | None
    delta_mask: Float[Tensor, "..."] | None
    route: Bool[Tensor, "..."] | None


def expand_patterns(target: nn.Module, patterns: dict[str, int]) -> dict[str, int]:
    """Module paths and their C, in the target's own order.

    Raises:
        ValueError: a pattern matches no linear module, or two patterns match the same one.
    """
    linears = [name for name, module in target.named_modules() if isinstance(module, nn.Linear)]
    matches = {p: [n for n in linears if fnmatchcase(n, p)] for p in patterns}
    for pattern, names in matches.items():
        if not names:
            raise ValueError(
                f"decompose.modules: pattern {pattern!r} matches no module of this target; "
                f"its decomposable modules are {', '.join(linears)}"
            )
    for name in linears:
        matching = [p for p, names in matches.items() if name in names]
        if len(matching) > 1:
            raise ValueError(
                f"decompose.modules: module {name!r} is matched by {' and '.join(matching)}; "
                "each module takes one pattern"
            )
    return {n: patterns[p] for n in linears for p in patterns if n in matches[p]}


class ComponentModel(nn.Module):
    """Target, components and causal-importance functions of all decomposed modules."""

    def __init__(self, target: nn.Module, config: DecomposeConfig, seed: int) -> None:
        super().__init__()
        self.target = target.requires_grad_(False).eval()
        self.config = config
        cpu = torch.device("cpu")
        self.components: dict[str, LinearComponents] = {}
        self.ci_fns: dict[str, CiFn] = {}
        for name, C in expand_patterns(target, config.modules).items():
            linear = target.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.components[name] = LinearComponents(
                linear, C, stream(seed, f"components:{name}", device=cpu)
            )
            self.ci_fns[name] = CiFn(
                config.ci_fn, C, linear.in_features, stream(seed, f"ci_fn:{name}", device=cpu)
            )
        for first, second in config.tied:
            for name in (first, second):
                if name not in self.components:
                    raise ValueError(
                        f"decompose.tied names {name!r}, which is not decomposed; "
                        f"decomposed are {', '.join(self.components)}"
                    )
            tie(self.components[first], self.components[second])
        # A ModuleDict key must not hold a dot, so the paths are registered with another character.
        self._components = nn.ModuleDict({_key(n): c for n, c in self.components.items()})
        self._ci_fns = nn.ModuleDict({_key(n): f for n, f in self.ci_fns.items()})

    def component_parameters(self) -> list[nn.Parameter]:
        return list(self._components.parameters())

    def ci_fn_parameters(self) -> list[nn.Parameter]:
        return list(self._ci_fns.parameters())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by a name that is stable across restarts."""
        return {
            **{f"components.{n}": p for n, p in self._components.named_parameters()},
            **{f"ci_fns.{n}": p for n, p in self._ci_fns.named_parameters()},
        }

    @torch.no_grad()
    def run_target(
        self, batch: Float[Tensor, "batch ..."]
    ) -> tuple[Float[Tensor, "batch ..."], dict[str, Float[Tensor, "... d_in"]]]:
        """The target's output, and the input of every decomposed module."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
                inputs[name] = args[0]

            return hook

        with self._hooks({name: keep(name) for name in self.components}):
            out = self.target(batch)
        return out, inputs

    def run_masked(
        self, batch: Float[Tensor, "batch ..."], masks: dict[str, MaskInfo]
    ) -> Float[Tensor, "batch ..."]:
        """The output with the modules of `masks` on their components, the others unchanged."""

        def replace(name: str, info: MaskInfo) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                masked = self.components[name](args[0], out, info.mask, info.delta_mask)
                if info.route is None:
                    return masked
                return torch.where(info.route.unsqueeze(-1), masked, out)

            return hook

        with self._hooks({name: replace(name, info) for name, info in masks.items()}):
            return self.target(batch)

    def causal_importances(
        self,
        inputs: dict[str, Float[Tensor, "... d_in"]],
        noise: BatchStream | None,
    ) -> dict[str, CausalImportance]:
        """Causal importances of every module; `noise` jitters them under binomial sampling."""
        result = {}
        for name, x in inputs.items():
            g = self._pre_sigmoid(name, x)
            jitter = None
            if self.config.sampling == "binomial" and noise is not None:
                jitter = noise.uniform(*g.shape[1:])
            result[name] = apply_sigmoid(g, self.config.sigmoid, jitter)
        return result

    def _pre_sigmoid(self, name: str, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... C"]:
        """The ci_fn's output, computed once for all positions whose input is zero.

        Most positions of sparse toy data are; skipping them would make a GPU wait for the count.
        """
        components, ci_fn = self.components[name], self.ci_fns[name]
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type == "cuda" or len(active := flat.any(-1).nonzero()[:, 0]) > len(flat) // 2:
            return ci_fn(x, components.inner_acts(x))
        distinct = torch.cat([flat.new_zeros(1, flat.shape[1]), flat[active]])
        g = ci_fn(distinct, components.inner_acts(distinct))
        place = torch.zeros(len(flat), dtype=torch.long)
        place[active] = torch.arange(1, len(distinct))
        return g[place].reshape(*x.shape[:-1], -1)

    @contextmanager
    def _hooks(self, hooks: dict[str, Any]) -> Iterator[None]:
        handles = [
            self.target.get_submodule(name).register_forward_hook(hook)
            for name, hook in hooks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _key(name: str) -> str:
    return name.replace(".", "-")
