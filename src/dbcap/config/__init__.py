"""Settings: one frozen model per command, seven places a value may come from, and where each came from."""
