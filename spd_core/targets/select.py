"""What of a target's output is reconstructed."""

from typing import Any

from jaxtyping import Float
from torch import Tensor


def select_output(raw: Any, output: str | int | None) -> Float[Tensor, "batch ..."]:
    """The tensor to reconstruct, which is at attribute, key or index `output` of what it returned.

    Raises:
        ValueError: no tensor is there; the message names what is.
    """
    if isinstance(raw, Tensor) and output is None:
        return raw
    fields: dict[Any, Any] = {}
    if isinstance(raw, list | tuple):
        fields = dict(enumerate(raw))
        output = output + len(raw) if isinstance(output, int) and output < 0 else output
    fields |= raw if isinstance(raw, dict) else getattr(raw, "__dict__", {})
    fields |= {name: getattr(raw, name) for name in getattr(raw, "_fields", ())}
    if output in fields and isinstance(fields[output], Tensor):
        return fields[output]
    names = ", ".join(map(str, fields)) or "no fields"
    raise ValueError(
        f"target.output={output}: the target returns a {type(raw).__name__} with {names}; name the "
        "attribute or index of the tensor to reconstruct, or null where it returns a tensor"
    )
