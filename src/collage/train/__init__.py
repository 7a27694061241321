"""The training floor: settings, models, text, the loop and its checkpoints.

Only the settings are imported here. The modules that need more than torch are imported by name:
`collage.train.loop` (the run), `collage.train.runsetup`, `collage.train.runfolder`, `collage.train.models`,
`collage.train.data`, `collage.train.checkpoints`, `collage.train.continuation`, `collage.train.runfiles`.
"""

from __future__ import annotations

from collage.train.config import TrainConfig, UserError

__all__ = ["TrainConfig", "UserError"]
