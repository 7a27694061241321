"""Labelled examples: the nine GLUE tasks, as their download has them or by name, and any CSV, TSV or JSONL file."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from collage.train.config import OWN_TASK, TrainConfig, UserError
from collage.train.data import validation_documents

HUB = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")
_YES_NO = ("0", "1")


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        folder: its name in the download.
        text: the columns of its files that hold a sentence or a pair of them.
        hub_text: those columns' names on the Hugging Face hub.
        label: the column of the label.
        labels: the classes in the hub's order; none: a score is to be predicted.
        metrics: GLUE's own, the first one first in every table.
        validation: what is validated on: (a mark of its figures, file, the hub's split).
        header: the columns of files that don't name them.
    """

    folder: str
    text: tuple[str, ...]
    hub_text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: tuple[tuple[str, str, str], ...] = (("", "dev.tsv", "validation"),)
    header: tuple[str, ...] | None = None


_TWO = ("sentence1", "sentence2")
_MNLI = (
    ("", "dev_matched.tsv", "validation_matched"),
    ("_mismatched", "dev_mismatched.tsv", "validation_mismatched"),
)
_QUESTIONS, _STRINGS = ("question1", "question2"), ("#1 String", "#2 String")
_COLA = ("source", "label", "mark", "sentence")

TASKS = {
    "cola": Task("CoLA", ("sentence",), ("sentence",), "label", _YES_NO, ("matthews_correlation",), header=_COLA),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), "label", _YES_NO, ("accuracy",)),
    "mrpc": Task("MRPC", _STRINGS, _TWO, "Quality", _YES_NO, ("f1", "accuracy")),
    "stsb": Task("STS-B", _TWO, _TWO, "score", (), ("pearson", "spearman")),
    "qqp": Task("QQP", _QUESTIONS, _QUESTIONS, "is_duplicate", _YES_NO, ("f1", "accuracy")),
    "mnli": Task(
        "MNLI",
        _TWO,
        ("premise", "hypothesis"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        _MNLI,
    ),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
    "rte": Task("RTE", _TWO, _TWO, "label", ENTAILMENT, ("accuracy",)),
    "wnli": Task("WNLI", _TWO, _TWO, "label", _YES_NO, ("accuracy",)),
}
"""GLUE's tasks by the names that `datasets` has for them."""

OWN_METRICS = ("accuracy", "f1_macro")


@dataclass(frozen=True)
class Example:
    """A sentence or a pair, its label (a class's number, or a score), and the mark of its validation set."""

    text: tuple[str, ...]
    label: float
    mark: str = ""


