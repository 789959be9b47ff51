"""Everything on disk: manifest, reader, golden samples, cache. ADD A BUNDLE FILE here."""
