"""Attempts to bring an erased concept back, one module each; `salun.attacks.ATTACKS` lists them."""
