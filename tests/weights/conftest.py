"""The tiny checkpoints of every family."""

from tests.families.conftest import tiny_model

__all__ = ["tiny_model"]
