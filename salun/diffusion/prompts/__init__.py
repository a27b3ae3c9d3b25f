"""Concepts, and the prompts made of them."""
