"""Sparse differences of two models: made, applied, undone, stacked, exported for stock loaders."""
