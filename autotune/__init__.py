"""Timing of kernels, and what is made of it.

``measure`` times a call of whatever peers take part; ``peers`` are those of ``linear``; ``bench`` goes through a grid
of shapes and keeps the results in a file; ``report`` makes tables and pictures of them. Nothing is tuned yet: the space
of legal tiles, the search and the database of its results will be here too, and fill the table that dispatch looks
tiles up in. Dispatch does not import this package.
"""
