"""A run on disk: its folder, its record, the cache."""
