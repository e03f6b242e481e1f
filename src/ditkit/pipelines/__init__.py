"""Pipelines for models that diffusers has none for."""
