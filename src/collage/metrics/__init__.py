"""What an update really did: effective descent quality and lost updates, from the sums of the very step."""

from collage.metrics.audit import Audit, audit
from collage.metrics.records import Record, record

__all__ = ["Audit", "Record", "audit", "record"]
