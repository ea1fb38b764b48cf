"""The ``nvfp4dsl`` command. Every subcommand takes ``--json`` and then prints one JSON object and nothing else."""

from __future__ import annotations

import logging

import click

from nvfp4dsl.cli.bench import bench
from nvfp4dsl.cli.cache import cache
from nvfp4dsl.cli.demo import demo
from nvfp4dsl.cli.doctor import doctor
from nvfp4dsl.cli.inspect import inspect_
from nvfp4dsl.cli.kernels import compile_, emulate
from nvfp4dsl.cli.output import Group
from nvfp4dsl.cli.patches import patches
from nvfp4dsl.cli.selftest import selftest_


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nvfp4dsl")
@click.option("-v", "--verbose", is_flag=True, help="Log compiles and cache misses.")
def main(verbose: bool) -> None:
    """NVFP4 kernels: compile them for any target, execute them with or without its GPU."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


for command in (doctor, demo, bench, compile_, emulate, inspect_, selftest_, cache, patches):
    main.add_command(command)
