"""The command line: options in, one call of the core, a report out. Nothing here imports torch."""
