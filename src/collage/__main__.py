"""`python -m collage` is the command `collage`."""

from __future__ import annotations

from collage.cli import main

if __name__ == "__main__":
    main()
