"""Attempts to bring back, or detect, what a classifier has unlearned; `salun.attacks.ATTACKS` lists them."""
