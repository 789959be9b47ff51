"""The demonstration model: how it was made, and how good its samples are."""
