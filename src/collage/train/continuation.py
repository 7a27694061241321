"""Runs that continue from a checkpoint of another run, whatever the strategies of the two.

The checkpoint is brought to float32, which is exact, and from there into the strategy: weights, both moments and each
parameter's step count, so that the bias corrections go on where they were. The continued run's own steps count from 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import collage
from collage.train import checkpoints
from collage.train.checkpoints import CheckpointError
from collage.train.config import EXECUTING, TrainConfig, UserError, option, unknown_settings
from collage.train.data import Corpus, CorpusInfo, prepare_corpus
from collage.train.recipes import filled, recipe
from collage.train.runfiles import read_run

STEPS, SLOWER = 250, 10.0
"""Unless said otherwise, the steps of a continuation, and what divides the source's lr for its lr, that for min_lr."""

INHERITED = ("model", "dtype", "betas", "eps", "weight_decay", "clip", "batch_size", "seq_len", "micro_batch")
INHERITED += ("grad_dtype", "reduce_dtype", "data", "text_column", "stream", "corpus_bytes", "tokenizer", "vocab_size")
INHERITED += ("eval_batches",)
"""Settings that are the source run's unless said otherwise."""

FIXED = ("model", "tokenizer", "vocab_size")
"""Settings that the checkpoint's tensors fix."""

_TEXT = ("data", "text_column", "stream", "corpus_bytes")

_REMEDY = "take another checkpoint"


# ---- the checkpoint --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint to continue from.

    Attributes:
        path: its folder, absolute.
        step: the optimizer steps it had come.
        config: the settings of its run, but for where that was executed.
        vocab_size: tokens that its model knows.
        saved: its tensors and parameter groups.
    """

    path: Path
    step: int
    config: TrainConfig
    vocab_size: int
    saved: checkpoints.Saved

    @property
    def folders(self) -> list[Path]:
        """Where to look for what the source run left: the checkpoint, and the run's folder if it stands in one."""
        return [self.path, self.path.parent.parent] if self.path.parent.name == "checkpoints" else [self.path]

    @property
    def run(self) -> dict[str, Any] | None:
        """The run.json of its run; None where the checkpoint doesn't stand in a run's folder."""
        found = [folder for folder in self.folders if (folder / "run.json").is_file()]
        return read_run(found[0]) if found else None


def find(path: Path) -> Path:
    """The absolute folder of the checkpoint that `path` names: itself, or the newest whole one of the run in `path`.

    Raises:
        UserError: there is none.
    """
    if path.is_dir() and not checkpoints.missing_files(path):
        return path.resolve()
    newest = checkpoints.latest(path / "checkpoints")
    if newest is not None:
        return newest.resolve()
    raise UserError(
        "--from must be a folder that `collage train` wrote, a checkpoint (RUN/checkpoints/step-000300) or a run "
        f"(RUN) with one, got {path}, {_shortcoming(path)}"
    )


def _shortcoming(path: Path) -> str:
    if not path.exists():
        return "which doesn't exist"
    if not path.is_dir():
        return "which is a file"
    if (path / "compare.json").exists():
        runs = ", ".join(sorted(file.parent.name for file in path.glob("*/run.json")))
        return f"a comparison; name one of its runs: {runs or 'there is none'}"
    if (path / "run.json").exists():
        return f"a run without a whole checkpoint; go on with it until it has one: collage train --out {path} --resume"
    missing = checkpoints.missing_files(path)
    if len(missing) < len(checkpoints.FILES):
        return f"in which {', '.join(missing)} is missing; {_REMEDY}"
    return "which is neither"


def read(path: Path) -> Source:
    """The checkpoint in the folder `path`.

    Raises:
        CheckpointError: a file can't be read, or its settings are none of this version.
    """
    try:
        saved = checkpoints.read(path, _REMEDY)
        vocab_size = checkpoints.read_json(path / "config.json", _REMEDY)["vocab_size"]
        settings = {name: value for name, value in saved.trainer["config"].items() if name not in EXECUTING}
        return Source(path, saved.trainer["step"], TrainConfig.from_json(settings), vocab_size, saved)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no checkpoint that this version can use: {error!r}; {_REMEDY}") from error


# ---- settings --------------------------------------------------------------------------------------------------


