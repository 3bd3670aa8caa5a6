"""Code that runs on every system: text has an encoding, and what one system lacks is not imported."""

import ast
from pathlib import Path

import pytest
from address import files

ROOT = Path(__file__).parent.parent
SOURCES = [path for path in files(ROOT) if path.suffix == ".py"]
# Of the standard library, what Windows does not have. A module may import it where it looks for it first.
POSIX = set("crypt curses fcntl grp nis ossaudiodev posix pty pwd readline resource spwd syslog termios tty".split())
BYTES = {"Image", "gzip", "lzma", "tarfile", "zipfile"}  # whose `open` reads no text unless told so


def unnamed(tree: ast.AST) -> list[int]:
    """Lines that read or write text in whatever encoding the system prefers."""
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or {None, "encoding"} & {keyword.arg for keyword in call.keywords}:
            continue
        match call.func:
            case ast.Attribute(attr="read_text") if not call.args:
                found.append(call.lineno)
            case ast.Attribute(attr="write_text") if len(call.args) < 2:
                found.append(call.lineno)
            case ast.Attribute(value=ast.Name(id), attr="open") if id in BYTES:
                pass
            case ast.Name("open") | ast.Attribute(attr="open"):
                given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
                modes = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                if not any("b" in mode for mode in modes if set(mode) <= set("rwxabt+")):
                    found.append(call.lineno)
    return found


def lacking(tree: ast.Module) -> list[str]:
    """Modules that one system lacks, imported without a look whether they are there."""
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If | ast.Try) for inner in ast.walk(node)}
    names = []
    for node in ast.walk(tree):
        if id(node) not in guarded and isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [name for name in modules if name.partition(".")[0] in POSIX]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_is_portable(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert unnamed(tree) == [], "name the encoding"
    programs = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and "\n" in str(node.value)]
    for code in (tree, *filter(None, map(parsed, programs))):
        assert lacking(code) == [], "not there on every system"


def parsed(text) -> ast.Module | None:
    """A program that stands in a string, for another process."""
    try:
        return ast.parse(text) if isinstance(text, str) else None
    except SyntaxError:
        return None


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("p.read_text()", 1),
        ("p.read_text(encoding='utf-8')", 0),
        ("p.read_text('utf-8')", 0),
        ("p.write_text(x)", 1),
        ("open(p)", 1),
        ("open(p, 'w')", 1),
        ("open('table', 'rb')", 0),
        ("p.open(mode='wb')", 0),
        ("Image.open(p)", 0),
        ("open(p, **options)", 0),
    ],
)
def test_a_missing_encoding_is_found(code, count):
    assert len(unnamed(ast.parse(code))) == count


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os, resource", ["resource"]),
        ("from fcntl import flock", ["fcntl"]),
        ("if sys.platform != 'win32':\n    import resource", []),
        ("try:\n    import pwd\nexcept ImportError:\n    pwd = None", []),
        ("from . import resource", []),
    ],
)
def test_a_module_that_one_system_lacks_is_found(code, found):
    assert lacking(ast.parse(code)) == found
