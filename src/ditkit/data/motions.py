"""The words of the motion clips: what can move, where to, and what the camera does."""

from __future__ import annotations

import math

STILL = "staying still"
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-_DIAGONAL, -_DIAGONAL),
    "up right": (_DIAGONAL, -_DIAGONAL),
    "down left": (-_DIAGONAL, _DIAGONAL),
    "down right": (_DIAGONAL, _DIAGONAL),
    STILL: (0.0, 0.0),
}
"""Unit vectors (x, y) in the picture; y grows downwards."""

CAMERAS = ("is static", "zooms in", "zooms out", "pans left", "pans right", "pans up", "pans down")
ZOOM = 1.3
"""Ratio of the magnifications at the two ends of a zoom."""
PAN = 0.1
"""How far a pan goes from the middle to either end, in picture widths."""

BACKGROUNDS = ("white", "soft", "dots")

VOCABULARY = (
    "red apple", "banana", "grapes", "lemon", "strawberry", "watermelon", "pineapple", "cherries", "tomato",
    "aubergine", "carrot", "broccoli", "avocado", "mushroom", "hamburger", "slice of pizza", "doughnut",
    "birthday cake", "sunflower", "rose", "cactus", "palm tree", "evergreen tree", "maple leaf",
    "four leaf clover", "sun with face", "glowing star", "rainbow", "snowman without snow", "fire",
    "droplet", "rocket", "automobile", "bus", "taxi", "police car", "tractor", "steam locomotive",
    "helicopter", "sailboat", "flying saucer", "house building", "soccer ball", "basketball and hoop",
    "trophy", "guitar", "balloon", "wrapped present", "christmas tree", "jack-o-lantern", "crown",
    "top hat", "umbrella", "key", "bell", "alarm clock", "electric light bulb", "television", "gem stone",
    "blue heart", "green heart", "purple heart", "cat face", "frog face", "pig face", "panda face",
    "fox face", "lion face", "butterfly", "octopus", "turtle", "penguin", "snail", "honeybee", "owl",
    "crab", "grinning face", "extraterrestrial alien", "robot face", "pile of poo",
)  # fmt: skip
"""Eighty emoji that differ from each other at 28 pixels."""
