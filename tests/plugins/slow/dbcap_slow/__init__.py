"""Stands for a plugin that imports something big for nothing."""

from __future__ import annotations

import time

from dbcap.plugins.api import Plugin

time.sleep(0.7)

plugin = Plugin()
