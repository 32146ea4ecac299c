"""Regular expressions of a PEFT configuration, matched in time linear in the name by an automaton (RE2).

PEFT takes the keys of rank_pattern and alpha_pattern as `(.*\\.)?(key)$` under Python's `re`, which can take
exponential time on a key that a stranger wrote.
"""

import functools
import re

import re2

from hydraopt_jax.errors import HydraOptError, one_line

# characters of a key, and of a module's name that is matched
MAX_KEY, MAX_NAME = 1000, 400
# instructions of one field's automata together, those of keys with repeats or choices counted 16 times: they
# bound what a character of a name may cost
MAX_PROGRAM, WEIGHT = 1 << 19, 16
# an escaped name and nothing else, as `peft_config.unit_scale_config` writes it
_WHOLE_NAME = re.compile(r"\^((?:[^\\.^$*+?{}\[\]|()]|\\[^a-zA-Z0-9])+)", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
# what Python and RE2 both take and read differently
_DIFFERENT = ("[:", "{,")
# classes and folded cases that are Unicode's in Python and ASCII's in RE2
_UNICODE = re.compile(r"\\[wWdDsSbB]|\(\?[a-z]*i")

_options = re2.Options()
_options.log_errors = False
_options.max_mem = 1 << 17


def compile_key(key: str) -> re2._Regexp:
    """The automaton of a key as PEFT matches it.

    Raises:
      HydraOptError: no regular expression, or one with a feature that linear time does not allow.
    """
    if len(key) > MAX_KEY:
        raise HydraOptError(f"key {key[:60]!r}...: longer than {MAX_KEY} characters: name the modules")
    different = next((x for x in _DIFFERENT if x in key), None)
    if different is not None:
        raise HydraOptError(f"key {key!r}: {different!r} is not supported: name the modules")
    try:
        # alone first: the parentheses around it must not make it one
        re2.compile(key, _options)
        return re2.compile(rf"(?:.*\.)?(?:{key})\n?\z", _options)
    except re2.error as error:
        reason = b"".join(x for x in error.args if isinstance(x, bytes)).decode(errors="replace")
        raise HydraOptError(
            f"key {key!r} is no regular expression of linear time, which has no backreferences and no "
            f"lookaround ({one_line(reason, 80)}): name the modules"
        ) from None


@functools.lru_cache(maxsize=8)
def compile_keys(keys: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[int, re2._Regexp]]]:
    """Positions of keys that are `^` and an escaped name, by that name; and the others with their automata.

    Raises:
      HydraOptError: see `compile_key`; or all keys together are too large.
    """
    names: dict[str, int] = {}
    others = []
    size = 0
    for n, key in enumerate(keys):
        if _WHOLE_NAME.fullmatch(key):
            names.setdefault(_ESCAPE.sub(r"\1", key[1:]), n)
            continue
        automaton = compile_key(key)
        others.append((n, automaton))
        size += automaton.programsize * (WEIGHT if any(x in key for x in "*+{|?") else 1)
        if size > MAX_PROGRAM:
            raise HydraOptError("its keys are too large together: name fewer modules")
    return names, others


def first_match(keys: tuple[str, ...], name: str) -> int | None:
    """Position of the first key that matches a module's name as PEFT matches it, `(.*\\.)?(key)$`.

    Raises:
      HydraOptError: a bad key, or a name that it cannot be matched against.

    >>> first_match(("v_proj", r"layers\\.\\d+\\.q"), "model.layers.10.q")
    1
    """
    names, others = compile_keys(keys)
    best = names.get(name)
    for n, automaton in others:
        if best is not None and n > best:
            break
        if len(name) > MAX_NAME or not name.isprintable() or not (name.isascii() or _same(keys[n])):
            raise HydraOptError(
                f"module {name[:60]!r}: too long, or of characters that key {keys[n]!r} is not matched "
                "against: name the modules"
            )
        if automaton.match(name) is not None:
            return n
    return best


def _same(key: str) -> bool:
    """Whether a key means the same to both engines for names beyond ASCII."""
    return _UNICODE.search(key) is None
