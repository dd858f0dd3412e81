"""The small language world: its grammar, its assets and how they are built, policies measured against its optimum."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
