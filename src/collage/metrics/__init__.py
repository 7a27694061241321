"""What an update really did: effective descent quality and lost updates, of any optimizer's steps."""

from collage.metrics.advise import Advice, advise
from collage.metrics.audit import Audit, Report, audit
from collage.metrics.records import Record, record

__all__ = ["Advice", "Audit", "Record", "Report", "advise", "audit", "record"]
