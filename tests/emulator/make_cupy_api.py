"""Write cupy_api.json: what CuPy has, so that the stand-in has no more. Needs CuPy, no GPU.

For each namespace, name to its parameters: null for what is no function, a list of [name, kind] for functions, where
kind is `p` (by position or name), `k` (by name only), `*` or `**`.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["FILE", "current_api", "main"]

FILE = Path(__file__).with_name("cupy_api.json")
NAMESPACES = ["cupy", "cupy.ndarray", "cupy.fft", "cupy.linalg", "cupyx", "cupyx.scipy.fft"]
KINDS = {"POSITIONAL_ONLY": "p", "POSITIONAL_OR_KEYWORD": "p", "KEYWORD_ONLY": "k", "VAR_POSITIONAL": "*"}


def parameters(thing: Any) -> list[list[str]] | None:
    """Parameters of a function, from its signature or (Cython) the first line of its docstring."""
    if isinstance(thing, type) or not callable(thing):
        return None
    if type(thing).__name__ == "ufunc":  # cupy._core._kernel.ufunc: what its __call__ takes
        return [["args", "*"], ["out", "k"], ["dtype", "k"], ["casting", "k"]]
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        line = re.match(r"\w+\.\w+\((.*?)\)(?: ->.*)?(?:\n|$)", thing.__doc__ or "")
        if line is None:
            return [["args", "*"], ["kwargs", "**"]]
        found = []
        for part in line[1].split(", "):  # "self", "axis=None", "*shape", "int axis=-1", "_ndarray_base out=None"
            name = part.split("=")[0].split()[-1] if part else "self"
            found.append([name.lstrip("*"), "*" * name.count("*") or "p"])
        return [item for item in found if item[0] != "self"]
    return [
        [name, KINDS.get(parameter.kind.name, "**")]
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]


def current_api() -> dict[str, Any]:
    """The API of the CuPy installed here."""
    import cupy
    import cupyx
    import cupyx.scipy.fft

    homes = {"cupy": cupy, "cupyx": cupyx}
    api: dict[str, Any] = {"version": cupy.__version__}
    for namespace in NAMESPACES:
        first, *rest = namespace.split(".")
        home = homes[first]
        for part in rest:
            home = getattr(home, part)
        private = {"__call__"} if namespace == "cupy.ndarray" else None
        names = [n for n in dir(home) if not n.startswith("_") or (private is not None and re.fullmatch("__.*__", n))]
        api[namespace] = {
            name: parameters(getattr(home, name)) for name in names if not inspect.ismodule(getattr(home, name))
        }
    return api


def main() -> None:
    """Write the file, one line a name."""
    lines = []
    for namespace, names in current_api().items():
        if isinstance(names, str):
            lines.append(f"{json.dumps(namespace)}: {json.dumps(names)}")
            continue
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in names.items())
        lines.append(f"{json.dumps(namespace)}: {{\n{rows}\n}}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
