"""How a logical tensor of the training state is kept: as one number, as an expansion, beside a master copy."""

from collage.storage.contract import Component, Storage
from collage.storage.expansion import Expansion
from collage.storage.kahan import Kahan
from collage.storage.master import Master
from collage.storage.rounded import Rounded

__all__ = ["Component", "Expansion", "Kahan", "Master", "Rounded", "Storage"]
