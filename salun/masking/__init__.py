"""The method itself, for any module: saliency, mask, masked optimizer, training loop."""
