"""Lightning: a callback that audits whatever ``configure_optimizers`` returns.

Trainer(precision="bf16-true", callbacks=[AuditCallback(every=50)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from collage.integrations.figures import figures
from collage.integrations.following import Following

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ImportError(
                "collage.integrations.lightning needs lightning; remedy: pip install lightning"
            ) from error


class AuditCallback(Callback):
    """Audits the optimizers of a LightningModule and logs the figures of each audited step through the Trainer.

    Args:
        every: steps between audited ones.
        modules: whether to log the figures of each module beside the total.
        loggers: beside the Trainer's: what :func:`collage.integrations.loggers.logger` takes.
        prefix: put before every name.
        options: of :func:`collage.audit`.

    Attributes:
        audit: the :class:`collage.Audit`, from the beginning of training on.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        modules: bool = False,
        loggers: Sequence[Any] = (),
        prefix: str = "collage/",
        **options: Any,
    ) -> None:
        super().__init__()
        self._following = Following(every, loggers, options)
        self._modules, self._prefix = modules, prefix

    @property
    def audit(self) -> Any:
        """The audit; None before training."""
        return self._following.audit

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to watch, after a checkpoint has been loaded."""
        self._following.start(trainer.optimizers, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs an audited step, to every logger of the Trainer and to ``callback_metrics``."""
        report = self._following.news()
        if report is None:
            return
        numbers = figures(report, modules=self._modules, prefix=self._prefix)
        pl_module.log_dict(numbers, on_step=True, on_epoch=False, logger=False)
        for each in trainer.loggers:
            each.log_metrics(numbers, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stops watching."""
        self._following.stop()
