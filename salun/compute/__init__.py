"""The machine: devices, dtypes, processes, versions."""
