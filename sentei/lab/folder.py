"""Whether a folder can take what the lab writes: found out before anything is measured, which takes minutes."""

import os
from pathlib import Path

from sentei.core.errors import FileError, SenteiError, shown
from sentei.core.storage import read_json, require_writable
from sentei.lab import page
from sentei.lab.finding import Finding
from sentei.lab.records import SCHEMA
from sentei.lab.table import CLAIMS


def require_ready(out: Path) -> None:
    """Makes the folder if there is none, and reads every record kept there: one that is broken would end the page.

    Raises:
        FileError: a file named as a claim's record that is none, or that no page can be made of.
        ResourceError: the folder cannot be written.
    """
    files = {name: out / f"{name}.json" for name in CLAIMS}
    require_writable(out, *files.values(), page.path(out))
    for name, path in files.items():
        if os.path.lexists(path):
            _require_record(name, path)


def _require_record(name: str, path: Path) -> None:
    """That a file is a record of a claim, of which the page can be made."""
    try:
        record = read_json(path)
        if (record.get("schema"), record.get("name")) != (SCHEMA, name):
            got = shown({key: record.get(key) for key in ("schema", "name")})
        else:
            page.render({name: (record, Finding.from_json(record.get("finding")))})
            return
    except SenteiError as error:
        got = error.got
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # whatever it lacks
        got = shown(error)
    raise FileError(str(path), expected=f"what sentei lab {name} keeps there", got=got,
                    do="remove it, or name another folder with --out")
