"""Where work is kept that several commands and runs share, such as tokenised prompts. Anything in it may be deleted."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "NPD_CACHE"


def cache_folder(what: str) -> Path:
    """Folder for one kind of work, in NPD_CACHE, else in the user's cache folder. Nothing is created."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own) / what
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "megatron_npd", what)
