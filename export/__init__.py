"""Turning networks into artefacts that run elsewhere."""
