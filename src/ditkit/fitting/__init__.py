"""Fitting: the parts of methods that are learned or searched for. One method, one file.

A fitter is a registered dataclass of its options with `fit(pipe, data, folder, progress)`; what it learned is
a folder of two files (`ditkit.artifact`), which the method takes by its `weights` option.
"""
