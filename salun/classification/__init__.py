"""Unlearning in image classifiers: data, models, methods, metrics, and the experiment that puts them together."""
