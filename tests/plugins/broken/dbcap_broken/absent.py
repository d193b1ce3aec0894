"""Needs a module that is not installed, as after a half-done upgrade."""

from a_module_that_is_not_there import app, plugin

__all__ = ["app", "plugin"]
