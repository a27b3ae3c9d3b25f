"""The command line: Typer commands that only read options, call the core, and show what it reports."""
