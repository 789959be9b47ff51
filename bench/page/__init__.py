"""Benchmark results as one HTML page: read, worked out, drawn, and put into a Jinja2 template with one style sheet."""
