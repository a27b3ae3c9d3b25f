"""Detectors, one module each; `salun.evaluation.detector.DETECTORS` lists them."""
