"""A frozen target with components beside it: hooks put masked outputs in, and take inputs out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd_core.ci_fns import CausalImportance, apply_sigmoid, make_ci_fn
from spd_core.components import Identity, LinearComponents, check_decomposable, is_decomposable, tie
from spd_core.config import Checkpointing, DecomposeConfig
from spd_core.fast.checkpointed import caller
from spd_core.fast.masked import LazyMask
from spd_core.randomness import Stream, stream
from spd_core.rows import Rows, at_rows
from spd_core.targets.select import select_output


@dataclass(frozen=True)
class MaskInfo:
    """How one module runs: masks of its subcomponents and delta, and where it runs on them.

    With `rows` the masks are for these alone: (n, C) and (n,). Where a device is not to be waited
    for, it says of each position whether it is one, and masks are for all. None = everywhere.
    """

    mask: Float[Tensor, "... C"] | LazyMask | None
    delta_mask: Float[Tensor, "..."] | None
    rows: Rows | Bool[Tensor, "..."] | None


@dataclass(frozen=True)
class Cache:
    """What decomposed modules saw in one forward pass; hand an empty one to `run_masked`."""

    inputs: dict[str, Float[Tensor, "... d_in"]] = field(default_factory=dict)
    inner_acts: dict[str, Float[Tensor, "... C"]] = field(default_factory=dict)


def expand_patterns(
    target: nn.Module, c_of: Mapping[str, int | None], where: str
) -> dict[str, int]:
    """Module paths and their C, in the target's own order. `where` is the config field.

    Raises:
        ValueError: a pattern matches no decomposable module, or two match the same one.
    """
    patterns = [pattern for pattern, C in c_of.items() if C is not None]
    paths = [name for name, module in target.named_modules() if is_decomposable(module)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in paths):
            raise ValueError(
                f"{where}: pattern {pattern!r} matches no module of this target; "
                f"its decomposable modules are {', '.join(paths) or 'none'}"
            )
    result = {}
    for name in paths:
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if len(matching) > 1:
            raise ValueError(f"{where}: {name!r} is matched by {' and '.join(matching)}; keep one")
        for pattern in matching:
            check_decomposable(where, name, target.get_submodule(name))
            result[name] = c_of[pattern]
    return result


def insert_identities(target: nn.Module, patterns: dict[str, int]) -> dict[str, int]:
    """Put an identity matrix before the matched modules, as `PATH.pre_identity`; path -> C."""
    inserted = {}
    for name, C in expand_patterns(target, patterns, "decompose.identity_modules").items():
        module = target.get_submodule(name)
        if isinstance(module, nn.Embedding):
            raise ValueError(
                f"decompose.identity_modules: {name!r} is an embedding, whose input is no vector"
            )
        # A target that was decomposed before has its identities already.
        if not hasattr(module, "pre_identity"):
            weight = next(module.parameters())
            d_in = LinearComponents(module, 1, torch.Generator()).weight.shape[1]
            module.add_module("pre_identity", Identity(d_in).to(weight.device, weight.dtype))
            module.register_forward_pre_hook(_through_identity, with_kwargs=True)
        inserted[f"{name}.pre_identity"] = C
    return inserted


def _through_identity(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x,) = *args, *kwargs.values()
    return (module.pre_identity(x),), {}


class ComponentModel(nn.Module):
    """Target, components and causal-importance functions of all decomposed modules.

    `output` is the attribute or index of what the target returns that holds the logits or
    activations; None for a target that returns a tensor.
    """

    def __init__(
        self, target: nn.Module, config: DecomposeConfig, seed: int, output: str | int | None = None
    ) -> None:
        super().__init__()
        identities = insert_identities(target, config.identity_modules)
        self.target = target.requires_grad_(False).eval()
        self.config, self.output = config, output
        cpu = torch.device("cpu")
        self.components: dict[str, LinearComponents] = {}
        self.ci_fns: dict[str, nn.Module] = {}
        modules = expand_patterns(target, config.modules, "decompose.modules") | identities
        if not modules:
            raise ValueError("decompose.modules: no pattern has a number of subcomponents")
        for name, C in modules.items():
            generator = stream(seed, f"components:{name}", device=cpu)
            components = LinearComponents(target.get_submodule(name), C, generator)
            generator = stream(seed, f"ci_fn:{name}", device=cpu)
            self.ci_fns[name] = make_ci_fn(name, config.ci_fn, components, generator)
            self.components[name] = components
        for first, second in config.tied:
            for name in {first, second} - modules.keys():
                decomposed = ", ".join(modules)
                raise ValueError(f"decompose.tied: {name!r} is none of the decomposed {decomposed}")
            tie(self.components[first], self.components[second])
        # In lists, because a ModuleDict refuses some paths as keys.
        self._components = nn.ModuleList(self.components.values())
        self._ci_fns = nn.ModuleList(self.ci_fns.values())

    def component_parameters(self) -> list[nn.Parameter]:
        return list(self._components.parameters())

    def ci_fn_parameters(self) -> list[nn.Parameter]:
        return list(self._ci_fns.parameters())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by a name that is stable across restarts."""
        named = {}  # roughly in the order of first use, so that ranks wait less for each other
        for path, components in self.components.items():
            named[f"components.{path}.V"] = components.V
            named |= {f"ci_fns.{path}.{n}": p for n, p in self.ci_fns[path].named_parameters()}
        return named | {f"components.{path}.U": c.U for path, c in self.components.items()}

    @torch.no_grad()
    def run_target(
        self, batch: Float[Tensor, "batch ..."]
    ) -> tuple[Float[Tensor, "batch ..."], dict[str, Float[Tensor, "... d_in"]]]:
        """The target's output, and the input of every decomposed module.

        Raises:
            ValueError: a decomposed module runs not once, or something that masks cannot follow.
        """
        inputs, versions = dict[str, Tensor](), dict[str, int]()

        def keep(name: str, x: Tensor, out: Any) -> None:
            if not isinstance(out, Tensor):
                raise _refusal(name, f"returns a {type(out).__name__} (of a hook of its own?)")
            if name in inputs:
                raise _refusal(name, "runs more than once in one forward pass (shared weights)")
            if len(x) == 1:  # position embeddings run once: the same input for every example
                x = x.expand(len(batch), *x.shape[1:])
            if len(x) != len(batch):
                raise _refusal(name, f"has an input of {len(x)} rows for {len(batch)} examples")
            inputs[name], versions[name] = x, x._version

        with self._hooks(self.components, keep):
            out = select_output(self.target(batch), self.output)
        for name in self.components:
            if name not in inputs:
                raise _refusal(name, "is never called (its weight is read directly, or is unused)")
            if inputs[name]._version != versions[name]:
                raise _refusal(name, "has an input that is changed in place after the module ran")
        return out, inputs

    def run_masked(
        self,
        batch: Float[Tensor, "batch ..."],
        masks: dict[str, MaskInfo],
        cache: Cache | None = None,
        own_acts: dict[str, Float[Tensor, "... C"]] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The output with the modules of `masks` on their components, the others unchanged.

        A cache is filled with what every decomposed module sees in this pass, masked or not.
        `own_acts` are those of the target's own forward pass on this batch: what the first masked
        module sees is no different, so its product with V need not be taken again.
        """
        first: list[Tensor] = []

        def put_in(name: str, x: Tensor, out: Tensor) -> Tensor:
            info, components = masks.get(name), self.components[name]
            if info is not None and not first:
                first.append(x)
            rows, n_dims = None if info is None else info.rows, out.dim() - 1
            own = own_acts.get(name) if own_acts and first and x is first[0] else None
            if rows is not None and len(x) == 1:  # position embeddings, as in `run_target`
                x, out = (t.expand(len(batch), *t.shape[1:]) for t in (x, out))
            if own is not None:
                inner_acts = at_rows(own, rows, n_dims)
            else:
                inner_acts = components.inner_acts(at_rows(x, rows, n_dims))
            if cache is not None:
                assert rows is None, "a cache holds what modules see at all positions"
                cache.inputs[name], cache.inner_acts[name] = x, inner_acts
            if info is None:
                return out
            its_out = at_rows(out, rows, n_dims)
            masked = components(inner_acts, its_out, info.mask, info.delta_mask)
            match rows:
                case None:
                    return masked
                case Tensor():
                    return torch.where(rows.unsqueeze(-1), masked, out)
                case Rows(index=at, n=n):
                    return out.flatten(0, -2).index_copy(0, at[:n], masked[:n]).view_as(out)

        with self._hooks(masks if cache is None else self.components, put_in):
            return select_output(self.target(batch), self.output)

    def causal_importances(
        self,
        inputs: dict[str, Float[Tensor, "... d_in"]],
        noise: Stream | None,
        checkpointing: Checkpointing,
    ) -> tuple[dict[str, CausalImportance], dict[str, Float[Tensor, "... C"]]]:
        """Causal importances of every module, and x V of those where it is needed once more.

        `inputs` are the target's own; `noise` jitters under binomial sampling.
        """
        noise = noise if self.config.sampling == "binomial" else None
        call = caller("off" if self.config.ci_fn.kind == "custom" else checkpointing)
        result, own_acts, first = {}, {}, next(iter(inputs.values()))
        for name, x in inputs.items():
            if self.config.ci_fn.kind in ("mlp", "custom") or x is first:
                own_acts[name] = self.components[name].inner_acts(x)
            x = x.to(self.components[name].V.dtype) if x.is_floating_point() else x
            g = call(self.ci_fns[name], x, own_acts.get(name))
            jitter = None if noise is None else noise.uniform(*g.shape[1:])
            result[name] = apply_sigmoid(g, self.config.sigmoid, jitter)
        return result, own_acts

    @contextmanager
    def _hooks(
        self, names: Iterable[str], hook: Callable[[str, Tensor, Tensor], Tensor | None]
    ) -> Iterator[None]:
        """Call hook(name, input, output) after each module; a tensor it returns is the output."""

        def after(name: str, _module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Any:
            (x,) = *args, *kwargs.values()
            return hook(name, x, out)

        with ExitStack() as stack:
            for name in names:
                module = self.target.get_submodule(name)
                handle = module.register_forward_hook(partial(after, name), with_kwargs=True)
                stack.enter_context(handle)
            yield


def _refusal(name: str, why: str) -> ValueError:
    """Masks cannot follow what this module does in the target's forward pass."""
    return ValueError(f"decompose.modules: {name!r} {why}; leave it out")
