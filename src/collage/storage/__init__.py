"""How a logical tensor of the training state is kept: as one number, as an expansion, with a remainder, beside a master
copy, in blocks of 8-bit codes, in tiles of 8-bit numbers."""

from collage.storage.blockwise import Blockwise
from collage.storage.contract import Component, Storage
from collage.storage.expansion import Expansion
from collage.storage.kahan import Kahan
from collage.storage.master import Master
from collage.storage.remainder import Remainder
from collage.storage.rounded import Rounded
from collage.storage.tensor import TiledTensor, form_of
from collage.storage.tiled import Tiled

__all__ = [
    "Blockwise",
    "Component",
    "Expansion",
    "Kahan",
    "Master",
    "Remainder",
    "Rounded",
    "Storage",
    "Tiled",
    "TiledTensor",
    "form_of",
]