@dataclass(frozen=True)
class Examples:
    """A labelled data set.

    Attributes:
        name: where it comes from.
        train: what is trained on.
        validation: what is validated on.
        labels: the classes; none: a score.
        metrics: names of the figures.
        left_out: rows of the files that lack a column.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    left_out: int = 0

    def sha256(self) -> str:
        """A hash of all texts and labels."""
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for part in (self.train, self.validation):
            for each in part:
                digest.update(json.dumps([each.text, each.label, each.mark]).encode())
        return digest.hexdigest()


def read_examples(config: TrainConfig) -> Examples:
    """The examples that `config` names.

    Raises:
        UserError: nothing is there, or not what the task needs.
    """
    if config.task not in TASKS:
        found = _own(config)
    elif config.data is None:
        found = _from_hub(config.task)
    else:
        found = _from_download(config.task, Path(config.data))
    for split, examples in (("train", found.train), ("validation", found.validation)):
        if not examples:
            raise UserError(f"the {split} set of {config.task} must have examples, got none in {found.name}")
    return found


# ---- GLUE's files ----------------------------------------------------------------------------------------------


def _from_download(name: str, root: Path) -> Examples:
    task = TASKS[name]
    folder = root / task.folder if (root / task.folder).is_dir() else root
    wanted = ["train.tsv", *(file for _, file, _ in task.validation)]
    missing = [file for file in wanted if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"data must be the folder of {name} as GLUE's download has it ({', '.join(wanted)}), or the one above it "
            f"({task.folder}/train.tsv), got {root}, in which {', '.join(missing)} is missing"
        )
    columns = (*task.text, task.label)
    train, short = _whole(_rows(folder / "train.tsv", task.header), columns, folder / "train.tsv")
    held_out: list[Example] = []
    for mark, file, _ in task.validation:
        rows, more = _whole(_rows(folder / file, task.header), columns, folder / file)
        short += more
        held_out += _examples(rows, task.text, task.label, task.labels, folder / file, mark)
    made = _examples(train, task.text, task.label, task.labels, folder / "train.tsv")
    return Examples(folder.name, made, held_out, task.labels, task.metrics, short)


def _rows(path: Path, header: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV or JSONL file, by column."""
    try:
        # MRPC's files begin with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                return [_record(json.loads(line), path) for line in file if line.strip()]
            if path.suffix == ".csv":
                return list(csv.DictReader(file, header))
            return list(csv.DictReader(file, header, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data must be readable as {path.suffix.lstrip('.').upper()}, got {path}: {error}") from error


def _record(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"each line of {path} must be a JSON object, got a {type(value).__name__}")
    return value


def _whole(rows: list[dict[str, Any]], columns: Sequence[str], path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows that have all columns, and how many don't: QQP's files have some."""
    if rows and not set(columns) <= set(rows[0]):
        lacking = ", ".join(column for column in columns if column not in rows[0])
        raise UserError(
            f"{path} must have the columns {', '.join(columns)}, got {', '.join(map(str, rows[0]))}, without {lacking}"
        )
    kept = [row for row in rows if all(row.get(column) is not None for column in columns)]
    return kept, len(rows) - len(kept)


def _examples(
    rows: Iterable[Mapping[str, Any]],
    text: Sequence[str],
    label: str,
    labels: Sequence[str],
    path: object,
    mark: str = "",
) -> list[Example]:
    numbers = {name: float(number) for number, name in enumerate(labels)}
    found = []
    for row in rows:
        value = str(row[label])
        try:
            number = numbers[value] if labels else float(value)
        except (KeyError, ValueError) as error:
            allowed = f"one of {', '.join(labels)}" if labels else "a number"
            raise UserError(f"the label in column {label} of {path} must be {allowed}, got {value!r}") from error
        found.append(Example(tuple(str(row[column]) for column in text), number, mark))
    return found


# ---- by name ---------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> Examples:
    if find_spec("datasets") is None:
        raise UserError(
            f"without --data the task {name} is loaded by the package datasets, which is not installed; install it, or "
            "name GLUE's folder with --data"
        )
    import datasets

    task = TASKS[name]
    try:
        loaded: Any = datasets.load_dataset(HUB, name)
    except Exception as error:  # of whichever client is at work
        raise UserError(f"{HUB} {name} can't be loaded: {error}; name GLUE's folder with --data") from error

    def part(split: str, mark: str = "") -> list[Example]:
        return [Example(tuple(row[c] for c in task.hub_text), float(row["label"]), mark) for row in loaded[split]]

    held_out = [example for mark, _, split in task.validation for example in part(split, mark)]
    return Examples(f"{HUB} {name}", part("train"), held_out, task.labels, task.metrics)


# ---- a file of one's own ---------------------------------------------------------------------------------------

_KINDS = (".csv", ".tsv", ".jsonl")
_HELD_OUT = ("validation", "dev", "valid")


def _own(config: TrainConfig) -> Examples:
    if config.data is None:
        raise UserError(
            f"task {OWN_TASK} needs --data, a CSV, TSV or JSONL file, or a folder with train and validation ones"
        )
    path = Path(config.data)
    if path.is_dir():
        train, held_out = _pair_of_files(path)
        rows, others = _rows(train), _rows(held_out)
    elif path.suffix in _KINDS and path.is_file():
        train = held_out = path
        whole = _rows(path)
        if len(whole) < 2:
            raise UserError(f"data must have at least 2 examples (one to validate on), got {len(whole)} in {path}")
        out = validation_documents(len(whole))
        rows = [row for row, left in zip(whole, out, strict=True) if not left]
        others = [row for row, left in zip(whole, out, strict=True) if left]
    else:
        raise UserError(f"data must be a {', '.join(_KINDS)} file or a folder with such files, got {path}")
    text = _text_columns(config, rows, train)
    columns = (*text, config.label_column)
    (rows, short), (others, more) = _whole(rows, columns, train), _whole(others, columns, held_out)
    labels = _classes(str(row[config.label_column]) for row in rows)
    examples = (
        _examples(part, text, config.label_column, labels, file) for part, file in ((rows, train), (others, held_out))
    )
    return Examples(path.name, *examples, labels=labels, metrics=OWN_METRICS, left_out=short + more)


def _pair_of_files(folder: Path) -> tuple[Path, Path]:
    for kind in _KINDS:
        train = folder / f"train{kind}"
        others = [folder / f"{name}{kind}" for name in _HELD_OUT if (folder / f"{name}{kind}").is_file()]
        if train.is_file() and others:
            return train, others[0]
    raise UserError(
        f"data must be a folder with train and validation (or dev, valid) files of one kind, {', '.join(_KINDS)}, got "
        f"{folder} with {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing in it'}"
    )


def _text_columns(config: TrainConfig, rows: list[dict[str, Any]], path: Path) -> tuple[str, ...]:
    if config.text_columns is not None:
        return tuple(name.strip() for name in config.text_columns.split(","))
    have = set(rows[0]) if rows else set()
    for guess in (_TWO, ("sentence",), ("text",)):
        if set(guess) <= have:
            return guess
    raise UserError(
        f"{path} must have a column text or sentence, or sentence1 and sentence2, got {', '.join(map(str, have))}; "
        "name yours with --text-columns"
    )


def _classes(values: Iterable[str]) -> tuple[str, ...]:
    """The labels in order: as numbers if all are whole numbers."""
    found = set(values)
    if len(found) < 2:
        raise UserError(f"the train set must have examples of at least 2 labels, got {', '.join(found) or 'none'}")
    return tuple(sorted(found, key=int if all(value.lstrip("-").isdecimal() for value in found) else str))


# ---- metrics ---------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Figures of predictions (classes' numbers, or scores), by scikit-learn and SciPy; NaN where one is not defined."""
    return {name: _figure(name, np.asarray(predicted), np.asarray(labels)) for name in names}


def _figure(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy import stats
    from sklearn import metrics

    if name in ("pearson", "spearman"):
        if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
            return float("nan")
        found: Any = (stats.pearsonr if name == "pearson" else stats.spearmanr)(predicted, labels)
        return float(found.statistic)
    if name == "accuracy":
        return float(metrics.accuracy_score(labels, predicted))
    if name == "matthews_correlation":
        return float(metrics.matthews_corrcoef(labels, predicted))
    average: Any = "macro" if name == "f1_macro" else "binary"
    return float(metrics.f1_score(labels, predicted, average=average, zero_division=0))  # pyright: ignore
