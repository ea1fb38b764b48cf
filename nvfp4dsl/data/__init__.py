"""Data that travels with the package: one real BF16 weight for the demo (``NOTICE.md`` has its origin and licence)."""
