"""Comparing what two models compute."""
