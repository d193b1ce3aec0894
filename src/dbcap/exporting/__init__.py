"""Exporting models to the formats that other tools read."""
