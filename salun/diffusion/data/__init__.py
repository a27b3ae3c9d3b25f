"""The training set of an erasure: latents sampled from the model or encoded from images."""
