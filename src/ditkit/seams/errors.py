"""Errors of the seams."""

from __future__ import annotations


class UnsupportedModelError(TypeError):
    """The target holds no transformer whose structure `ditkit.seams.anatomy` knows."""


class ConflictError(ValueError):
    """Two methods claim the same seam, or a model already carries methods."""


class SeamError(ValueError):
    """A method asks a seam for something that this model or this call can't give."""
