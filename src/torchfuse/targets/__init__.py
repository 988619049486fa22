"""Artifact formats, one file each: how a model is saved in it, loaded back and run."""
