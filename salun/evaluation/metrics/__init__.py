"""Metrics of an erasure, one idea a module; `salun.evaluation.registry.METRICS` lists them."""
