"""torch-collage: training wholly in low precision with multi-component floats (Collage, arXiv 2405.03637).

``collage.AdamW`` is a drop-in optimizer for models in bfloat16 or float16; ``collage.audit`` tells how much of each
update was lost. Importing this package loads torch and nothing else heavy.
"""

from collage.kernels import Backend, backends
from collage.metrics import Advice, Audit, advise, audit
from collage.optim import (
    AdamW,
    Compensated,
    GradientRelease,
    Strategy,
    convert,
    join_tiles,
    split_tiles,
    strategies,
    to_fp8_,
    to_low_precision,
)
from collage.storage import (
    Blockwise,
    Expansion,
    Kahan,
    Master,
    Remainder,
    Rounded,
    Storage,
    Tiled,
    TiledTensor,
)
from collage.version import __version__

__all__ = [
    "AdamW",
    "Advice",
    "Audit",
    "Backend",
    "Blockwise",
    "Compensated",
    "Expansion",
    "GradientRelease",
    "Kahan",
    "Master",
    "Remainder",
    "Rounded",
    "Storage",
    "Strategy",
    "Tiled",
    "TiledTensor",
    "__version__",
    "advise",
    "audit",
    "backends",
    "convert",
    "join_tiles",
    "split_tiles",
    "strategies",
    "to_fp8_",
    "to_low_precision",
]
