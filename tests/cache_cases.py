"""Keys and entries of the cache in tests."""

from skipstep.bundles.cache_key import cache_key

KEY = cache_key(name="first")


OTHER = cache_key(name="second")


HEAD_BYTES = 92


def path_of(cache, key=KEY):
    return cache.folder / f"{key}.entry"


def never():
    raise AssertionError("built again")
