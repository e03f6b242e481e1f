"""Adapters: a few trainable parameters beside a frozen model, one paper, one file.

`store` adds, saves, loads, switches and removes them; `tuner` is what the layers of those that peft lacks
have in common; `layers` says which layers of a model are adapted, `clock` what they know of time. Files are
peft's.
"""
