"""Digests of the definitions of a package, read from its source alone.

A definition is a name that a module binds at its top level, with all statements there
that bind or change it. Its digest covers their code and, in place of each name that
refers to another definition, the digest of that one. Comments, docstrings, layout,
imports, and the names and places of definitions do not count. Top-level statements that
belong to no name (calls, loops, conditions) count for every definition of their module.

Whoever knows which functions ran (traced.py) knows more: the others cannot have made a
difference, whatever they say. `Package.digests_of` leaves their code out.
"""

import ast
import hashlib
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

IMPORTS = (ast.Import, ast.ImportFrom)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
NO_CODE = {"ctx", "kind", "type_comment"}  # fields of nodes


@dataclass(frozen=True)
class Ref:
    "A definition, `module:name`; `module:` are its effects, and `module:*` all of it."

    id: str  # "kdbook.records.store:digest"

    @property
    def name(self) -> str:  # "digest"
        return self.id.partition(":")[2]

    def __str__(self) -> str:  # "records.store.digest"
        return self.id.replace(":", ".").partition(".")[2]


Found = tuple[Ref | str, list[str]]  # a definition or dotted path, attributes after it
Scope = dict[str, str | None]  # bound name -> dotted path where imported, None if local


def sha(tokens: Iterable[str]) -> str:  # 16 hexadecimal digits
    return hashlib.sha256("\x1f".join(tokens).encode()).hexdigest()[:16]


def is_constant(node: ast.AST) -> bool:
    "A statement that is a value by itself, as docstrings are."
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def imported(
    node: ast.stmt,  # any; only an import binds
    package: str = "",  # the one that relative imports start from
) -> Iterator[tuple[str, str]]:  # bound name, dotted path
    "What an import binds."
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.split(".")[0]
            yield (alias.asname, alias.name) if alias.asname else (top, top)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".") if node.level else []
        above = above[: len(above) + 1 - node.level]
        for alias in node.names:
            path = [*above, *filter(None, [node.module]), alias.name]
            yield alias.asname or alias.name, ".".join(path)


def bound(nodes: list[ast.AST], package: str = "") -> Scope:
    "The names that a scope binds. A name that is imported and assigned is imported."
    paths: dict[str, str] = {}
    names: set[str] = set()
    outer: set[str] = set()

    def visit(node: ast.AST, in_comprehension: bool = False) -> None:
        paths.update(imported(node, package))
        if isinstance(node, DEFINITIONS):
            names.add(node.name)
        if isinstance(node, (*IMPORTS, *DEFINITIONS, ast.Lambda)):
            return
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            outer.update(node.names)
        elif isinstance(node, ast.NamedExpr):  # leaves a comprehension
            names.add(node.target.id)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.update([] if in_comprehension else [node.id])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            names.update(filter(None, [node.name]))
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        for child in ast.iter_child_nodes(node):
            visit(child, in_comprehension or isinstance(node, COMPREHENSIONS))

    for node in nodes:
        visit(node)
    return {**dict.fromkeys(names - outer), **paths}


