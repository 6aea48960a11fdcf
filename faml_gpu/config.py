"""Options in a TOML file: read for `--config`, and written by a run so that it can be run again."""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from faml_gpu.errors import InputError

__all__ = ["config_text", "read_config"]


def read_config(path: str | os.PathLike[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, from a TOML file without tables: `tilt_range = [-60, 60]`.

    Parameters
    ----------
    path : of the file
    kinds : name of an option, with underscores -> type of its value, as in a signature. In the file names may be
        written with dashes.

    Raises
    ------
    InputError
        The file is missing or no TOML, holds a name that is none of these, one twice, or a value of another type.
    """
    path, names = Path(path), list(kinds)
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a TOML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a TOML file (byte {error.start} is no UTF-8)") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: brackets within brackets, too deep") from None
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name.removeprefix("no_"), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(names))}"
            raise InputError(f"{path}: found {key}, which is no option; {hint}")
        if name in found:
            raise InputError(f"{path}: found {name} twice, with a dash and with an underscore")
        if isinstance(value, dict):
            raise InputError(f"{path}: found a table {key}, expected a value")
        if not _fits(value, kinds[name]):
            raise InputError(f"{path}: {key} is {_toml(value):.60}, expected {_expected(kinds[name])}")
        found[name] = value
    return found


def _fits(value: Any, kind: Any) -> bool:
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in of)
    if origin is Literal:
        return value in of
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(of) and all(map(_fits, value, of))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind is Any or isinstance(value, str if kind is Path else kind)


def _expected(kind: Any) -> str:
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_expected(each) for each in of if each is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(map(str, of))
    if origin is tuple:
        return f"[{', '.join(map(_expected, of))}]"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text in quotes")


def config_text(values: Mapping[str, Any], automatic: Mapping[str, Any], heading: str = "") -> str:
    """TOML of option values; None is left out.

    values : strings, numbers, booleans, and lists of these
    automatic : what None came to, told in a comment
    heading : comment above
    """
    lines = [f"# {line}" for line in heading.splitlines()]
    for name, value in values.items():
        if value is not None:
            lines.append(f"{name} = {_toml(value)}")
        elif automatic.get(name) is not None:
            found = automatic[name]
            found = float(f"{found:.6g}") if isinstance(found, float) else found
            lines.append(f"# {name} = {_toml(found)}   (automatic)")
    return "\n".join([*lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # inf and nan are TOML, not JSON
    # Of strings, numbers and booleans JSON is TOML, but for a control character that JSON does not escape.
    if not isinstance(value, (str, int, float)):
        return str(value)  # a date, in a file that is refused
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
