"""Optional packages: a clear error that names the extra, before the first import that would fail."""

from __future__ import annotations

from importlib.util import find_spec

from collage.train.config import UserError

EXTRAS = {
    "train": ("accelerate", "numpy", "rich", "safetensors", "tokenizers", "transformers"),
    "bench": ("rich",),
    "finetune": ("scipy", "sklearn"),
    "data": ("datasets", "pyarrow", "zstandard"),
    "report": ("jinja2", "matplotlib", "plotly", "rich"),
}
"""The packages that each extra brings, by the name they are imported with."""


def need(extra: str) -> None:
    """Raise `UserError` if a package of `extra` (a key of `EXTRAS`) is not installed."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"this command needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed; remedy: pip install 'torch-collage[{extra}]'"
        )
