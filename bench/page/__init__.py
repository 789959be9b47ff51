"""The benchmark report: runs as one self-contained page, and its plots as pictures."""
