"""Makes the bundled model `digits`."""
