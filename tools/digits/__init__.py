"""Makes the embedded model `digits`."""
