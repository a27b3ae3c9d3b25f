"""Training of the embedded model `shapes`: world, VAE, oracle, UNet, packaging. See README.md beside this file."""
