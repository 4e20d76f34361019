"""2:4 sparse linear layers: formats, a reference, CPU and GPU kernels, and the ops that carry them
through graphs.

Importing this package registers the ops ``torch.ops.secateur.*`` (see ``ops``); kernels load at
their first call.
"""

from secateur.kernels.sparse24.backends import Served, backend_report
from secateur.kernels.sparse24.formats import (
    KINDS,
    FormatError,
    Packed24,
    from_cutlass,
    is_24,
    pack,
    pack_dense,
    to_cutlass,
)
from secateur.kernels.sparse24.module import PackedLinear, StackedPart
from secateur.kernels.sparse24.ops import linear, op_of

__all__ = [
    "KINDS",
    "FormatError",
    "Packed24",
    "PackedLinear",
    "Served",
    "StackedPart",
    "backend_report",
    "from_cutlass",
    "is_24",
    "linear",
    "op_of",
    "pack",
    "pack_dense",
    "to_cutlass",
]
