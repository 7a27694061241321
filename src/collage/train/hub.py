"""Hugging Face datasets by name, read through the library `datasets`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collage.train.config import UserError
from collage.train.extras import need
from collage.train.text import Documents, checked_text, missing_column

PREFIX = "hf:"
ALIASES = {
    "c4": "hf:allenai/c4:en",
    "openwebtext": "hf:Skylion007/openwebtext",
    "wikipedia": "hf:wikimedia/wikipedia:20231101.en",
    "wikitext": "hf:Salesforce/wikitext:wikitext-103-raw-v1",
}
"""Short names and the datasets they stand for."""

PATIENCE_SECONDS = 10.0
_PARQUET_BRANCH = "refs/convert/parquet"
_TITLE = re.compile(r" = [^=\s].* = \n")


@dataclass(frozen=True)
class HubName:
    """What names a dataset: "hf:REPOSITORY[@REVISION][:CONFIG[:SPLIT]]"; the split is "train" unless said otherwise.

    The repository may be a local folder in the same layout.
    """

    repository: str
    revision: str | None
    config: str | None
    split: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        tail = f":{self.config or ''}:{self.split}" if self.split != "train" else f":{self.config}" * bool(self.config)
        return f"{PREFIX}{self.repository}{revision}{tail}"

    @property
    def local(self) -> bool:
        """Whether the repository is a folder on this machine."""
        return Path(self.repository).is_dir()


def hub_name(data: str | None) -> HubName | None:
    """The dataset that `data` names, or None where it names none.

    Raises:
        UserError: it begins as a name does and is none.
    """
    full = ALIASES.get(data or "", data or "")
    if not full.startswith(PREFIX):
        return None
    match = re.fullmatch(r"([^:@]+)(?:@([^:]+))?(?::([^:]*))?(?::([^:]+))?", full.removeprefix(PREFIX))
    if match is None:
        raise UserError(f"data must be hf:REPOSITORY[@REVISION][:CONFIG[:SPLIT]], got {data!r}")
    repository, revision, config, split = match.groups()
    name = HubName(repository, revision, config or None, split or "train")
    if not name.local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise UserError(f"data must name a dataset of the hub or a local folder, got {repository!r}, which is neither")
    return name


def pinned(data: str) -> str:
    """`data` with the dataset's present revision where it names a dataset of the hub and none, so that it stays.

    Raises:
        UserError: the hub or the dataset can't be reached.
    """
    name = hub_name(data)
    if name is None or name.local or name.revision:
        return data
    revision = _reached(name)
    return data if revision is None else str(replace(name, revision=revision))


def _reached(name: HubName) -> str | None:
    """The revision that the hub has for the name; None where the library is told to stay off the hub."""
    need("data")
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return None
    try:
        return HfApi().dataset_info(name.repository, revision=name.revision, timeout=PATIENCE_SECONDS).sha
    except Exception as error:  # whatever the transport below it raises
        raise UserError(
            f"the dataset {name.repository} must be reachable, got {_first_line(error)}; check the name and the "
            "network, give a local file or folder as --data, or, where the dataset was downloaded before, set "
            "HF_HUB_OFFLINE=1"
        ) from error


def same_data(wanted: str | None, stored: str | None) -> bool:
    """Whether `wanted` names the text that `stored`, which may have been pinned since, names."""
    ours, theirs = hub_name(wanted), hub_name(stored)
    if ours is None or theirs is None:
        return wanted == stored
    return ours == (theirs if ours.revision else replace(theirs, revision=None))


def load(name: HubName, *, streaming: bool) -> Any:
    """The `datasets.Dataset`, or with `streaming` the `datasets.IterableDataset`.

    Raises:
        UserError: it can't be loaded.
    """
    need("data")
    if not name.local:
        _reached(name)  # the library itself would try for half a minute
    import datasets
    from datasets.exceptions import DatasetsError

    arguments = {"name": name.config, "split": name.split, "revision": name.revision, "streaming": streaming}
    # The library tells on its log what the error below says.
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(name.repository, **arguments)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"the dataset must hold data files, got {name.repository}, which is a program that datasets no longer "
            f"runs; take the hub's own copy: --data {replace(name, revision=_PARQUET_BRANCH, config=None)}"
        ) from error
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"data can't be loaded from {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def rows(name: HubName, dataset: Any, column: str) -> Documents:
    """The text in `column` of each row, with the rows read; blank ones are left out.

    WikiText's rows are lines; they are joined to articles.
    """
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise missing_column(column, list(columns), str(name))
    chosen = dataset.select_columns([column]) if columns is not None else dataset
    texts = _texts(name, chosen, column)
    if name.repository == "Salesforce/wikitext":
        texts = articles(texts)
    return ((text, row) for text, row in texts if text.strip())


def _texts(name: HubName, dataset: Any, column: str) -> Documents:
    for row, example in enumerate(dataset, start=1):
        yield checked_text(example.get(column), column, f"row {row} of {name}"), row


def articles(lines: Documents) -> Documents:
    """WikiText's lines joined to articles; a line " = Title = " begins one."""
    article: list[str] = []
    row = 0
    for line, row in lines:
        if _TITLE.fullmatch(line) and article:
            yield "".join(article), row - 1
            article = []
        article.append(line)
    if article:
        yield "".join(article), row


def parts(dataset: Any) -> Iterator[Any]:
    """A streamed dataset's files, each a dataset of its own."""
    count = dataset.num_shards
    return (dataset.shard(num_shards=count, index=index) for index in range(count))
