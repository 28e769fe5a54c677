"""What small files may hold: JSON read strictly, and compared with a schema.

A schema is made of plain values:

    str, bool, int, float           that type (float: whole numbers too; bool is no number)
    any other class                 that class or one derived from it: for what is not JSON, such as tensors
    Number(low, high, whole)        a number in [low, high]
    None, "text"                    this very value
    (a, b)                          one of these schemas
    [a]                             a list of such values
    {"x": a, "y?": b, str: c}       an object: `x` must be there, `y` may, all others are like c (without it: anything)

Names in an object are text wherever a schema says anything of it. What is not as described is a ValueError in one line;
`core.files` says of which file and what to do about it.
"""

import json
import math
import zlib
from dataclasses import dataclass

from core.text import one_line

DEPTH = 32  # levels of lists and objects in each other; our own files have ten
SHOWN = 40  # characters of a value in a message
LARGEST = 2**64  # above all seeds and counts; larger whole numbers do not fit into a float either, from some size on
SEAL = "crc32"  # name under which an object that we write has its checksum
NOUNS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list",
         dict: "an object"}


@dataclass(frozen=True)
class Number:
    """A number in [low, high]; a whole one unless `whole` is False."""

    low: float = 0
    high: float = math.inf
    whole: bool = True

    def __str__(self):
        bounds = f" of at least {self.low}" if self.high == math.inf else f" from {self.low} to {self.high}"
        return f"{NOUNS[int if self.whole else float]}{bounds * (self.low > -math.inf)}"


def parse(text, schema):
    """JSON text -> what it holds, compared with a schema. Raises ValueError.

    Stricter than the standard library: no NaN and no infinity, no key twice, no whole number above 64 bit, no half
    surrogate pair, at most DEPTH levels; what is `sealed` must have its checksum, which is taken out.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number,
                             parse_constant=_number)
    except RecursionError:
        raise ValueError(f"more than {DEPTH} levels of brackets") from None
    _check_depth(content)
    json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text, and could never be written
    if isinstance(content, dict) and SEAL in content and content.pop(SEAL) != _checksum(content):
        raise ValueError("it does not have its checksum")
    check(content, schema)
    return content


def sealed(content):
    """An object of plain values with a checksum, by which `parse` notices that a digit of it has become another."""
    return {**content, SEAL: _checksum(content)} if isinstance(content, dict) else content


def _checksum(content):
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _object(pairs):
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has {shown(next(name for name in names if names.count(name) > 1))} twice")
    return content


def _integer(text):
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ValueError(f"found {text[:SHOWN]}, expected whole numbers of at most 64 bit")
    return int(text)


def _number(text):
    if not math.isfinite(float(text)):
        raise ValueError(f"found {text[:SHOWN]}, expected finite numbers")
    return float(text)


def _check_depth(content):
    level, depth = [[content]], -1
    while level:  # level by level, since calls within calls would end at the same brackets as the parser
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"more than {DEPTH} levels of brackets")
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)
                 if isinstance(inner, (list, dict))]


def check(value, schema, where=""):
    """Raise ValueError unless a value is as a schema describes it; `where`: its name in the message."""
    options = schema if isinstance(schema, tuple) else (schema,)
    fitting = [option for option in options if _fits(value, option)]
    if not fitting:
        said = f"`{where}` is" if where else "found"
        raise ValueError(f"{said} {shown(value)}, expected {' or '.join(map(_described, options))}")
    if isinstance(value, list):
        for i, inner in enumerate(value):
            check(inner, fitting[0][0], f"{where}.{i}" if where else str(i))
    elif isinstance(value, dict):
        _check_object(value, fitting[0], where)


def _check_object(value, schema, where):
    named = {name.removesuffix("?"): part for name, part in schema.items() if name is not str}
    for name in schema:
        if name is not str and not name.endswith("?") and name not in value:
            raise ValueError(f"`{where}` has no `{name}`" if where else f"has no `{name}`")
    for name, inner in value.items():
        if schema and not isinstance(name, str):
            raise ValueError(f"{f'`{where}` ' if where else ''}has the name {shown(name)}, expected text")
        part = named.get(name, schema.get(str))
        if name in named or str in schema:
            check(inner, part, f"{where}.{one_line(name)[:SHOWN]}" if where else one_line(name)[:SHOWN])


def _fits(value, option):
    """Whether a value is of the kind of an option; what lists and objects hold is not looked at."""
    if isinstance(option, (list, dict)):
        return isinstance(value, type(option))
    if isinstance(option, Number):
        return _fits(value, int if option.whole else float) and option.low <= value <= option.high
    if option is float:
        return type(value) in (int, float)
    if isinstance(option, type):
        return type(value) is option if option in NOUNS else isinstance(value, option)
    return type(value) is type(option) and value == option


def _described(option):
    if isinstance(option, (list, dict)):
        return NOUNS[type(option)]
    if isinstance(option, type):
        return NOUNS.get(option, f"a {option.__name__}")
    return str(option) if isinstance(option, Number) else shown(option)


def shown(value):
    """A value in a message: as JSON where it is any, cut."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: type(other).__name__)
    except (TypeError, ValueError, RecursionError):  # names that are no text, a list within itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
