"""Start and end of a job: parse flags, and report an error of the user or the storage in one line.

The exit code is 2 after a user's mistake, and 75 where the storage fails and may work again.
"""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from recursive_jax import hosts, paths
from recursive_jax.console import compile_cache, config_files, output

MISTAKES = (ValueError, OSError, FloatingPointError)  # raised for callers' mistakes


def run(main: Callable[[], None]) -> None:
    """Parse the command line and call `main()`; --verbosity=1 shows the traceback of an error."""
    # Otherwise transformers prints that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    compile_cache.define(flags.FLAGS)

    def guarded(argv):
        if len(argv) > 1:
            output.fail(ValueError(f"unexpected arguments {argv[1:]}; flags start with --"))
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax logs every step of every save
        compile_cache.use(flags.FLAGS.compilation_cache)
        try:
            main()
        except Exception as error:
            if not (isinstance(error, MISTAKES) or paths.is_client_fault(error)):
                raise
            logging.debug("raised here", exc_info=True)
            output.fail(error, hosts.AGAIN if paths.may_pass(error) else 2)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        argv = config_files.resolve(argv)
        _check_config(argv)
        return flags.FLAGS(argv)
    except ImportError as error:
        output.fail(ValueError(f"the config file imports what is not there: {error}"))
    except (flags.Error, *MISTAKES) as error:
        lines = str(error).strip().splitlines()  # config_flags puts a traceback in between
        output.fail(ValueError(lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"))
    except Exception as error:  # of the config file's own code
        words = " ".join(str(error).split())
        output.fail(ValueError(f"the config file fails: {type(error).__name__}: {words}"))


def _check_config(argv: Sequence[str]) -> None:
    """Raise a ValueError for an unknown `--config.KEY`; config_flags raises AttributeError(KEY)."""
    given = re.search(r"(?m)^--?config[=\n]([^:\n]+)(?::(.*))?$", "\n".join(argv[1:]))
    if given is None:
        return
    file, arg = given.groups()
    config_files.make_importable(file)
    keys = [m[1] for m in (re.match(r"--?(?:no)?config\.([\w.]+)", a) for a in argv[1:]) if m]
    if not keys:
        return
    config = runpy.run_path(file)["get_config"](*([] if arg is None else [arg]))
    for key in keys:
        node, where = config, "config"
        for part in key.split("."):
            if not hasattr(node, "keys") or part not in node:
                known = ", ".join(sorted(node)) if hasattr(node, "keys") else "no keys below it"
                raise ValueError(f"unknown config key {key!r}; {where} has {known or 'no keys'}")
            node, where = node[part], f"{where}.{part}"
