"""Lets the tests here import the module beside them, which `make bench` uses too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
