"""Subcomponents that start as what their module does to single examples of the data."""

import torch
from torch.nn import functional as F

from spd_core.components import tie
from spd_core.data.batches import Decomposition, draw_examples
from spd_core.randomness import StepRandomness, stream

N_EXAMPLES = 1024  # not those of a step, so that microbatches and their size change nothing


@torch.no_grad()
def start_from_examples(d: Decomposition) -> None:
    """Set V[:, c] U[c] = (r / C) e (W e)^T, e the direction of a random input of the module.

    r is the rank of 1024 such inputs. Each subcomponent then reads what occurs in the data, not a
    random mixture of it; where inputs point evenly in all directions of the space that they span,
    they add up to W on it. V[:, c] and U[c] are of equal length. Inputs of zero do not count. Tied
    modules start as each other's transpose. The same on every rank.

    Raises:
        ValueError: a module's input is zero at all examples.
    """
    config, device = d.config, d.dist.device
    part = StepRandomness(config.seed, 0, 0, 1, N_EXAMPLES, device)
    _, inputs = d.model.run_target(draw_examples(config, d.data, part, "start"))
    for name, components in d.model.components.items():
        d_in, C = components.V.shape
        x, tokens = inputs[name], not inputs[name].is_floating_point()
        x = x.flatten() if tokens else x.flatten(0, -2)
        x = x if tokens else x[x.any(1)]
        if len(x) == 0:
            raise ValueError(
                f"decompose.start=examples: the input of {name!r} is zero at all "
                f"{len(inputs[name])} examples; use start=random"
            )
        some = x[:N_EXAMPLES]
        rank = len(some.unique()) if tokens else int(torch.linalg.matrix_rank(some.float()))
        generator = stream(config.seed, f"start:{name}", device=device)
        rows = torch.randint(len(x), (C,), generator=generator, device=device)
        # A token stands for the one-hot vector that an embedding multiplies.
        x = F.one_hot(x[rows], d_in) if tokens else x[rows]
        direction = F.normalize(x.to(components.V.dtype), dim=1)
        effect = direction @ components.weight.T.to(direction.dtype) * (rank / C)
        scale = effect.norm(dim=1, keepdim=True).clamp(min=1e-6).sqrt()
        components.V.copy_((direction * scale).T)
        components.U.copy_(effect / scale)
    for first, second in config.decompose.tied:
        tie(d.model.components[first], d.model.components[second])
