"""What a file is, and what would fail on this machine."""
