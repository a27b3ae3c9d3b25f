"""Attempts to bring back or to detect what a classifier has unlearned, one module each; `salun.attacks.ATTACKS` lists them."""
