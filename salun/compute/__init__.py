"""Where to compute: devices, dtypes, processes, versions."""
