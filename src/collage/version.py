"""The version of torch-collage."""

__version__ = "0.1.0"
