"""SalUn for any module: saliency scores, mask, masked optimizer, training loop."""
