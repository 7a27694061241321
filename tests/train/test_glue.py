"""Labelled examples, from small files in the formats of GLUE's download, and of one's own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collage.train.config import GLUE, OWN_TASK, TrainConfig, UserError
from collage.train.glue import OWN_METRICS, TASKS, Example, measure, read_examples

CONFIG = TrainConfig(model="bert", task="cola", pretrained="somewhere")

# For each task the header of its files (none: they have none), a row, and what it says.
FILES: dict[str, tuple[str, str, Example]] = {
    "cola": ("", "gj04\t1\t\tA sentence.", Example(("A sentence.",), 1.0)),
    "sst2": ("sentence\tlabel", 'a "fine film \t0', Example(('a "fine film ',), 0.0)),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t7\t8\tOne.\tTwo.",
        Example(("One.", "Two."), 1.0),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tfile\t2012\t1\tnone\tnone\tOne.\tTwo.\t3.250",
        Example(("One.", "Two."), 3.25),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tWhy?\tHow?\t1",
        Example(("Why?", "How?"), 1.0),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t(\t(\t(\t(\tOne.\tTwo.\tentailment\tneutral",
        Example(("One.", "Two."), 1.0),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\tWhat?\tThat.\tnot_entailment",
        Example(("What?", "That."), 1.0),
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tOne.\tTwo.\tentailment", Example(("One.", "Two."), 0.0)),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tOne.\tTwo.\t1", Example(("One.", "Two."), 1.0)),
}


def write(folder: Path, task: str, rows: int = 2, mark: str = "") -> Path:
    """The files of a task, with a byte order mark as MRPC's have."""
    folder.mkdir(parents=True, exist_ok=True)
    header, row, _ = FILES[task]
    text = mark + "".join(f"{line}\n" for line in [*([header] if header else []), *[row] * rows])
    for file in ("train.tsv", *(file for _, file, _ in TASKS[task].validation)):
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def read(task: str, data: Path | None, **settings: Any) -> Any:
    return read_examples(replace(CONFIG, task=task, data=None if data is None else str(data), **settings))


def test_the_tasks_are_glues_nine() -> None:
    assert tuple(TASKS) == GLUE == tuple(FILES)


@pytest.mark.parametrize("task", GLUE)
def test_a_tasks_files_are_read_as_the_download_has_them(task: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "own", tmp_path / "all" / TASKS[task].folder):
        write(folder, task, mark="\ufeff" if task == "mrpc" else "")
    for data in (tmp_path / "own", tmp_path / "all"):
        found = read(task, data)
        assert found.train == [FILES[task][2]] * 2
        assert [replace(example, mark="") for example in found.validation] == [FILES[task][2]] * 2 * len(
            TASKS[task].validation
        )
        assert found.metrics == TASKS[task].metrics


def test_mnli_is_validated_on_both_sets(tmp_path: Path) -> None:
    found = read("mnli", write(tmp_path, "mnli", rows=3))
    assert [example.mark for example in found.validation] == [""] * 3 + ["_mismatched"] * 3


def test_rows_of_qqp_that_lack_a_column_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "qqp")
    with (tmp_path / "train.tsv").open("a") as file:
        file.write("9\t1\t2\tOnly one question\n")
    found = read("qqp", tmp_path)
    assert (len(found.train), found.left_out) == (2, 1)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("sst2", lambda folder: (folder / "dev.tsv").unlink(), r"SST-2/train.tsv.*in which dev.tsv is missing"),
        (
            "sst2",
            lambda folder: (folder / "train.tsv").write_text("text\tlabel\na\t0\n"),
            "must have the columns sentence, label, got text, label, without sentence",
        ),
        (
            "rte",
            lambda folder: (folder / "train.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tmaybe\n"),
            "column label of .*train.tsv must be one of entailment, not_entailment, got 'maybe'",
        ),
        (
            "stsb",
            lambda folder: (folder / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\thigh\n"),
            "must be a number, got 'high'",
        ),
        (
            "wnli",
            lambda folder: (folder / "train.tsv").write_text("sentence1\tsentence2\tlabel\n"),
            "train set of wnli must have examples, got none",
        ),
    ],
)
def test_files_that_are_not_the_tasks_are_refused(tmp_path: Path, task: str, change: Any, message: str) -> None:
    change(write(tmp_path, task))
    with pytest.raises(UserError, match=message):
        read(task, tmp_path)


# ---- files of one's own ----


def test_one_file_is_split_and_two_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [("text", "label")] + [(f"text, {n}", ("bad", "good")[n % 2]) for n in range(40)]
    file = tmp_path / "all.csv"
    file.write_text("".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")
    found = read(OWN_TASK, file)
    assert len(found.train) + len(found.validation) == 40
    assert 1 <= len(found.validation) < 10
    assert found.labels == ("bad", "good")
    assert found.metrics == OWN_METRICS
    assert {example.label for example in found.train if example.text[0].endswith(("1", "3"))} == {1.0}

    folder = tmp_path / "two"
    folder.mkdir()
    for name, count in (("train", 5), ("dev", 3)):
        records = [{"sentence1": "a", "sentence2": str(n), "label": n % 2 + 9} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read(OWN_TASK, folder)
    assert (len(found.train), len(found.validation)) == (5, 3)
    assert found.labels == ("9", "10")
    assert found.train[1] == Example(("a", "1"), 1.0)


def test_columns_of_ones_own_are_named(tmp_path: Path) -> None:
    file = tmp_path / "all.tsv"
    file.write_text("question\tanswer\tkind\n" + "a\tb\tx\nc\td\ty\n" * 10)
    found = read(OWN_TASK, file, text_columns="question, answer", label_column="kind")
    assert set(found.train) == {Example(("a", "b"), 0.0), Example(("c", "d"), 1.0)}
    with pytest.raises(UserError, match=r"must have a column text or sentence.*--text-columns"):
        read(OWN_TASK, file)


def test_the_hash_follows_every_text_and_label(tmp_path: Path) -> None:
    first = read("rte", write(tmp_path, "rte"))
    (tmp_path / "dev.tsv").write_text((tmp_path / "dev.tsv").read_text().replace("Two.", "Too."))
    assert read("rte", tmp_path).sha256() != first.sha256()


# ---- metrics ----


def test_metrics_are_the_known_figures() -> None:
    predicted, labels = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]  # 2 true positives, 1 false one, 1 missed, 2 negatives
    found = measure(["accuracy", "f1", "matthews_correlation", "f1_macro"], predicted, labels)
    expected = {"accuracy": 4 / 6, "f1": 4 / 6, "matthews_correlation": 3 / 9, "f1_macro": 4 / 6}
    assert found == pytest.approx(expected)
    found = measure(["pearson", "spearman"], [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert found == pytest.approx({"pearson": 3 / math.sqrt(14 / 3 * 2), "spearman": 1.0})


def test_a_figure_that_is_not_defined_is_no_number_and_no_warning() -> None:
    assert all(math.isnan(value) for value in measure(["pearson", "spearman"], [2.0, 2.0], [1.0, 3.0]).values())
    assert measure(["f1", "matthews_correlation"], [0, 0], [1, 1]) == {"f1": 0.0, "matthews_correlation": 0.0}
