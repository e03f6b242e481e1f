"""Inference-time methods: one paper, one file."""
