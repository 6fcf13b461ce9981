"""Which functions of a package run in this process, noted as they are called.

A chapter's outputs can depend on a function only if it ran. Modules that are imported
after `install` are compiled with one line more at the head of every top-level function;
line numbers, tracebacks and sources stay as they are.
"""

import ast
import builtins
import sys
from importlib.machinery import PathFinder, SourceFileLoader

HOOK = "__kdbook_ran__"  # what the added line calls
_ran: set[str] = set()  # "kdbook.rows:encode"


class Loader(SourceFileLoader):
    "Compiles a module from its source, with a note in each top-level function."

    def get_code(self, fullname):
        "Never from bytecode, which has no notes."
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                note = ast.parse(f"{HOOK}({f'{fullname}:{node.name}'!r})").body[0]
                for each in ast.walk(note):
                    ast.copy_location(each, node.body[0])
                documented = ast.get_docstring(node, clean=False) is not None
                node.body.insert(int(documented), note)
        return compile(tree, path, "exec", dont_inherit=True)


class Finder:
    "Finds the modules of one package, and loads them by `Loader`."

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install(
    package: str,  # not imported yet
) -> None:
    "Note from now on which of its functions run."
    setattr(builtins, HOOK, _ran.add)
    sys.meta_path.insert(0, Finder(package))


def ran() -> list[str]:  # "module:function", sorted
    "The functions that have run so far."
    return sorted(_ran)
