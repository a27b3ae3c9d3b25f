"""Metrics of images as a whole, a file each; `salun.image_metrics.IMAGE_METRICS` lists them."""
