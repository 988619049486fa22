"""Fusing: finding, proving, editing modules and programs, undoing, checkpoints."""
