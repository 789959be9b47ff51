"""Training and evaluating the demonstration model. This package is in the repository and not in the wheel."""
