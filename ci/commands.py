"""Commands of this folder, whose names have no .py, as modules for their tests."""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def load(name):
    sys.dont_write_bytecode = True  # it would lie beside the command, under a name that git does not ignore
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_") + "_command", os.path.join(HERE, name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def run(command, *arguments):
    """Exit code, stdout, stderr of a command that was loaded."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command.main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()
