"""How long calls take on one device, and which plan meets a deadline."""
