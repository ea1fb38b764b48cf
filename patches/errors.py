"""What can go wrong with a patch."""


class PatchError(RuntimeError):
    """A defect is there, and its patch does not fit this release or cannot be undone."""


class RefusedError(RuntimeError):
    """This installation cannot compile for the target and cannot be mended; the message names the ways out."""
