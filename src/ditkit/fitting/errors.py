"""What goes wrong in a fit."""


class FittingError(ValueError):
    """The fit can't be done as asked for; nothing was lost."""
