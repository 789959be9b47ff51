"""Files that are whole or absent, verified reads, untrusted JSON and signatures.

Everything may import it; it imports nothing but skipstep.errors. Signatures (generate_key, sign, verify) are in
skipstep.storage.signature, which is imported only where keys are used.
"""

from skipstep.storage.atomic import atomic_folder, atomic_write
from skipstep.storage.untrusted import parse_json, read_dataclass, read_json_object, read_schema, read_value
from skipstep.storage.verified import check_relative_name, read_up_to, read_verified

__all__ = [
    "atomic_folder",
    "atomic_write",
    "check_relative_name",
    "parse_json",
    "read_dataclass",
    "read_json_object",
    "read_schema",
    "read_up_to",
    "read_value",
    "read_verified",
]
