"""Warp roles: what each kind of warp does, one file a role."""
