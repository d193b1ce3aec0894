"""Images in a terminal, by the protocols of iTerm2 (WezTerm, VS Code and others know it) and kitty (Ghostty too)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

from PIL import Image

_CHUNK = 4096
"""Characters that kitty takes at once."""
_ITERM = ("iTerm.app", "WezTerm", "vscode", "mintty", "rio")
_KITTY = ("ghostty", "kitty")


def protocol(environment: Mapping[str, str], terminal: bool) -> str:
    """Return `iterm`, `kitty`, or an empty string for a terminal that is not known to show images."""
    program = environment.get("TERM_PROGRAM", "")
    inside_another = environment.get("TMUX") or environment.get("TERM", "").startswith(("screen", "tmux"))
    if not terminal or inside_another:
        return ""
    if environment.get("KITTY_WINDOW_ID") or "kitty" in environment.get("TERM", "") or program in _KITTY:
        return "kitty"
    return "iterm" if program in _ITERM else ""


def sequence(image: Image.Image, kind: str) -> str:
    """Return what makes the terminal show an image, with a line end after it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.standard_b64encode(buffer.getvalue()).decode()
    if kind == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())}:{data}\a\n"
    parts = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    written = []
    for number, part in enumerate(parts):
        first = "a=T,f=100," if number == 0 else ""
        written.append(f"\x1b_G{first}m={int(number + 1 < len(parts))};{part}\x1b\\")
    return "".join(written) + "\n"
