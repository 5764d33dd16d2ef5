"""What `dev.py` is made of: the developers' environment, a real ComfyUI as a server, and the demo."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The pack, which is the repository."""

DEV = ROOT / ".dev"
"""Everything that dev.py makes; git ignores it, and it can be deleted at any time."""


class DevError(Exception):
    """A command of dev.py cannot go on; the message says what it found and what to do."""
