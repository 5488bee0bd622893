"""Equations on DOLFINx: each a small solver on the tape, with what it is checked against in its tests."""
