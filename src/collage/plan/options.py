"""What the options of `collage plan` mean: sizes of memory, the model, the settings."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import collage
from collage.plan.memory import Settings
from collage.plan.models import SEQ, SHORT_SEQ, Shape, Subject, from_file, from_shape, named
from collage.train.config import DTYPES, GRAD_DTYPES, UserError, option
from collage.train.models import MODELS
from collage.train.products import NATIVE, WIDENED

UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
REDUCE_DTYPES = ("bfloat16", "float16", "float32")
ATTENTIONS = ("sdpa", "eager")
PRODUCTS = {"native": NATIVE, "float32": WIDENED}


def parse_memory(text: str) -> int:
    """Bytes of `80GB` (10^9 each) or `80GiB` (2^30 each).

    Raises:
        UserError: it is neither a number nor one with a unit, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if not found or found[2] not in UNITS or float(found[1]) == 0:
        units = ", ".join(unit for unit in UNITS if unit)
        raise UserError(f"--memory must be a number > 0 with a unit of {units}, such as 80GB, got {text!r}")
    return round(float(found[1]) * UNITS[found[2]])


def subject(model: str | None, shape: dict[str, int | str | None], seq: int | None) -> Subject:
    """The model that is named, that stands in a file, or that has the shape.

    Args:
        model: a name, or the path of a config.json or its folder.
        shape: the fields of `Shape` that were given; others are None.
        seq: tokens of a sequence; None: as usual for the model.

    Raises:
        UserError: none is given, or two, or it can't be made.
    """
    if seq is not None and seq < 1:
        raise UserError(f"--seq must be >= 1, got {seq}")
    given = {name: value for name, value in shape.items() if value is not None}
    if model is None:
        needed = ("hidden", "layers", "heads", "vocab")
        if missing := [name for name in needed if name not in given]:
            raise UserError(
                f"a model must be given: --model NAME ({', '.join(MODELS)}), --model CONFIG_FILE, or --hidden, "
                f"--layers, --heads and --vocab; missing: {', '.join(f'--{name}' for name in missing)}"
            )
        described = Shape(**given)  # pyright: ignore[reportArgumentType] - Typer gives each its type
        return from_shape(described, seq or (SHORT_SEQ if described.family == "bert" else SEQ))
    path = Path(model)
    a_file = model not in MODELS and (path.exists() or "/" in model or path.suffix == ".json")
    vocab = given.pop("vocab", None) if not a_file else None
    if given:
        listed = ", ".join(option(name) for name in given)
        raise UserError(f"--model {model} has a shape already, got {listed} as well; leave one of them out")
    if a_file:
        return from_file(path, seq)
    if vocab is not None and int(vocab) < 1:
        raise UserError(f"--vocab must be >= 1, got {vocab}")
    positions = MODELS[model].positions if model in MODELS else None
    return named(model, seq or positions or SEQ, None if vocab is None else int(vocab))


def settings(
    *,
    shards: int,
    micro_batch: int,
    dtype: str,
    grad_dtype: str,
    reduce_dtype: str | None,
    accumulate: bool,
    attention: str,
    products: str,
) -> Settings:
    """How the model is trained.

    Raises:
        UserError: an option that can't be followed.
    """
    if shards < 1:
        raise UserError(f"--shards must be >= 1, got {shards}")
    check_micro_batch(micro_batch)
    check_attention(attention)
    choices = {
        "--dtype": (dtype, DTYPES),
        "--grad-dtype": (grad_dtype, GRAD_DTYPES),
        "--products": (products, tuple(PRODUCTS)),
    }
    if reduce_dtype is not None:
        choices["--reduce-dtype"] = (reduce_dtype, REDUCE_DTYPES)
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return Settings(
        shards=shards,
        micro_batch=micro_batch,
        dtype=getattr(torch, dtype),
        gradient=grad_dtype,
        reduce=None if reduce_dtype is None else getattr(torch, reduce_dtype),
        accumulates=accumulate,
        attention=attention,
        products=PRODUCTS[products],
    )


def check_strategy(name: str) -> str:
    """The name of a strategy.

    Raises:
        UserError: there is none of that name.
    """
    if name not in collage.strategies():
        raise UserError(f"--strategy must be one of {', '.join(collage.strategies())}, got {name!r}")
    return name


def check_micro_batch(value: int) -> None:
    """Raises `UserError` unless it is a micro-batch."""
    if value < 1:
        raise UserError(f"--micro-batch must be >= 1, got {value}")


def check_attention(name: str) -> str:
    """The name of an attention.

    Raises:
        UserError: there is none of that name.
    """
    if name not in ATTENTIONS:
        raise UserError(f"--attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    return name
