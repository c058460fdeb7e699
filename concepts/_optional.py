"""The one place that looks for optional dependencies."""

from importlib.util import find_spec


def require(packages: tuple[str, ...], extra: str) -> None:
    """Raise a ValueError that names the extra to install unless all of its packages are there."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f'{", ".join(missing)} not found: pip install "conceptshift[{extra}]"')
