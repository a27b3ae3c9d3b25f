"""Attempts to bring back what was unlearned, one module each; `salun.attacks.attack.ATTACKS` lists them."""
