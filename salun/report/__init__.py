"""Images before and after, charts, tables and self-contained pages about runs, masks and deltas."""
