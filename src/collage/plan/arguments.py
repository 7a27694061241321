"""Command-line options that name a model, for every command that takes one by name, by file or by its shape."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL = "Model"

Model = Annotated[
    str | None,
    typer.Option(
        help="A model that `collage train` knows, or a configuration of transformers: config.json or its folder. "
        "Or leave it out and give --hidden, --layers, --heads and --vocab.",
        rich_help_panel=MODEL,
    ),
]
Hidden = Annotated[int | None, typer.Option(help="Width of the model.", rich_help_panel=MODEL)]
Layers = Annotated[int | None, typer.Option(help="Blocks.", rich_help_panel=MODEL)]
Heads = Annotated[int | None, typer.Option(help="Attention heads.", rich_help_panel=MODEL)]
Vocab = Annotated[
    int | None,
    typer.Option(help="Tokens of the vocabulary; of a named model its own if unset.", rich_help_panel=MODEL),
]
KvHeads = Annotated[
    int | None, typer.Option(help="Heads of keys and values (llama). Unset: --heads.", rich_help_panel=MODEL)
]
Intermediate = Annotated[
    int | None,
    typer.Option(help="Width of the feed-forward layers. Unset: as usual in the family.", rich_help_panel=MODEL),
]
Family = Annotated[str | None, typer.Option(help="gpt, llama or bert. Unset: gpt.", rich_help_panel=MODEL)]
Seq = Annotated[
    int | None,
    typer.Option(help="Tokens of a sequence. Unset: 2048, of BERT and its kin 512.", rich_help_panel=MODEL),
]
