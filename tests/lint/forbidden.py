"""What must not stand in the project's code: loaders that can run what they load, and ties to one machine.

`find(source)` gives the findings in one Python file, `find_paths(text)` those in any text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
PATH = re.compile(
    r"""(?<![\w.~/<>-])/(?:work|workspace|root|opt|mnt|srv|tmp|data|scratch|home/\w+|Users/\w+)(?=/|["'\s]|$)"""
)


def find(source: str) -> list[str]:
    """Findings as `line: what`, in the order of the lines."""
    tree = ast.parse(source)
    findings = [*_imports(tree), *_calls(tree)]
    return [f"{line}: {what}" for line, what in sorted(findings)] + find_paths(source)


def find_paths(text: str) -> list[str]:
    """Absolute paths of one machine, as `line: what`."""
    return [
        f"{number}: path of one machine: {match.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for match in PATH.finditer(line)
    ]


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "yaml":
                bad = {alias.name for alias in node.names} & UNSAFE_YAML
                yield from ((node.lineno, f"yaml.{name}: use safe_load") for name in bad)
        for name in names:
            if name.split(".")[0] in UNSAFE_MODULES:
                yield node.lineno, f"import of {name}: it runs what it loads"


def _calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _one_call(node))


def _one_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rsplit(".", 1)[-1]
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if name in {f"yaml.{bad}" for bad in UNSAFE_YAML}:
        yield f"{name}: use yaml.safe_load"
    if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
        yield f"{name}() runs text as code"
    if name == "os.system" or ("shell" in keywords and not _is(keywords["shell"], False)):
        yield "a command run through the shell"
    if "allow_pickle" in keywords and not _is(keywords["allow_pickle"], False):
        yield "allow_pickle other than False"
    if "trust_remote_code" in keywords:
        yield "trust_remote_code is never passed"
    if isinstance(node.func, ast.Attribute) and last == "cuda" and not name.startswith("torch.cuda"):
        yield ".cuda(): use .to(device)"
    yield from _float64_on_device(name, last, node, keywords)


def _float64_on_device(
    name: str, last: str, node: ast.Call, keywords: dict[str | None, ast.expr]
) -> Iterator[str]:
    """float64 that may land on an accelerator, some of which do not have it; on the CPU it is welcome."""
    if name == "torch.set_default_dtype" and any(map(_float64, node.args)):
        yield "float64 as the default of every device"
    values = [*node.args, *keywords.values()]
    others = [value for value in values if not _float64(value)]
    if len(others) == len(values):
        return
    device = keywords.get("device") or (others[0] if last == "to" and others else None)
    if device is not None and not _cpu(device):
        yield f"float64 on a device: {ast.unparse(node)}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _float64(node: ast.expr) -> bool:
    return ast.unparse(node) in ("torch.float64", "torch.double")


def _cpu(node: ast.expr) -> bool:
    return ast.unparse(node) in ("'cpu'", "torch.device('cpu')")
