"""Detectors, one module each; `salun.detectors.DETECTORS` lists them."""
