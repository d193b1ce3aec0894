"""Plugins: `api` is all that a plugin author imports, `loader` finds them and keeps their faults from the rest."""
