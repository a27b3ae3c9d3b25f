"""Training of the bundled model `shapes`: world, VAE, oracle, UNet, packaging. See README.md beside this file."""
