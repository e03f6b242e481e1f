"""Transformer classes of diffusers on which no method runs, and why."""

from __future__ import annotations

UNSUPPORTED: dict[str, str] = {}
