"""A corpus built on disk, shard by shard; one cut off at any moment goes on to the bytes of one that never was."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from collage.train import corpusfiles
from collage.train.config import TrainConfig, UserError, option
from collage.train.corpusfiles import INDEX, SETTINGS, TOKENIZER, ShardWriter, finished_shards, update_hash
from collage.train.data import SplitBatch, choose_tokenizer, corpus_info, split_batches, text_sha256
from collage.train.hub import pinned, same_data
from collage.train.prefetch import Prefetched
from collage.train.recipes import filled
from collage.train.runfiles import write_json, write_text
from collage.train.signals import StopSignals
from collage.train.sources import Source, open_source
from collage.train.tokens import Chosen, end_token

SHARD_BYTES = 2**27
BATCHES_AHEAD = 4
PLAIN_SECONDS = 10.0

DECIDING = ("recipe", "data", "text_column", "corpus_bytes", "tokenizer", "vocab_size", "model")
"""Settings that decide what a corpus holds."""


class Interrupted(Exception):  # noqa: N818 - asked for
    """The build was asked to stop; what is finished is kept."""


@dataclass
class Counts:
    """How far a build has come: documents, tokens, UTF-8 bytes of text, and how much of the source's size was read.

    The size is in bytes of files or in rows; None: unknown.
    """

    size: int | None
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    read: int = 0


Report = Callable[[Counts], None]


def build(
    config: TrainConfig, out: Path, *, shard_bytes: int = SHARD_BYTES, report: Report = lambda counts: None
) -> dict[str, Any]:
    """Build the corpus that `config` names in the folder `out`, or go on with a build that was cut off there.

    The shards that are finished are kept; their text is read again, and must be what it was, but not tokenized. Memory
    is bounded by a batch of about a million characters, the longest document, and what a vocabulary is trained on.

    Args:
        config: the settings; those in `DECIDING` count.
        out: the folder; empty, new, or with the same build.
        shard_bytes: a shard ends with the batch that brings it to so many bytes of text.
        report: told after each batch how far it has come.

    Returns:
        The index (corpus.json).

    Raises:
        UserError: the text can't be used or has changed, or `out` holds something else.
        Interrupted: SIGINT or SIGTERM came.
    """
    if shard_bytes < 1:
        raise UserError(f"shard_bytes must be >= 1, got {shard_bytes}")
    if corpusfiles.is_corpus(config.data):
        raise UserError(f"data must be text, got {config.data}, a prepared corpus; train on it with --data")
    settings = {**{name: getattr(config, name) for name in DECIDING}, "shard_bytes": shard_bytes}
    if (out / INDEX).exists():
        index = corpusfiles.read_index(out)
        _check_settings(out, index["settings"], settings)
        _clear(out)
        return index
    source = open_source(config.data, config.text_column, config.corpus_bytes)
    _begin(out, settings)
    chosen = _tokenizer(config, source, out)
    with StopSignals() as signals, Prefetched(split_batches(source), BATCHES_AHEAD) as batches:
        build = _Build(out, chosen, shard_bytes, Counts(source.size), report)
        try:
            for batch in batches:
                build.add(batch)
                if signals.requested:
                    raise Interrupted
            return build.finish(source, settings)
        except BaseException:
            build.abandon()
            raise


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Note in `out` what is built there, or see that it is what was begun."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / SETTINGS).exists():
            return _check_settings(out, corpusfiles.read_json(out / SETTINGS)["settings"], settings)
        if any(not path.name.startswith(f".{SETTINGS}") for path in out.iterdir()):
            raise UserError(f"--out must be a new or empty folder, or one with this corpus begun, got {out}")
        write_json(out / SETTINGS, {"settings": settings})
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to, got {out}: {error.strerror}") from error


def _check_settings(out: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = sorted(stored.keys() | wanted.keys())
    changed = [name for name in names if stored.get(name) != wanted.get(name)]
    if changed:
        listed = ", ".join(f"{option(n)} {wanted.get(n)} (it has {stored.get(n)})" for n in changed)
        raise UserError(
            f"--out must hold a corpus of the same settings or none, got {out} with {listed}; give the same ones, or "
            "choose another folder"
        )


def _tokenizer(config: TrainConfig, source: Source, out: Path) -> Chosen:
    """The tokenizer, which is kept before it is first used: a build that goes on takes it from the files."""
    file, begun = out / TOKENIZER, corpusfiles.read_json(out / SETTINGS)
    if "chosen" in begun:
        kept = file.read_text(encoding="utf-8") if file.exists() else None
        return replace(choose_tokenizer(config, split_batches(source), kept), **begun["chosen"])
    chosen = choose_tokenizer(config, split_batches(source), None)
    if chosen.tokenizer is not None:
        write_text(file, chosen.tokenizer.to_str())
    write_json(out / SETTINGS, {**begun, "chosen": {"name": chosen.name, "note": chosen.note}})
    return chosen


class _Build:
    """The shards of one build, as batches come."""

    def __init__(self, out: Path, chosen: Chosen, shard_bytes: int, counts: Counts, report: Report) -> None:
        self._out, self._chosen, self._shard_bytes, self._report = out, chosen, shard_bytes, report
        self._dtype = np.dtype(np.uint16 if chosen.vocab_size <= 2**16 else np.uint32)
        self._finished = finished_shards(out)
        self._text = hashlib.sha256()
        self._counts = counts
        self._number = 0
        self._shard: ShardWriter | _Kept | None = None

    def add(self, batch: SplitBatch) -> None:
        if self._shard is None:
            kept = self._number < len(self._finished)
            entry = self._finished[self._number] if kept else None
            self._shard = _Kept(self._number, entry) if entry else ShardWriter(self._out, self._number, self._dtype)
        tokens = batch.tokens(self._chosen) if isinstance(self._shard, ShardWriter) else {}
        self._shard.add(batch.documents, tokens, end_token(self._chosen.tokenizer))
        update_hash(self._text, batch.documents)
        self._counts.documents += len(batch.documents)
        self._counts.text_bytes += sum(len(text.encode()) for text in batch.documents)
        self._counts.tokens += sum(map(len, tokens.values()))
        self._counts.read = batch.read
        if self._shard.text_bytes >= self._shard_bytes:
            self._end_shard()
        self._report(self._counts)

    def _end_shard(self) -> None:
        assert self._shard is not None
        self._shard.finish()
        if isinstance(self._shard, _Kept):
            self._counts.tokens += self._shard.tokens
        self._shard = None
        self._number += 1

    def abandon(self) -> None:
        """Remove the shard that isn't finished."""
        if isinstance(self._shard, ShardWriter):
            self._shard.abandon()

    def finish(self, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
        """Write the index."""
        if self._shard is not None:
            self._end_shard()
        shards = finished_shards(self._out)
        if len(shards) != self._number:
            raise _changed(self._number)
        totals = [sum(entry[f"{split}_tokens"] for entry in shards) for split in corpusfiles.SPLITS]
        info = corpus_info(self._chosen, source.name, self._text.hexdigest(), self._counts.documents, *totals)
        tokenizer_json = self._chosen.tokenizer.to_str() if self._chosen.tokenizer else None
        index = {
            "format": corpusfiles.FORMAT,
            "info": info.to_json(),
            "dtype": self._dtype.name,
            "settings": settings,
            "tokenizer_sha256": text_sha256(tokenizer_json),
            "shards": shards,
        }
        write_json(self._out / INDEX, index)
        _clear(self._out)
        return index


class _Kept:
    """A shard that an earlier attempt finished: its text is read again to see that it's the same."""

    def __init__(self, number: int, entry: dict[str, Any]) -> None:
        self.text_bytes = self._documents = 0
        self.tokens = entry["train_tokens"] + entry["validation_tokens"]
        self._number, self._entry, self._text = number, entry, hashlib.sha256()

    def add(self, documents: list[str], tokens: dict[str, np.ndarray], end: int) -> None:
        update_hash(self._text, documents)
        self._documents += len(documents)
        self.text_bytes += sum(len(text.encode()) for text in documents)

    def finish(self) -> None:
        if (self._documents, self._text.hexdigest()) != (self._entry["documents"], self._entry["text_sha256"]):
            raise _changed(self._number)


def _changed(shard: int) -> UserError:
    return UserError(
        f"the text must be what it was when the corpus was begun, got another one at shard {shard}; restore it, or "
        "build the corpus in another --out"
    )


def _clear(out: Path) -> None:
    """Remove what a finished corpus has no need of."""
    (out / SETTINGS).unlink(missing_ok=True)
    for name in (SETTINGS, TOKENIZER, INDEX):
        for path in out.glob(f".{name}.*"):
            path.unlink()
    for path in out.glob(".shard-*"):
        shutil.rmtree(path)


def check(out: Path) -> dict[str, Any]:
    """The index of the corpus in `out`, all of whose files have been read and are what was built.

    Raises:
        UserError: some aren't, or there is no whole corpus.
    """
    index = corpusfiles.read_index(out)
    damaged = corpusfiles.damaged_files(out, index)
    if damaged:
        raise UserError(
            f"the corpus in {out} must have the content that was built, got damage in {', '.join(damaged)}; restore "
            "these files, or build the corpus in another --out"
        )
    return index


def use_workers(count: int | None) -> None:
    """Let `tokenizers` use so many threads; None: one for each core. Counts if it comes before the first use.

    Raises:
        UserError: the number isn't positive.
    """
    if count is not None:
        if count < 1:
            raise UserError(f"workers must be >= 1, got {count}")
        os.environ["RAYON_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


# ---- the command -----------------------------------------------------------------------------------------------


def run_command(
    settings: dict[str, Any], out: Path, *, workers: int | None, shard_bytes: int, check_only: bool
) -> dict[str, Any]:
    """`collage data`: build the corpus, or check one, and say what it is.

    Returns:
        The corpus' info, with its folder, its shards, and the bytes of their files.

    Raises:
        UserError: see `build` and `check`.
        SystemExit: the build was stopped; exit code 130.
    """
    console = Console()
    if check_only:
        index = check(out)
    else:
        use_workers(workers)
        config = TrainConfig.from_json(filled(_pinned(settings, out)))
        try:
            with BuildDisplay(console) as display:
                index = build(config, out, shard_bytes=shard_bytes, report=display.report)
        except Interrupted as error:
            _say(console, f"stopped; {len(finished_shards(out))} shards are finished. The same command goes on with it")
            raise SystemExit(130) from error
    total = sum(facts["bytes"] for entry in index["shards"] for facts in entry["files"].values())
    info = {**index["info"], "out": str(out), "shards": len(index["shards"]), "bytes": total}
    _say(
        console,
        f"{out}: {'as it was built' if check_only else 'built'}, {info['documents']:,} documents of {info['name']}, "
        f"{info['train_tokens']:,} + {info['validation_tokens']:,} tokens ({info['tokenizer']}, vocabulary of "
        f"{info['vocab_size']:,}), {total / 1e6:,.1f} MB in {info['shards']} shards. Train on it with --data {out}",
    )
    return info


def _pinned(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Settings with the revision of a dataset: the one that the build in `out` began with, or the present one."""
    data = settings.get("data")
    if data is None:
        return settings
    file = next((file for name in (INDEX, SETTINGS) if (file := out / name).is_file()), None)
    stored = corpusfiles.read_json(file) if file else {}
    begun = stored.get("settings", {}).get("data")
    return {**settings, "data": begun if same_data(data, begun) else pinned(data)}


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


# ---- what is shown ---------------------------------------------------------------------------------------------


class BuildDisplay:
    """Shows how far a build is: a bar on a terminal, a line now and then elsewhere. `build` is given its `report`."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()
        self._said = self._started
        columns = (TextColumn("[bold]collage data"), BarColumn(), TextColumn("{task.fields[figures]}"))
        times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
        self._bar = Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None, figures="preparing")

    def __enter__(self) -> BuildDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def report(self, counts: Counts) -> None:
        """Show these counts."""
        now = time.monotonic()
        speed = counts.text_bytes / max(now - self._started, 1e-9)
        figures = f"{counts.documents:,} documents  {counts.tokens:,} tokens  {speed / 1e6:.1f} MB/s"
        if not self._bar.disable:
            self._bar.update(self._task, total=counts.size, completed=counts.read, figures=figures)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            _say(self._console, figures)
