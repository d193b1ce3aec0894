"""Captioning images."""
