"""The house rules, read from the source: direction, names, sizes, docstrings, forbidden calls, and what tests skip.

Each guard is a function from a repository's root to the list of what is wrong with it. It is run on this repository,
and on small broken ones, so that a guard that cannot fail is itself a failure.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOWER = {"core", "kernels", "axes"}
TRAINING = LOWER | {"model", "conversion", "measurement"}

# What each part of the package may import, beside itself. A part that is not listed may not exist.
FLOORS = {
    "core": set(),
    "kernels": {"core"},
    "axes": {"core", "kernels"},
    "geometry": {"core"},
    "circuit": {"core"},
    "measurement": LOWER | {"geometry"},
    "conversion": LOWER,
    "benches": LOWER | {"conversion", "measurement"},
    "model": LOWER,
    "training": TRAINING,
    "lab": TRAINING | {"training", "benches", "geometry", "circuit"},
    "budget": TRAINING | {"training"},
    "pipeline": LOWER | {"conversion", "measurement", "budget"},
    "commands": TRAINING | {"training", "budget", "pipeline", "benches", "geometry", "circuit", "lab"},
    "cli": {"core", "commands"},
    "__main__": {"cli"},
    "__init__": TRAINING | {"training", "budget", "pipeline", "geometry", "circuit"},
}
IMPLEMENTATION = re.compile(r"sentei\.kernels\.\w+\.(reference|eager|flex|fused_\w+)")
# Modules imported inside functions alone: they import triton, or what torch.distributed brings along.
LATE = re.compile(r"(.*\.)?(triton_\w+|training\.distributed|training\.shards)")
BAD_STEMS = {"utils", "common", "helpers", "base", "misc", "manager", "torch", "triton"}
BAD_SUFFIXES = ("_v2", "_new", "_legacy")
MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_FIELDS = 400, 600, 60, 8, 8
BAD_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
BAD_CALLS = {"eval", "exec", "torch.load", "os.getenv", "os.putenv", "os.system"}
BAD_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
ENVIRONMENT = {("sentei/commands/verb.py", "TERM")}  # which file may read which variable
SKIPS = {"skip", "skipif", "importorskip", "xfail"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path, *folders: str) -> dict[str, ast.Module]:
    """The parsed Python files under `folders`, by their path from `root`."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def module_name(path: str) -> str:
    """sentei/core/rules.py → sentei.core.rules; a package has the name of its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part(module: str) -> str:
    """sentei.core.rules → core; the package root itself is `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def dotted(node: ast.expr) -> str:
    """a.b.c as a string; "" for anything else."""
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def nodes(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """All nodes, or only those that run when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if inside_functions or not isinstance(child, Function | ast.Lambda):
            yield child
            yield from nodes(child, inside_functions=inside_functions)


def imports(tree: ast.Module, modules: set[str], *, inside_functions: bool) -> Iterator[str]:
    """The names of sentei's modules that `tree` imports, also by `import_module` of a literal."""
    for node in nodes(tree, inside_functions=inside_functions):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in modules else "." * node.level + (node.module or "") for name in full]
            found += ["sentei"] if node.module == "sentei" else []
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            found = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        yield from (name for name in found if re.match(r"\.|sentei(\.|$)", name))


def wrong_directions(root: Path) -> list[str]:
    """Imports that lead upwards, across, or through the package root."""
    wrong = []
    trees = sources(root, "sentei")
    modules = {module_name(path) for path in trees}
    for path, tree in trees.items():
        here, room = module_name(path), re.fullmatch(r"sentei/axes/((?!__init__|axis)\w+)(\.py|/\w+\.py)", path)
        if part(here) not in FLOORS:
            wrong.append(f"{path} is on no floor")
            continue
        for name in imports(tree, modules, inside_functions=True):
            if name.startswith("."):
                wrong.append(f"{path} imports relatively")
            elif name == "sentei":
                wrong.append(f"{path} imports the package root")
            elif part(name) != part(here) and part(name) not in FLOORS[part(here)]:
                wrong.append(f"{path} imports {name} of another floor")
            elif room and part(name) == "axes" and name != "sentei.axes.axis" and name.split(".")[2:3] != [room[1]]:
                wrong.append(f"{path} is a room and imports {name}")
            elif IMPLEMENTATION.fullmatch(here) and IMPLEMENTATION.fullmatch(name):
                wrong.append(f"{path} is an implementation and imports {name}")
    return wrong


def cycles(root: Path) -> list[str]:
    """Modules that reach themselves by imports made while importing."""
    trees = sources(root, "sentei")
    names = {module_name(path) for path in trees}
    graph = {module_name(path): set(imports(tree, names, inside_functions=False)) & names
             for path, tree in trees.items()}

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    return [f"{name} imports itself in the end" for name in sorted(graph) if name in reached(name)]


def bad_names(root: Path) -> list[str]:
    """Files and folders whose name says nothing, or says that there are two."""
    paths = [path for folder in ("sentei", "tests", "benchmarks", "examples", "docs")
             for path in (root / folder).rglob("*")]
    return [f"{path.relative_to(root)} needs a name that says what it holds" for path in paths
            if path.stem in BAD_STEMS or path.stem.endswith(BAD_SUFFIXES)]


def too_large(root: Path) -> list[str]:
    """Files, functions, parameter lists and configs above their ceiling."""
    wrong = []
    for path, tree in sources(root, "sentei", "tests", "benchmarks", "examples", "docs").items():
        limit = MAX_KERNEL_LINES if path.startswith("sentei/kernels/") else MAX_LINES
        lines = len((root / path).read_text(encoding="utf-8").splitlines())
        if lines > limit:
            wrong.append(f"{path} has {lines} lines of {limit}")
        for node in ast.walk(tree):
            if isinstance(node, Function):
                length, arguments = node.end_lineno - node.lineno + 1, node.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a]
                count = len([name for name in names if name not in ("self", "cls")])
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{path} {node.name} has {length} lines of {MAX_FUNCTION_LINES}")
                if count > MAX_PARAMETERS:
                    wrong.append(f"{path} {node.name} has {count} parameters of {MAX_PARAMETERS}")
            elif isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
                if fields > MAX_FIELDS:
                    wrong.append(f"{path} {node.name} has {fields} fields of {MAX_FIELDS}")
    return wrong


def undocumented(root: Path) -> list[str]:
    """Public modules, functions, classes and methods without a docstring; an override may rely on what it overrides."""
    trees = sources(root, "sentei")
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def documented(cls: ast.ClassDef, method: str) -> bool:
        above = [classes[dotted(base).split(".")[-1]] for base in cls.bases if dotted(base).split(".")[-1] in classes]
        own = [item for item in cls.body if isinstance(item, Function) and item.name == method]
        return any(map(ast.get_docstring, own)) or any(documented(base, method) for base in above if base is not cls)

    wrong = []
    for path, tree in trees.items():
        wrong += [] if ast.get_docstring(tree) else [f"{path} has no docstring"]
        for node in tree.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            wrong += [] if ast.get_docstring(node) else [f"{path} {node.name} has no docstring"]
            methods = [item.name for item in getattr(node, "body", []) if isinstance(item, Function)]
            if isinstance(node, ast.ClassDef):
                wrong += [f"{path} {node.name}.{method} has no docstring" for method in dict.fromkeys(methods)
                          if not method.startswith("_") and not documented(node, method)]
    return wrong


def forbidden_calls(root: Path) -> list[str]:
    """Ways to run code from a file, to reach a shell, and to depend on the environment."""
    wrong = []
    for path, tree in sources(root, "sentei").items():
        variables = [dotted(node.args[0]) or getattr(node.args[0], "value", "") for node in ast.walk(tree)
                     if isinstance(node, ast.Call) and dotted(node.func) == "os.environ.get" and node.args]
        allowed = [name for name in variables if (path, name) in ENVIRONMENT]
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node) == "os.environ"]
        wrong += [f"{path} uses os.environ"] if len(uses) > len(allowed) else []
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            full = names + [f"{node.module}.{name}" for name in names if isinstance(node, ast.ImportFrom)]
            full += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path} imports {name}" for name in full
                      if name.split(".")[0] in BAD_MODULES or name in BAD_CALLS | {"os.environ"}]
            if isinstance(node, ast.Call):
                wrong += [f"{path} calls {dotted(node.func)}"] if dotted(node.func) in BAD_CALLS else []
                wrong += [f"{path} passes {keyword.arg}" for keyword in node.keywords if keyword.arg in BAD_KEYWORDS
                          and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)]
    return wrong


def found_skips(root: Path) -> set[str]:
    """`tests/file.py::function`, or the file alone, for every skip and expected failure in the tests."""
    found = set()

    def visit(node: ast.AST, where: str, path: str) -> None:
        if isinstance(node, Function) or isinstance(node, ast.ClassDef):
            where = f"{path}::{node.name}"
        if isinstance(node, ast.ImportFrom) and node.module == "pytest":
            found.update(where for alias in node.names if alias.name in SKIPS | {"mark"})
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(pytest|unittest)(\.mark)?\.\w+", dotted(node)):
            found.update({where} if node.attr in SKIPS else ())
        for child in ast.iter_child_nodes(node):
            visit(child, where, path)

    for path, tree in sources(root, "tests").items():
        visit(tree, path, path)
    return found


def unlisted_skips(root: Path) -> list[str]:
    """Skips that SKIPS.md does not list, and lines of SKIPS.md that stand for nothing."""
    text = (root / "tests" / "SKIPS.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| *`?(tests/[^`| ]+)`? *\|", text, flags=re.MULTILINE))
    found = found_skips(root)
    return ([f"{where} skips and is not in SKIPS.md" for where in sorted(found - listed)]
            + [f"{where} is in SKIPS.md and does not skip" for where in sorted(listed - found)])


GUARDS = [wrong_directions, cycles, bad_names, too_large, undocumented, forbidden_calls, unlisted_skips]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_the_house_keeps_its_rules(guard):
    assert guard(ROOT) == []


DOC = '"""What it is."""\n'
LONG = DOC + "def f():\n" + "    x = 1\n" * 60
WIDE = DOC + "def f(self, a, b, c, d, *e, f, g, h, i, **k): ...\n"
BIG = DOC + "class RoomConfig:\n" + "".join(f"    a{i}: int\n" for i in range(9))
METHOD = DOC + "class A:\n    '''A.'''\n    def f(self): ...\n"
BROKEN = [
    (wrong_directions, {"sentei/core/a.py": "def f():\n    import sentei.kernels.b\n"}, "imports sentei.kernels.b"),
    (wrong_directions, {"sentei/core/a.py": "importlib.import_module('sentei.cli')"}, "core/a.py imports sentei.cli"),
    (wrong_directions, {"sentei/conversion/a.py": "from sentei.measurement import b", "sentei/measurement/b.py": ""},
     "conversion/a.py imports sentei.measurement.b"),
    (wrong_directions, {"sentei/measurement/a.py": "from sentei.budget.b import c"}, "imports sentei.budget.b"),
    (wrong_directions, {"sentei/circuit/a.py": "from sentei.axes import AXES"}, "circuit/a.py imports sentei.axes"),
    (wrong_directions, {"sentei/pipeline.py": "from sentei.cli import main"}, "pipeline.py imports sentei.cli"),
    (wrong_directions, {"sentei/cli.py": "import sentei"}, "cli.py imports the package root"),
    (wrong_directions, {"sentei/cli.py": "from sentei import pipeline", "sentei/pipeline.py": ""},
     "cli.py imports the package root"),
    (wrong_directions, {"sentei/core/a.py": "from .b import c"}, "core/a.py imports relatively"),
    (wrong_directions, {"sentei/core/a.py": "from . import b"}, "core/a.py imports relatively"),
    (wrong_directions, {"sentei/attic/a.py": ""}, "attic/a.py is on no floor"),
    (wrong_directions, {"sentei/axes/rank.py": "from sentei.axes.depth import Depth"},
     "is a room and imports sentei.axes.depth"),
    (wrong_directions, {"sentei/axes/rank.py": "from sentei.axes import AXES"}, "is a room and imports sentei.axes"),
    (wrong_directions, {"sentei/axes/rank/a.py": "from sentei.axes.depth import Depth"},
     "is a room and imports sentei.axes.depth"),
    (wrong_directions, {"sentei/kernels/attention/eager.py": "from sentei.kernels.attention.reference import attend"},
     "is an implementation and imports sentei.kernels.attention.reference"),
    (wrong_directions, {"sentei/kernels/routing/fused_cpp.py": "from sentei.kernels.attention import eager",
                        "sentei/kernels/attention/eager.py": ""}, "imports sentei.kernels.attention.eager"),
    (cycles, {"sentei/core/a.py": "import sentei.core.b", "sentei/core/b.py": "from sentei.core import c",
              "sentei/core/c.py": "try:\n    from sentei.core.a import x\nfinally: ..."},
     "sentei.core.a imports itself"),
    (bad_names, {"sentei/core/utils.py": ""}, "utils.py needs a name"),
    (bad_names, {"tests/helpers/a.py": ""}, "tests/helpers needs a name"),
    (bad_names, {"sentei/core/rules_v2.py": ""}, "rules_v2.py needs a name"),
    (too_large, {"sentei/core/a.py": "\n" * 401}, "core/a.py has 401 lines of 400"),
    (too_large, {"sentei/kernels/a.py": "\n" * 601}, "kernels/a.py has 601 lines of 600"),
    (too_large, {"tests/test_a.py": LONG}, "f has 61 lines of 60"),
    (too_large, {"sentei/core/a.py": WIDE}, "f has 10 parameters of 8"),
    (too_large, {"sentei/axes/a.py": BIG}, "RoomConfig has 9 fields of 8"),
    (undocumented, {"sentei/core/a.py": "x = 1"}, "core/a.py has no docstring"),
    (undocumented, {"sentei/core/a.py": DOC + "def f(): ..."}, "a.py f has no docstring"),
    (undocumented, {"sentei/core/a.py": DOC + "class A: ..."}, "a.py A has no docstring"),
    (undocumented, {"sentei/core/a.py": METHOD}, "a.py A.f has no docstring"),
    (forbidden_calls, {"sentei/core/a.py": "import torch\ntorch.load('x')"}, "calls torch.load"),
    (forbidden_calls, {"sentei/core/a.py": "from torch import load"}, "imports torch.load"),
    (forbidden_calls, {"sentei/core/a.py": "def f():\n    import pickle"}, "imports pickle"),
    (forbidden_calls, {"sentei/core/a.py": "from pickle import loads"}, "imports pickle"),
    (forbidden_calls, {"sentei/core/a.py": "eval('1')"}, "calls eval"),
    (forbidden_calls, {"sentei/core/a.py": "exec('1')"}, "calls exec"),
    (forbidden_calls, {"sentei/core/a.py": "f(trust_remote_code=True)"}, "passes trust_remote_code"),
    (forbidden_calls, {"sentei/core/a.py": "f(trust_remote_code=x)"}, "passes trust_remote_code"),
    (forbidden_calls, {"sentei/core/a.py": "import os\nos.environ['A'] = '1'"}, "uses os.environ"),
    (forbidden_calls, {"sentei/core/a.py": "import os\nos.environ.get('TERM')"}, "uses os.environ"),
    (forbidden_calls, {"sentei/commands/verb.py": "import os\nos.environ.get('HOME')"}, "uses os.environ"),
    (forbidden_calls, {"sentei/core/a.py": "from os import environ"}, "imports os.environ"),
    (unlisted_skips, {"tests/test_a.py": "import pytest\n@pytest.mark.skipif(True)\ndef test_b(): ..."},
     "tests/test_a.py::test_b skips and is not in SKIPS.md"),
    (unlisted_skips, {"tests/test_a.py": "import pytest\npytest.importorskip('x')"}, "tests/test_a.py skips"),
    (unlisted_skips, {"tests/SKIPS.md": "| `tests/test_a.py::test_b` | gone |"}, "is in SKIPS.md and does not skip"),
]


@pytest.mark.parametrize("guard, files, message", BROKEN, ids=[f"{guard.__name__}-{text}" for guard, _, text in BROKEN])
def test_a_broken_house_is_noticed(tmp_path, guard, files, message):
    for path, text in {"tests/SKIPS.md": "", **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert any(message in wrong for wrong in guard(tmp_path)), guard(tmp_path)


def test_a_good_house_is_left_in_peace(tmp_path):
    files = {
        "sentei/__init__.py": DOC + "from sentei.core.a import A\nfrom sentei.axes.rank import Rank\n",
        "sentei/core/a.py": DOC + "class A:\n    '''A.'''\n    def f(self):\n        '''Does.'''\n"
                            "    def _g(self): ...\n",
        "sentei/axes/axis.py": DOC,
        "sentei/axes/rank.py": DOC + "import sentei.axes.axis\nfrom sentei.core.a import A\n"
                               "class Rank(A):\n    '''R.'''\n    def f(self):\n        model.eval()\n",
        "sentei/commands/verb.py": DOC + "import os\nos.environ.get('TERM')\nf(trust_remote_code=False)\n",
        "tests/test_a.py": "import pytest\ndef test_b():\n    pytest.skip('why')\n",
        "tests/SKIPS.md": "| `tests/test_a.py::test_b` | why | when |\n",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert {guard.__name__: guard(tmp_path) for guard in GUARDS} == {guard.__name__: [] for guard in GUARDS}


@pytest.mark.parametrize("which", ["the package", "every module"])
def test_import_loads_torch_and_nothing_else(which):
    """In a fresh interpreter, so that what other tests imported does not count."""
    every = [name for name in map(module_name, sources(ROOT, "sentei")) if not LATE.fullmatch(name)]
    every = sorted(every) if which == "every module" else ["sentei"]
    code = (f"import sys, torch; before = set(sys.modules); import {', '.join(every)}; assert sentei.__file__; "
            "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["sentei"]


def rooms_in_readme(text: str) -> list[str]:
    """The names in backticks of the first column of the table headed `| room |`."""
    table = re.search(r"^\| *room *\|.*\n\|[-:| ]+\|\n((?:\|.*\n?)+)", text, flags=re.MULTILINE)
    assert table, "README.md has no table headed | room |"
    return re.findall(r"^\| *`(\w+)`", table[1], flags=re.MULTILINE)


def test_the_rooms_are_those_of_the_readme():
    from sentei.axes import AXES

    axes = ROOT / "sentei" / "axes"
    files = {path.stem for path in [*axes.glob("*.py"), *(path.parent for path in axes.glob("*/__init__.py"))]}
    files -= {"__init__", "axis"}
    assert list(AXES) == rooms_in_readme((ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(AXES) == files


def test_the_table_of_rooms_is_read_from_the_readme_alone():
    rooms = "| room | query |\n|---|---|\n| `rank` | `token` |\n| `depth` | z |\n"
    text = f"| verb | x |\n|---|---|\n| `prune` | y |\n\n{rooms}\n`no`"
    assert rooms_in_readme(text) == ["rank", "depth"]
    with pytest.raises(AssertionError, match="no table"):
        rooms_in_readme("| verb |\n|---|\n| `prune` |\n")
