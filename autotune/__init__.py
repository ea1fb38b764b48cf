"""Finds the fastest legal tile for a spec on a device, and keeps the answer.

Nothing is tuned yet. This package will hold the space of legal tiles, the one timing module, the search, the database
of results and the report. It fills the table that dispatch looks tiles up in; dispatch does not import it.
"""
