"""Unlearning methods for diffusion models, one file each; `salun/methods.py` lists them."""