def continued(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run: `given`, and for those left out what the recipe has that they name, if they name one.

    If they name a checkpoint, a recipe's settings but for model and text, then what a continuation has.

    Raises:
        UserError: the checkpoint can't be used, or `given` contradicts it.
    """
    unknown_settings(given)
    if given.get("from_checkpoint") is None:
        return filled(given)
    source = read(find(Path(given["from_checkpoint"])))
    name = given.get("recipe")
    check_fixed(source, given if name is None else {"model": recipe(name).model, **given})
    inherited = {name: getattr(source.config, name) for name in INHERITED}
    if given.get("data", source.config.data) != source.config.data:
        inherited["corpus_bytes"] = None  # the bound was one on the other text
    lr = given.get("lr", source.config.lr / SLOWER)
    own: dict[str, Any] = {"steps": STEPS, "schedule": "cosine", "warmup": 0, "lr": lr}
    if isinstance(lr, (int, float)):
        own["min_lr"] = lr / SLOWER
    if name is not None:
        own = {key: value for key, value in filled(given).items() if key not in (*FIXED, *_TEXT)}
    return {**inherited, **own, **given, "from_checkpoint": str(source.path)}


def check_fixed(source: Source, given: Mapping[str, Any]) -> None:
    """Raise `UserError` if `given` has another model or another vocabulary than the checkpoint."""
    own = {name: getattr(source.config, name) for name in FIXED}
    allowed = {name: [value] for name, value in own.items()}
    allowed["vocab_size"] += [None, source.vocab_size]
    changed = [name for name in FIXED if name in given and given[name] not in allowed[name]]
    if changed:
        own["vocab_size"] = source.vocab_size
        listed = "; ".join(f"{option(name)} {given[name]} (the checkpoint has {own[name]})" for name in changed)
        raise UserError(
            f"a run that continues from a checkpoint keeps its model and its vocabulary, got {listed}; leave the "
            f"options out, or choose another checkpoint than {source.path}"
        )


# ---- text and batches ------------------------------------------------------------------------------------------


def tokenizer_json(config: TrainConfig, *folders: Path) -> str | None:
    """The tokenizer that a run left in the first of `folders` that has one; None for bytes.

    Raises:
        UserError: none has one.
    """
    if config.tokenizer == "bytes":
        return None
    found = [file for folder in folders if (file := folder / "tokenizer.json").is_file()]
    if not found:
        raise UserError(
            f"the run's {config.tokenizer} tokenizer must stand in {' or '.join(map(str, folders))} as tokenizer.json, "
            "got none; copy the file of that name from the source run's folder"
        )
    return found[0].read_text(encoding="utf-8")


def with_tokenizer(info: CorpusInfo, run: Mapping[str, Any]) -> CorpusInfo:
    """`info` with what the run says of the tokenizer that is its own: it may not be the one that was asked for."""
    said = run["corpus"]
    return replace(info, tokenizer=said["tokenizer"], tokenizer_note=said.get("tokenizer_note"))


def continued_text(config: TrainConfig) -> Corpus:
    """The text that `config` names, with the tokenizer of the checkpoint it continues from.

    Raises:
        UserError: no tokenizer or no text is there, or the source run's text is no longer what it was.
    """
    source = read(find(Path(str(config.from_checkpoint))))
    text = prepare_corpus(config, tokenizer_json(source.config, *source.folders))
    if text.info.vocab_size != source.vocab_size:
        raise UserError(
            f"the tokenizer must have the {source.vocab_size} tokens of the model in {source.path}, got "
            f"{text.info.vocab_size}; copy tokenizer.json from that run's folder"
        )
    if source.run is not None:
        text = replace(text, info=with_tokenizer(text.info, source.run))
    if (config.data, config.corpus_bytes) == (source.config.data, source.config.corpus_bytes):
        _check_same_text(source, text)
    return text


def _check_same_text(source: Source, text: Corpus) -> None:
    """Raise `UserError` unless `text`, which is to be the source run's, is known to be."""
    run = source.run
    if run is None:
        raise UserError(
            f"the text of the source run is known by the hash in its run.json, got none in "
            f"{' or '.join(map(str, source.folders))}; leave the checkpoint in its run's folder, or name another text "
            "with --data"
        )
    if run["corpus"]["sha256"] != text.info.sha256:
        raise UserError(
            f"the text {text.info.name!r} must be as it was for the source run, sha256 {run['corpus']['sha256'][:12]}, "
            f"got {text.info.sha256[:12]}; restore it (the standard library's sources change with Python's; that run "
            f"had {run['versions']}), or name another file or folder with --data"
        )


def order_seed(sha256: str, seed: int) -> int:
    """The seed of a continued run's batches: the first 63 bits of SHA-256 over "SHA256 SEED".

    It depends on where the run starts (`Start.sha256`), so that neither the source run nor a run that this one is
    continued by visits its windows in the same order.
    """
    return int.from_bytes(hashlib.sha256(f"{sha256} {seed}".encode()).digest()[:8], "big") >> 1


# ---- the start -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a continued run starts.

    Attributes:
        source: the checkpoint, its run's name, settings, and the hash.
        conversion: per logical tensor the largest error of the conversion, as a share of its largest magnitude.
        sha256: a hash of the float32 values: weights, moments and step counts. Whatever the strategy, runs that start
            from one checkpoint have the same.
        scaler: the loss scaler's state; empty where the source run had none.
    """

    source: dict[str, Any]
    conversion: dict[str, float]
    sha256: str
    scaler: dict[str, Any]


def start(config: TrainConfig, model: torch.nn.Module, optimizer: collage.AdamW) -> Start:
    """Put the checkpoint that `config` names into a model and an optimizer of its strategy.

    Args:
        config: the run's settings.
        model: of the architecture and dtype of the run; its weights are overwritten.
        optimizer: on the model's named parameters; its options stay, its state is overwritten.

    Raises:
        UserError: the settings contradict the checkpoint.
        CheckpointError: the checkpoint doesn't fit.
    """
    source = read(find(Path(str(config.from_checkpoint))))
    check_fixed(source, config.to_json())
    own = optimizer.state_dict()["param_groups"]
    try:
        names, keys = _names(own), [key for group in own for key in group["params"]]
        _check_names(names, _names(source.saved.optimizer["param_groups"]))
        weights = checkpoints.with_tied(model, source.saved.weights)
        full = collage.convert.to_fp32(weights, source.saved.optimizer, names=names)
        assert full.optimizer is not None
        sha256 = values_sha256(full, names)
        low = collage.convert.from_fp32(
            full.model,
            full.optimizer,
            strategy=config.strategy,
            dtype=getattr(torch, config.dtype),
            seed=config.seed,
            names=names,
            like=model.state_dict(),
        )
        assert low.optimizer is not None
        checkpoints.load_weights(model, low.model)
        theirs = [key for group in low.optimizer["param_groups"] for key in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        state = {
            key: {name: checkpoints.placed_like(value, param) for name, value in low.optimizer["state"][their].items()}
            for key, their, param in zip(keys, theirs, params, strict=True)
        }
        optimizer.load_state_dict({"state": state, "param_groups": own})
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        said = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{source.path} doesn't fit the model {config.model}: {said}; {_REMEDY}") from error
    return Start(_facts(source, sha256), low.worst, sha256, source.saved.trainer.get("scaler") or {})


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["param_names"]]


def _check_names(own: list[str], theirs: list[str]) -> None:
    if own != theirs:
        different = sorted(set(own) ^ set(theirs)) or ["their order"]
        raise ValueError(f"the optimizers' parameters differ in {', '.join(different[:3])}")


def _facts(source: Source, sha256: str) -> dict[str, Any]:
    config, run = source.config, source.run
    return {
        "checkpoint": str(source.path),
        "run": None if run is None else run["name"],
        "step": source.step,
        "strategy": config.strategy,
        "dtype": str(config.model_dtype).removeprefix("torch."),
        "arithmetic": config.arithmetic,
        "seed": config.seed,
        "lr": config.lr,
        "sha256": sha256,
    }


def values_sha256(full: collage.convert.Conversion, names: Sequence[str]) -> str:
    """A hash of a float32 checkpoint's weights, moments and step counts, bit for bit."""
    assert full.optimizer is not None
    keys = [key for group in full.optimizer["param_groups"] for key in group["params"]]
    digest = hashlib.sha256()
    for name, key in zip(names, keys, strict=True):
        entry = {"param": full.model[name], **full.optimizer["state"].get(key, {})}
        for role, tensor in sorted(entry.items()):
            digest.update(f"{name} {role} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
