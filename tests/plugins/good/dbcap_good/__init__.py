"""A plugin as it should be. docs/plugins.md shows its two modules."""
