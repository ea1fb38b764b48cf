"""Data that travels with the package: one real BF16 weight for the demo. Its origin and licence are in ``NOTICE.md``."""
