"""Everything on disk: manifest, reader, golden samples, cache. ADD A BUNDLE FILE here.

Export, the engine and everything above may import it; it imports everything from skipstep.errors to latency. Names for
others: Bundle and open_bundle (bundle), Manifest and its entries (manifest), parse_manifest (reader), draw_golden and
replay_golden (golden), ArtefactCache (cache), cache_key. They are imported from their modules, as each user needs few.
"""
