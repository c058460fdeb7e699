"""Checks that every entry point of this room shares."""

from torch import Tensor


def as_rows(Z: Tensor, name: str) -> Tensor:
    """Check a matrix of states and bring it to float32, where all computation happens.

    Args:
        Z: rows to check, [N, D], any floating dtype, any device; N = 0 is allowed.
        name: what the caller calls the matrix, for the error.

    Returns:
        The detached rows in float32, [N, D], on the same device.

    Raises:
        ValueError: if `Z` is no floating matrix or a row holds NaN or infinity.
    """
    if Z.ndim != 2 or not Z.is_floating_point():
        raise ValueError(
            f"`{name}` must be a floating tensor [rows, width], got {Z.dtype} {list(Z.shape)}: stack one state per row"
        )
    Z = Z.detach().float()
    n_bad = int((~Z.isfinite().all(dim=1)).sum())
    if n_bad:
        raise ValueError(
            f"`{name}` must be finite, but {n_bad} of {len(Z)} rows hold NaN or infinity: "
            "drop them or extract them again in a wider dtype (bfloat16 or float32)"
        )
    return Z


def check_at_least(value: float, minimum: float, name: str) -> None:
    """Raise a ValueError unless `value` is at least `minimum` (NaN is not)."""
    if not minimum <= value < float("inf"):
        raise ValueError(f"`{name}` must be at least {minimum} and finite, got {value}")


def check_whole(value: int, minimum: int, name: str) -> None:
    """Raise a ValueError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or value != int(value):
        raise ValueError(f"`{name}` must be a whole number, got {value}")
    check_at_least(value, minimum, name)


def check_same_width(A: Tensor, B: Tensor, names: tuple[str, str]) -> None:
    """Raise a ValueError unless the rows of both matrices have the same width D."""
    if A.shape[1] != B.shape[1]:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have the same width, got {A.shape[1]} and {B.shape[1]}: "
            "read both at the same site of models with the same hidden size"
        )
