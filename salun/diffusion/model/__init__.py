"""A diffusion model in memory: how it is loaded, conditioned, sampled and converted."""
