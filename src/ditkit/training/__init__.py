"""The trainer, its losses and its configuration."""
