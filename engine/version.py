"""The version of skipstep. It stands apart so that every module can import it without importing the package's root."""

__version__ = "0.1.0"
