"""The Hugging Face Trainer: the optimizer by argument, the audit in the Trainer's own logs.

trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer("plus", lr=1e-4))
audit_trainer(trainer, every=50)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from collage.integrations.figures import figures
from collage.integrations.following import Following
from collage.optim import AdamW, Strategy

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(
        "collage.integrations.huggingface needs transformers; remedy: pip install 'torch-collage[train]'"
    ) from error


def optimizer(strategy: str | Strategy = "plus", **options: Any) -> tuple[type[AdamW], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes: :class:`collage.AdamW` with these options."""
    return AdamW, {"strategy": strategy, **options}


class AuditCallback(TrainerCallback):
    """Audits the Trainer's optimizer, whatever it is, and puts the figures of an audited step into the next log.

    Given to ``Trainer(callbacks=[...])`` it comes after the Trainer's own loggers, which then miss the figures; with
    :func:`audit_trainer` it comes before them.

    Args:
        every: steps between audited ones.
        modules: whether to log the figures of each module beside the total.
        loggers: beside the Trainer's: what :func:`collage.integrations.loggers.logger` takes.
        options: of :func:`collage.audit`.

    Attributes:
        audit: the :class:`collage.Audit`, from the beginning of training on.
    """

    def __init__(self, every: int = 50, *, modules: bool = False, loggers: Sequence[Any] = (), **options: Any) -> None:
        self._following = Following(every, loggers, options)
        self._modules = modules
        self._waiting: dict[str, float] = {}

    @property
    def audit(self) -> Any:
        """The audit; None before training."""
        return self._following.audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to watch the optimizer that the Trainer has made."""
        self._following.start(kwargs["optimizer"], kwargs.get("model"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes an audited step's figures and asks for a log of this step."""
        report = self._following.news()
        if report is not None:
            self._waiting = figures(report, modules=self._modules)
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds them, to the history too, which has been written by now."""
        if logs is None or not self._waiting:
            return
        logs.update(self._waiting)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self._waiting)
        self._waiting = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops watching."""
        self._following.stop()


def audit_trainer(trainer: Trainer, every: int = 50, **options: Any) -> AuditCallback:
    """Audits a Trainer's training, before its own loggers (TensorBoard, wandb, the progress bar) see a log.

    Args:
        trainer: before ``train()``.
        every: steps between audited ones.
        options: of :class:`AuditCallback`.
    """
    callback = AuditCallback(every, **options)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
