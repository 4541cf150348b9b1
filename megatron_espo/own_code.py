"""A user's own code by name: a FILE.py or an import path, and an object in either."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from megatron_espo.errors import UserError


def load_own(name: str, flag: str, what: str, unknown: UserError) -> object:
    """Import what a flag names.

    Args:
        name: a file, "FILE.py", or the import path of a module, "my_package.my_module";
            ":attribute" after either names an object in it. Of an import path the last part may be
            one, too.
        flag: what the user set, for the errors.
        what: what the file holds, for the errors.
        unknown: raised where there is no such thing.

    Returns:
        The module or the object.

    Raises:
        UserError: there is no such file, module or object.
    """
    path, colon, attribute = name.partition(":")
    if path.endswith(".py"):
        module = _import_file(Path(path), flag, what)
        if colon and not hasattr(module, attribute):
            raise unknown
        return getattr(module, attribute) if colon else module
    if not all(part.isidentifier() for part in path.split(".")):
        raise unknown
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A module that exists but imports something missing is another mistake: keep its error.
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        parent, dot, last = path.rpartition(".")
        if dot and not colon and error.name == path:
            return load_own(f"{parent}:{last}", flag, what, unknown)
        raise unknown from error
    if not colon:
        return module
    if not hasattr(module, attribute):
        raise unknown
    return getattr(module, attribute)


def _import_file(path: Path, flag: str, what: str) -> ModuleType:
    """Import a file as Python runs one: what lies beside it can be imported, too."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; give the path of your {what}'s FILE.py")
    path = path.resolve()
    # One name for one file, whatever its own is: it may be that of an installed module.
    name = f"espo_{what}_{hashlib.blake2b(bytes(path), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its name ends with .py
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
