"""Erasing a concept from a diffusion model. Read `erase.py` first: it is the story of a run."""
