"""The op dialect: what passes insert. One definition per op; `import elision.kernels` registers them with torch.

An op takes tensors and plain attributes, has no side effects, and exists in both worlds: as
`torch.ops.elision.<name>` and as an ONNX function of standard operators (`OpDef.onnx_function`).

A token map is three int32 tensors: slot [B, N], the output slot of every token (-1: dropped); keep [B, N'], the
position of each slot's representative; source [B, N-N'], the positions that merge into another. size [B, N]
float32 says how many original tokens a token stands for; 0 is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# transformers asks for a package called `kernels`, and with the repository's root on sys.path it finds this folder.
# It must then see an empty module, not a second registration of every op.
if TYPE_CHECKING or __name__ == "elision.kernels":
    from .definition import Attr, OpDef
    from .ops import OPS, definition_of


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of every op, to be merged into a torch decomposition table.

    Inductor needs none: torch takes the ops apart below autograd by itself."""
    table: dict[Any, Callable[..., Any]] = {}
    for op in OPS.values():
        table.update(op.decompositions())
    return table


__all__ = ["OPS", "Attr", "OpDef", "decompositions", "definition_of"]
