"""Modules whose branches are merged into one layer, and whose forward is then written anew."""
