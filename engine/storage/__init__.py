"""Files that are whole or absent, verified reads, untrusted JSON and signatures. Imports nothing but errors."""
