"""Architectures: one paper, one file; what they share is in `layers`."""
