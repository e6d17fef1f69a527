"""Where things lie in the checkout: tests may move, these do not follow."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
EXAMPLES, TOOLS = ROOT / "examples", ROOT / "tools"
