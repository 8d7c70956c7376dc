"""Folders that tests read, and the mark for tests that need the real models and data."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
REAL = ROOT.parent / "shared" / "real"
STORIES = REAL / "models" / "stories260K"

needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"put the real models and data into {REAL} to run this")