class Canonical:
    "The tokens of a piece of code: text, and a `Ref` where a definition is named."

    def __init__(
        self,
        find: Callable[[str], Found],  # what a dotted path leads to
        look: Callable[[str], str | None],  # the dotted path of a global name
        package: str = "",  # the one that relative imports start from
    ):
        self.find, self.look, self.package = find, look, package
        self.scopes: list[tuple[Scope, bool]] = []  # innermost last; of a class?
        self.tokens: list[str | Ref] = []

    def path(self, name: str) -> str | None:
        "The dotted path that a name stands for here; None for what is local."
        for depth, (scope, of_class) in enumerate(reversed(self.scopes)):
            if name in scope and not (of_class and depth):
                return scope[name]
        return self.look(name)

    def refers(self, node: ast.AST) -> Found | None:
        'What a name, `a.b.c` or `import_module("a").b` refers to.'
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        path = self.path(node.id) if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Call) and node.args:
            module = getattr(node.args[0], "value", None)
            by_name = ast.unparse(node.func).endswith(("import_module", "__import__"))
            path = module if by_name and isinstance(module, str) else None
        return self.find(".".join([path, *attributes])) if path else None

    def add(self, node: ast.AST) -> None:
        "Add the tokens of `node`."
        if isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
            if found := self.refers(node):
                self.tokens += [found[0], *(f".{name}" for name in found[1])]
                return
        if isinstance(node, (*IMPORTS, ast.Pass)):
            return
        self.tokens.append(f"({type(node).__name__}")
        if isinstance(node, DEFINITIONS):
            self.definition(node)
        elif isinstance(node, ast.Lambda):
            self.add(node.args)
            self.body(node, [node.body])
        elif isinstance(node, COMPREHENSIONS):
            self.add(node.generators[0].iter)  # of the scope around it
            self.scopes.append((bound([g.target for g in node.generators]), False))
            self.fields(node)
            self.scopes.pop()
        elif isinstance(node, ast.JoinedStr):
            self.joined(node)
        elif isinstance(node, ast.Global):
            for name in node.names:
                self.add(ast.Name(name, ast.Load()))
        else:
            self.fields(node)
        self.tokens.append(")")

    def fields(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in NO_CODE or value == [] or value is None and name != "value":
                continue
            self.tokens.append(f"{name}=")
            for each in value if isinstance(value, list) else [value]:
                if not isinstance(each, ast.AST):
                    self.tokens.append(repr(each))
                elif not is_constant(each):
                    self.add(each)

    def definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        "A function or class. What it is made with belongs to the scope around it."
        function = isinstance(node, FUNCTIONS)
        made_with = [node.args] if function else [*node.bases, *node.keywords]
        returns = [node.returns] if function and node.returns else []
        for each in [ast.Name(node.name), *node.decorator_list, *made_with, *returns]:
            self.add(each)
        self.body(node, node.body)

    def body(self, owner: ast.AST, nodes: list[ast.AST]) -> None:
        "What a function, lambda or class holds."
        arguments = ast.walk(getattr(owner, "args", ast.Pass()))
        names = {node.arg: None for node in arguments if isinstance(node, ast.arg)}
        scope = {**names, **bound(nodes, self.package)}
        self.tokens.append("body=")
        self.scopes.append((scope, isinstance(owner, ast.ClassDef)))
        for node in nodes:
            if not is_constant(node):
                self.add(node)
        self.scopes.pop()

    def joined(self, node: ast.JoinedStr) -> None:
        "An f-string. Versions of Python cut the text between the values differently."
        text = ""
        for value in node.values:
            if isinstance(value, ast.Constant):
                text += value.value
            else:
                self.tokens.append(repr(text))
                self.add(value)
                text = ""
        self.tokens.append(repr(text))


@dataclass
class Module:
    "A parsed module of the package."

    name: str  # "kdbook.records.store"
    path: Path
    tree: ast.Module
    imports: dict[str, str] = field(default_factory=dict)  # name -> dotted path
    own: set[str] = field(default_factory=set)  # the names it defines
    lazy: dict[str, str] = field(default_factory=dict)  # name -> module that has it

    def __post_init__(self) -> None:
        inside = self.path.name == "__init__.py"
        self.package = self.name if inside else self.name.rpartition(".")[0]
        for node in self.tree.body:
            names = bound([node], self.package)
            self.imports.update({k: path for k, path in names.items() if path})
            if not isinstance(node, ast.AugAssign):
                self.own |= {k for k, path in names.items() if not path}
            self.lazy.update(lazy_names(node))

    def look(self, name: str) -> str | None:
        "The dotted path of a global name."
        return f"{self.name}.{name}" if name in self.own else self.imports.get(name)


def lazy_names(node: ast.stmt) -> dict[str, str]:  # name -> module
    'The names in `__getattr__ = lazy_names(__name__, {"attack": "kdbook.attack"})`.'
    call = getattr(node, "value", None)
    targets = [ast.unparse(target) for target in getattr(node, "targets", [])]
    if targets != ["__getattr__"] or not isinstance(call, ast.Call):
        return {}
    literal = [ast.literal_eval(a) for a in call.args if isinstance(a, ast.Dict)]
    return literal[0] if literal else {}


class Package:
    "The definitions of a package: their statements, what they reach, their digests."

    def __init__(self, folder: Path):
        self.modules: dict[str, Module] = {}
        for path in sorted(folder.rglob("*.py")):
            if path.name != "_modidx.py":
                parts = path.relative_to(folder.parent).with_suffix("").parts
                name = ".".join(parts).removesuffix(".__init__")
                tree = ast.parse(path.read_text(encoding="utf-8"))
                self.modules[name] = Module(name, path, tree)
        self.name = folder.name
        self.statements = self.sorted_statements()
        whole = [f"{module}:*" for module in self.modules]
        self.tokens = {id: self.tokens_of(id) for id in [*self.statements, *whole]}
        self.edges = {
            id: {token.id for token in tokens if isinstance(token, Ref)}
            for id, tokens in self.tokens.items()
        }
        self.shapes = {id: self.shape(id) for id in self.statements}

    @cached_property
    def digests(self) -> dict[str, str]:
        "The digest of every definition, whatever ran."
        return self.digests_of(self.tokens)

    def home(self, path: str) -> Module | None:
        "The module that a dotted path begins with."
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        return self.modules.get(path)

    def find(self, path: str) -> Found:
        "What a dotted path leads to, through re-exports; the path where it leads out."
        module = self.home(path)
        if module is None:
            return path, []
        head = module.name
        rest = path.removeprefix(head).split(".")[1:]
        if not rest:
            return Ref(f"{head}:*"), []
        name, *after = rest
        if name in module.own:
            return Ref(f"{head}:{name}"), after
        elsewhere = module.imports.get(name)
        if name in module.lazy:
            elsewhere = f"{module.lazy[name]}.{name}"
        if elsewhere:
            return self.find(".".join([elsewhere, *after]))
        if "__getattr__" in module.own:
            return Ref(f"{head}:__getattr__"), rest
        return path, []

    def canonical(self, module: Module) -> Canonical:
        return Canonical(self.find, module.look, module.package)

    def sorted_statements(self) -> dict[str, list[tuple[Module, ast.stmt]]]:
        "The top-level statements of all modules, by the definition they belong to."
        every = self.modules.values()
        found = {f"{module.name}:{name}": [] for module in every for name in module.own}
        for module in every:
            for node in module.tree.body:
                if isinstance(node, (*IMPORTS, ast.Pass)) or is_constant(node):
                    continue
                for owner in self.owners(module, node):
                    found.setdefault(owner, []).append((module, node))
        return found

    def owners(self, module: Module, node: ast.stmt) -> set[str]:
        "The definitions that a top-level statement binds or changes."
        effect = {f"{module.name}:"}
        if isinstance(node, COMPOUND):
            return effect
        # `X |= ...`, `X[...] = ...` and `X.update(...)` may change another module's X
        names = {} if isinstance(node, ast.AugAssign) else bound([node])
        changed = [*getattr(node, "targets", []), getattr(node, "target", None)]
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if called:
            changed = [node.value.func]
        owners = {f"{module.name}:{name}" for name in names}
        for target in filter(None, changed):
            while isinstance(target, ast.Subscript):
                target = target.value
            ref, after = self.canonical(module).refers(target) or (None, [])
            if isinstance(ref, Ref) and ref.id[-1] != "*" and (after or not called):
                owners.add(ref.id)
        return owners or effect

    def tokens_of(self, id: str) -> list[str | Ref]:
        "The code of a definition, with all that counts for it."
        home, _, name = id.partition(":")
        if name == "*":
            own = sorted(n for n in self.modules[home].own if not n.startswith("_"))
            return [each for n in own for each in (n, Ref(f"{home}:{n}"))]
        tokens: list[str | Ref] = []
        for module, node in self.statements[id]:
            canonical = self.canonical(module)
            canonical.add(node)
            tokens += canonical.tokens
        if name in self.modules[home].imports:  # imported, then bound anew
            tokens.append(self.find(self.modules[home].imports[name])[0])
        modules = {home, *(module.name for module, _ in self.statements[id])}
        effects = {f"{each}:" for each in modules} & self.statements.keys() - {id}
        return [*tokens, *map(Ref, sorted(effects))]

    def shape(self, id: str) -> str:  # 8 hexadecimal digits
        "A definition's own code, whatever the definitions are that it names."
        numbers: dict[Ref, str] = {}
        number = lambda ref: numbers.setdefault(ref, f"#{len(numbers)}")
        tokens = (number(t) if isinstance(t, Ref) else t for t in self.tokens[id])
        return sha(tokens)[:8]

    def is_function(self, id: str) -> bool:
        nodes = [node for _, node in self.statements.get(id, [])]
        return len(nodes) == 1 and isinstance(nodes[0], FUNCTIONS)

    def idle(self, id: str, ran: Collection[str] | None) -> bool:
        "Whether a definition is a function that did not run."
        return ran is not None and self.is_function(id) and self.shapes[id] not in ran

    def reached(
        self,
        ids: Iterable[str],
        ran: Collection[str] | None = None,  # shapes of the functions that ran
    ) -> set[str]:
        "These definitions and all that they depend on, without functions left idle."
        seen, todo = set(), list(ids)
        while todo:
            if (id := todo.pop()) not in seen and not self.idle(id, ran):
                seen.add(id)
                todo += self.edges[id]
        return seen

    def digests_of(
        self,
        ids: Iterable[str],
        ran: Collection[str] | None = None,  # shapes of the functions that ran
    ) -> dict[str, str]:  # of these and of all that they reach
        """Digests of definitions, those below first.

        Definitions that reach each other are digested in rounds: in each, a member is
        digested with what the round before found for the others. A function that did
        not run is a function that did not run, whatever its code."""
        ids = set(ids)
        reach = {id: self.reached([id], ran) for id in self.reached(ids, ran)}
        done = {
            id: "idle"
            for each in (ids, *(self.edges[id] for id in reach))
            for id in each
            if id not in reach
        }
        for id in sorted(reach, key=lambda id: len(reach[id])):
            if id in done:
                continue
            group = [each for each in reach[id] if id in reach[each]]
            known = dict.fromkeys(group, "")
            for _ in range(len(group) + 1):
                of = ChainMap(known, done)
                text = lambda t: of[t.id] if isinstance(t, Ref) else t
                known = {each: sha(map(text, self.tokens[each])) for each in group}
            done.update(known)
        return done
