"""How long calls take on one device, and which plan meets a deadline.

Bundles, export, the engine and everything above may import it; it imports everything from skipstep.errors to loops.
Names for others: Calibration, Latency and RunKind (calibration), DeviceIdentity and device_identity (identity),
choose_plan (deadline), calibrate (measure), format_table (table). They are imported from their modules, as an engine
without a calibration needs none of them.
"""
