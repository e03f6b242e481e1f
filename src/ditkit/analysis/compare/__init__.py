"""Architectures trained at equal cost and compared: the file, the runs, their figures, the report."""
