"""The door of every Hydra command: composes YAML, checks it against the schema, turns mistakes into one line.

Hydra itself reports a mistyped key in several lines with a hint at its own options. People who launch jobs want the
key, the value and the fix, and an exit code, so overrides are composed once here before Hydra's main sees them.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sora_train.config.root import ConfigError, Schema, build_config, explain, schema_name, writable

CONFIGS = "pkg://sora_train.configs"
EXIT_BAD_USE = 2
PATIENCE_SECONDS = 10.0
_NO_OUTPUT = [
    "hydra.run.dir=.",
    f"hydra.sweep.dir={tempfile.gettempdir()}",  # takes Hydra's multirun.yaml
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
]
_SHOWS_ONLY = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--version"}


def hydra_app(schema: type[Schema], config_name: str) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Makes `main(config: schema)` a command configured by configs/<config_name>.yaml and KEY=VALUE arguments.

    A ConfigError, raised by the arguments or by main itself before it spends anything, is printed as one line;
    the exit code is then 2.
    """

    def decorate(main: Callable[[Schema], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)
        def run(values: DictConfig) -> None:
            try:
                main(build_config(schema, values))
            except ConfigError as error:
                fail(error)

        @functools.wraps(main)
        def command() -> None:
            arguments = sys.argv[1:]
            ConfigStore.instance().store(name=schema_name(schema), node=writable(schema))
            if not _SHOWS_ONLY.intersection(arguments):
                try:
                    check_arguments(arguments, schema, config_name)
                except ConfigError as error:
                    fail(error)
            # Hydra would make a folder of logs for every process; the run directory is ours to make.
            sys.argv = [sys.argv[0], *arguments, *_NO_OUTPUT]
            run()

        return command

    return decorate


def fail(error: ConfigError) -> None:
    """Prints the line, once where all ranks of a host have it, and leaves with the exit code of a user's mistake."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        # The first rank speaks, and its launcher ends the others: one that is still here has a mistake of its own.
        time.sleep(PATIENCE_SECONDS)
    print(f"error{f' on local rank {rank}' if rank != '0' else ''}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_USE)


def check_arguments(arguments: list[str], schema: type[Any], config_name: str) -> None:
    """Composes the configuration as Hydra will, a sweep by the first value of each swept key.

    Raises:
        ConfigError: an unknown key, group or file, or a value that does not parse.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-name", "-cn", default=config_name)
    parser.add_argument("--config-path", "-cp", default=None)
    known, flags = parser.parse_known_intermixed_args(arguments)
    try:
        parsed = OverridesParser.create().parse_overrides(known.overrides)
        swept = [item.input_line for item in parsed if item.is_sweep_override()]
        if swept and not {"-m", "--multirun"}.intersection(flags):
            raise ConfigError(f"{swept[0]} gives several values: add -m for a run each, or use brackets for a list")
        overrides = [
            f"{item.get_key_element()}={next(item.sweep_string_iterator())}" if item.is_sweep_override() else str(line)
            for line, item in zip(known.overrides, parsed, strict=True)
        ]
        # A path on the command line is relative to the shell, one in code to the module: make it absolute.
        path = known.config_path
        where = (
            hydra.initialize_config_dir(str(Path(path).resolve()), version_base="1.3")
            if path and "://" not in path
            else hydra.initialize_config_module((path or CONFIGS).removeprefix("pkg://"), version_base="1.3")
        )
        with where:
            build_config(schema, hydra.compose(known.config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, schema)) from error
