"""A claim as its file says it: data, arms, budget, comparisons. Read and checked before anything is trained.

    system: groco
    claim: ordering by a soft sorting network uses the hardest negatives better than a softmax over them
    run: contralto.claims.groco:run      # trains and measures one arm on one seed
    data: [digits]                       # or {fashion: fashion_web}: what CONTRALTO_DATA must hold for it
    budget: {steps: 300}                 # the same for all arms
    quick: {steps: 4}                    # changes to the budget for a look at the machinery
    arms:
      groco: {loss: groco}
      untrained: {steps: 0}
    comparisons:
      - {method: groco, baseline: untrained, metric: knn, direction: higher, smallest: 0.0}

The files lie beside this one; `contralto.claims.judge` says what is made of the comparisons.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module, resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import yaml

from contralto.errors import DataError, UsageError
from contralto.systems.registry import SYSTEMS

__all__ = ["DEVELOPMENT_SEED", "ENOUGH_SEEDS", "Claim", "Comparison", "claims", "find_claim", "load_claim"]

ENOUGH_SEEDS = 5
"""With fewer, a verdict says on how many it stands."""
DEVELOPMENT_SEED = 100
"""Seeds from here on are for choosing rates and the like; what they give is never reported."""

Arms = tuple[str, ...]  # one arm, or two that stand for their difference


@dataclass(frozen=True)
class Comparison:
    """A number that speaks for the claim or against it.

    Parameters
    ----------
    method, baseline : tuple of str
        An arm each; or two arms each, for the difference of two gains: (m0 - m1) - (b0 - b1). The baseline is empty for a bound.
    metric : str
        What is compared, one of the measurements.
    direction : {"higher", "lower"}
        Which way supports the claim.
    smallest : float
        The smallest difference that counts. Below zero: the method may be worse by no more than this.
    above, below : float, optional
        Bounds that the metric of the method must keep in every seed, in place of a baseline.
    macro : bool
        Mean over classes (measurement `labels`) instead of over samples.
    part : str, optional
        Only test samples for which this measurement, an array of bool, is true.
    gate : bool
        Whether the verdict of the claim looks at it.
    """

    method: Arms
    metric: str
    baseline: Arms = ()
    direction: Literal["higher", "lower"] = "higher"
    smallest: float = 0.0
    above: float | None = None
    below: float | None = None
    macro: bool = False
    part: str | None = None
    gate: bool = True

    RESERVED: ClassVar = ("groups", "labels")

    @property
    def measure(self) -> str:
        """What is compared, in words.

        Examples
        --------
        >>> Comparison(("a",), "right", macro=True, part="rare").measure
        'right, mean over classes, rare'
        """
        return ", ".join(
            [self.metric, *(["mean over classes"] if self.macro else []), *([self.part] if self.part else [])]
        )


@dataclass(frozen=True)
class Claim:
    """What a paper says, as an experiment with paired arms; see the module for its file.

    Parameters
    ----------
    system, claim, run : str
    data : mapping of str to tuple of str
        Name -> what the folder `CONTRALTO_DATA` must hold for it.
    arms : mapping of str to mapping
        Name -> settings, handed to the function as they are.
    comparisons : tuple of Comparison
    budget, quick : mapping
    seeds : int
    verdict : {"first", "all"}
        The verdict is that of the first comparison with a gate; or all of those must hold.
    paper : str
        Default: that of the system in the registry.
    file : Path
    """

    system: str
    claim: str
    run: str
    data: Mapping[str, tuple[str, ...]]
    arms: Mapping[str, Mapping[str, Any]]
    comparisons: tuple[Comparison, ...]
    budget: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    quick: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    seeds: int = ENOUGH_SEEDS
    verdict: Literal["first", "all"] = "first"
    paper: str = ""
    file: Path = Path()

    @property
    def name(self) -> str:
        """The name of the claim: that of its file."""
        return self.file.stem

    def function(self) -> Any:
        """What trains and measures one arm on one seed."""
        module, _, name = self.run.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError) as error:
            raise self.wrong("run", f"{self.run!r} cannot be imported ({error})") from error

    def deciding(self) -> list[int]:
        """The numbers of the comparisons that decide the verdict."""
        gated = [i for i, c in enumerate(self.comparisons) if c.gate]
        return gated[:1] if self.verdict == "first" else gated

    def wrong(self, key: str, message: str) -> DataError:
        """An error that names the file and the key."""
        return _wrong(self.file, key, message)


def claims() -> dict[str, Path]:
    """The claims that ship with the package: name -> file.

    Examples
    --------
    >>> "capro" in claims()
    True
    """
    folder = Path(str(resources.files("contralto.claims")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_claim(name: str) -> Claim:
    """A claim by its name, or by the path of a file of one's own.

    Examples
    --------
    >>> find_claim("capro").system
    'capro'
    """
    known = claims()
    if name in known:
        return load_claim(known[name])
    if name.endswith((".yaml", ".yml")):
        return load_claim(Path(name))
    raise UsageError(f"no claim of {name!r} can be run; there are: {', '.join(known)}; or the path of a .yaml file")


def load_claim(path: str | Path) -> Claim:
    """Read a claim's file and check it.

    Raises
    ------
    DataError
        Names the file and the key.

    Examples
    --------
    >>> load_claim(claims()["capro"]).deciding()
    [0]
    """
    path = Path(path)
    try:
        read = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"is no YAML: {error}", file=str(path)) from error
    known = {f.name for f in fields(Claim)} - {"file"}
    values = _mapping(path, "", read, known, needed=("system", "claim", "run", "data", "arms", "comparisons"))
    for key in ("system", "claim", "run", "paper"):
        if key in values and not (isinstance(values[key], str) and values[key].strip()):
            raise _wrong(path, key, f"must be a text, got {values[key]!r}")
    if not re.fullmatch(r"[\w.]+:\w+", values["run"]):
        raise _wrong(path, "run", f"must be module:function, got {values['run']!r}")
    if values["system"] in SYSTEMS:
        values.setdefault("paper", SYSTEMS[values["system"]].paper)
    for key in ("budget", "quick"):
        values[key] = _mapping(path, key, values.get(key, {}))
    _known(path, "quick", values["quick"], set(values["budget"]))
    values["arms"] = {
        k: _mapping(path, f"arms.{k}", v or {}) for k, v in _mapping(path, "arms", values["arms"]).items()
    }
    if not values["arms"]:
        raise _wrong(path, "arms", "must name at least one arm")
    values["data"] = _data(path, values["data"])
    seeds = values.setdefault("seeds", ENOUGH_SEEDS)
    if type(seeds) is not int or seeds < 1:
        raise _wrong(path, "seeds", f"must be a whole number above 0, got {seeds!r}")
    _one_of(path, "verdict", values.setdefault("verdict", "first"), ("first", "all"))
    listed = values["comparisons"]
    if not isinstance(listed, list) or not listed:
        raise _wrong(path, "comparisons", "must be a list of at least one comparison")
    values["comparisons"] = tuple(
        _comparison(path, f"comparisons[{i}]", c, tuple(values["arms"])) for i, c in enumerate(listed)
    )
    if not any(c.gate for c in values["comparisons"]):
        raise _wrong(path, "comparisons", "must have one without `gate: false`: it is the verdict")
    return Claim(**values, file=path)


def _comparison(path: Path, key: str, read: Any, arms: tuple[str, ...]) -> Comparison:
    known = {f.name for f in fields(Comparison)}
    values = _mapping(path, key, read, known, needed=("method", "metric"))
    for name in ("method", "baseline"):
        named = values.get(name, [])
        values[name] = tuple(named) if isinstance(named, list) else (named,)
        for arm in values[name]:
            if arm not in arms:
                raise _wrong(path, f"{key}.{name}", f"no arm is called {arm!r}; there are: {', '.join(arms)}")
    sizes = len(values["method"]), len(values["baseline"])
    bound = any(values.get(k) is not None for k in ("above", "below"))
    if sizes not in ((1, 0), (2, 0), (1, 1), (2, 2)):
        raise _wrong(path, key, "must have one arm as method and as baseline, or two of each for a difference of gains")
    if bound == bool(sizes[1]):
        raise _wrong(path, key, "must have either a baseline or a bound (above, below)")
    for name in ("smallest", "above", "below"):
        value = values.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(path, f"{key}.{name}", f"must be a number, got {value!r}")
    if bound and ("smallest" in values or "direction" in values):
        raise _wrong(path, key, "a bound has neither direction nor smallest")
    _one_of(path, f"{key}.direction", values.get("direction", "higher"), ("higher", "lower"))
    for name in ("macro", "gate"):
        _one_of(path, f"{key}.{name}", values.get(name, True), (True, False))
    for name in ("metric", "part"):
        value = values.get(name, "-")
        if not isinstance(value, str) or not value or value in Comparison.RESERVED:
            raise _wrong(path, f"{key}.{name}", f"must be the name of a measurement, got {value!r}")
    return Comparison(**values)


def _data(path: Path, read: Any) -> dict[str, tuple[str, ...]]:
    """Names, or names with what `CONTRALTO_DATA` must hold; both in one list too."""
    entries = [read] if isinstance(read, dict) else read
    if not isinstance(entries, list) or not entries:
        raise _wrong(path, "data", "must be a list of names, or name: what CONTRALTO_DATA must hold")
    found: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        for name, needs in (entry if isinstance(entry, dict) else {entry: []}).items():
            listed = needs if isinstance(needs, list) else [needs]
            if not isinstance(name, str) or not all(isinstance(n, str) for n in listed):
                raise _wrong(path, "data", f"names and folders must be texts, got {name!r}: {needs!r}")
            found[name] = tuple(listed)
    return found


def _mapping(
    path: Path, key: str, read: Any, known: set[str] | None = None, needed: tuple[str, ...] = ()
) -> dict[str, Any]:
    if not isinstance(read, dict) or not all(isinstance(k, str) for k in read):
        raise _wrong(path, key, f"must be a mapping with texts as keys, got {read!r}")
    if known is not None:
        _known(path, key, read, known)
    for name in needed:
        if name not in read:
            raise _wrong(path, key, f"{name} is missing")
    return dict(read)


def _known(path: Path, key: str, read: Mapping[str, Any], known: set[str]) -> None:
    for name in read:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            told = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known)) or 'none'}"
            raise _wrong(path, f"{key}.{name}".lstrip("."), f"unknown key; {told}")


def _one_of(path: Path, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise _wrong(path, key, f"must be {' or '.join(str(a).lower() for a in allowed)}, got {value!r}")


def _wrong(path: Path, key: str, message: str) -> DataError:
    return DataError(f"{key}: {message}" if key else message, file=str(path))


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, and a key that is there twice an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [k.value for k, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
