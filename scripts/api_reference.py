"""The reference of the package, made from its docstrings without importing it; used by build_book.py.

Every public function and class of the package gets an entry, but for those that only the package itself uses.
"""

import ast
import inspect
import re
from collections.abc import Container
from pathlib import Path

from address import repository, revision

# In reading order; a module that is not named here comes last.
ORDER = (
    "sanity randomization followups saliency saliency.gradients saliency.backprop_rules saliency.rescale saliency.lrp "
    "saliency.cam saliency.perturbation saliency.controls similarity localization plots edges inference device "
    "book.claims book.explorer book.live_panel book.data book.photographs book.bugs book.models book.training "
    "book.training_dynamics"
).split()
INSIDE = {"book", "book.assets", "book.claims.card", "model_state", "replay"}
INSIDE |= {
    "saliency.cam.last_convolution",
    "saliency.passes",
    "saliency.layers",
    "saliency.spatial",
    "saliency.backward_graph",
    "saliency.lrp_rules",
}
INSIDE |= {"comparing", "dataflow", "heatmaps", "planning", "private", "recipes", "rows", "runs", "stages", "versions"}
INSIDE |= {f"randomization.{name}" for name in ("Redraws", "check_options")}
INSIDE |= {"device.batches", "device.progress", "book.models.Recipe", "book.models.checkpoint_name"}
INSIDE |= {f"book.live_panel.{name}" for name in ("Panel", "figure", "png", "predicted", "stage_names")}
INSIDE |= {"book.training.check_labels", "book.explorer.render"}
Definition = ast.FunctionDef | ast.ClassDef
LONGEST = 50  # characters of a signature on one line: as many as a phone shows


def modules(package: Path) -> dict[str, ast.Module]:
    """The modules of the reference, by their name below the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and name not in INSIDE:
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)))


def public(module: str, tree: ast.Module, handed_on: Container[str] = ()) -> dict[str, Definition]:
    """The entries of a module, by the name under which a reader of the book uses them."""
    package = module.rpartition(".")[0]
    found = {}
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            name = f"{package if node.name in handed_on else module}.{node.name}"
            if name not in INSIDE:
                found[name] = node
    return found


def entries(root: Path) -> dict[str, tuple[ast.Module, dict[str, Definition]]]:
    """Every module of the reference with its entries."""
    trees = modules(root / "helpers")
    imports = [node for node in trees["saliency"].body if isinstance(node, ast.ImportFrom)]
    handed_on = {alias.name for node in imports for alias in node.names}  # what `saliency` takes from its modules
    found = {}
    for module, tree in trees.items():
        own = public(module, tree, handed_on if "." in module else ())
        found[module] = tree, own | from_inside(root / "helpers", module, tree)
    return found


def from_inside(package: Path, module: str, tree: ast.Module) -> dict[str, Definition]:
    """What a module offers as its own though it is written in one that stays inside: `from .x import name as name`."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (offered := {a.name for a in node.names if a.asname == a.name}):
            written = ast.parse((package / f"{node.module}.py").read_text(encoding="utf-8")).body
            entries = [entry for entry in written if isinstance(entry, Definition) and entry.name in offered]
            found |= {f"{module}.{entry.name}": entry for entry in entries}
    return found


def reference(root: Path) -> str:
    """The reference as Markdown: a list of the modules, then each with its entries."""
    parts, contents = [], []
    for module, (tree, found) in entries(root).items():
        title, _, about = inspect.cleandoc(ast.get_docstring(tree) or "").partition("\n")
        file = f"helpers/{module.replace('.', '/')}"
        file += ".py" if (root / f"{file}.py").exists() else "/__init__.py"
        contents.append(f"- [`{module}`](#api-{module}): {title}")
        parts += [f"(api-{module})=\n## {module}", title, prose(about)]
        parts += [f"Source: [{file}]({repository(root)}/blob/{revision(root)}/{file})"]
        for name, node in found.items():
            parts += [f"### {name}", signature(node), documentation(ast.get_docstring(node) or "")]
    return "\n\n".join(["\n".join(contents), *filter(None, parts)])


def signature(node: Definition) -> str:
    """A block of code: how a function is called, or which fields a class has."""
    if isinstance(node, ast.ClassDef):
        fields = [f"    {ast.unparse(part)}" for part in node.body if isinstance(part, ast.AnnAssign)]
        code = "\n".join([f"class {node.name}:", *fields]) if fields else f"class {node.name}"
        return f"```python\n{code}\n```"
    given = node.args
    plain = len(given.args) - len(given.defaults)
    parts = [*map(argument, given.args[:plain]), *map(argument, given.args[plain:], given.defaults)]
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{argument(given.vararg)}" if given.vararg else "*")
    parts += map(argument, given.kwonlyargs, given.kw_defaults)
    parts += [f"**{given.kwarg.arg}"] if given.kwarg else []
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    code = f"{node.name}({', '.join(parts)}){returns}"
    if len(code) > LONGEST:
        code = f"{node.name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    return f"```python\n{code}\n```"


def argument(arg: ast.arg, default: ast.expr | None = None) -> str:
    text = f"{arg.arg}: {ast.unparse(arg.annotation)}" if arg.annotation else arg.arg
    equals = " = " if arg.annotation else "="
    return text if default is None else f"{text}{equals}{ast.unparse(default)}"


def documentation(docstring: str) -> str:
    """A NumPy-style docstring as Markdown: its sections become bold words with lists of definitions."""
    text, *sections = re.split(r"^(\w+)\n-{3,}\n", docstring, flags=re.MULTILINE)
    parts = [prose(text)]
    for title, body in zip(sections[::2], sections[1::2]):
        parts.append(f"**{title}**")
        parts.append(definitions(body) if title in ("Parameters", "Raises") else prose(body))
    return "\n\n".join(parts)


def definitions(body: str) -> str:
    """Items `name : what` or `name`, each with the indented lines below it."""
    items = []
    for line in body.strip().splitlines():
        if line and not line[0].isspace():
            term, _, first = line.partition(" : ")
            items.append((term, [first] if first else []))
        else:
            items[-1][1].append(line.strip())
    return "\n\n".join(f"`{'`, `'.join(term.split(', '))}`\n: {' '.join(text).strip()}" for term, text in items)


def prose(text: str) -> str:
    """Paragraphs stay; lines such as "`name`    what it is" become definitions."""
    item = re.compile(r"^(`[^ ].*?`)\s{2,}(?=\S)", re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", item.sub(r"\n\1\n: ", text)).strip()
