"""The facts on each transformer class, read from diffusers 0.42 and checked by tests on tiny instances.

One file for a family. A new class is an entry in its family's file, or a new file with `ANATOMIES`: every
module of this folder that has them is found.
"""

from __future__ import annotations

import importlib
import pkgutil

from ditkit.seams.anatomy import Anatomy
from ditkit.seams.facts.unsupported import UNSUPPORTED

__all__ = ["FACTS", "UNSUPPORTED"]

FACTS: dict[str, Anatomy] = {
    anatomy.name: anatomy
    for found in pkgutil.iter_modules(__path__)
    for anatomy in getattr(importlib.import_module(f"{__name__}.{found.name}"), "ANATOMIES", ())
}
