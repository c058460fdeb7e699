"""Published scores to lay beside one's own."""

from typing import Any

_SOURCE = "CoX-LMM (arXiv 2406.08074), DePALM, 20 concepts"
_CLIP_METHODS = ("SemiNMF", "Simple", "Random words", "Ground-truth captions")
_CLIP_SCORE = {
    "dog": (0.610, 0.546, 0.519, 0.783),
    "bus": (0.634, 0.667, 0.507, 0.736),
    "train": (0.646, 0.642, 0.496, 0.727),
    "cat": (0.627, 0.589, 0.539, 0.798),
}
_OVERLAP_METHODS = ("Simple", "PCA", "KMeans", "SemiNMF")
_OVERLAP = {
    "dog": (0.371, 0.004, 0.501, 0.086),
    "bus": (0.622, 0.002, 0.487, 0.177),
    "train": (0.619, 0.015, 0.367, 0.107),
    "cat": (0.452, 0.000, 0.500, 0.146),
}


def published_scores(selector: str) -> dict[str, Any] | None:
    """Return what CoX-LMM reports for a token of interest.

    Args:
        selector: Selector of the states, e.g. `token_of_interest:dog`.

    Returns:
        "source", "CLIPScore" and "Overlap" (both method → value); nothing for a token that was not published.
    """
    kind, _, token = selector.partition(":")
    if kind != "token_of_interest" or token not in _CLIP_SCORE:
        return None
    return {
        "source": _SOURCE,
        "CLIPScore": dict(zip(_CLIP_METHODS, _CLIP_SCORE[token], strict=True)),
        "Overlap": dict(zip(_OVERLAP_METHODS, _OVERLAP[token], strict=True)),
    }


_VISUAL_SOURCE = "Towards Interpreting Visual Information Processing (arXiv 2410.07149), LLaVA-1.5-7B on COCO"
_ABLATION = {
    "object+1": {"generative": 0.718, "polling": 0.513, "vqa": 0.867},
    "random:40": {"generative": 0.024, "polling": 0.0, "vqa": 0.0},
}
_KNOCKOUT = {
    "object+1 -> last @ mid-late": 0.82,
    "object+1 -> last @ all": 0.67,
    "image -> last_row @ all": 1.0,
}


def published_ablation() -> dict[str, Any]:
    """Return what is reported of answers that become wrong when visual tokens are replaced by the mean one.

    Returns:
        "source", and "became_wrong": set of tokens → setting → share of the answers that were right. The object with
        one ring of neighbours has about 33 tokens there.
    """
    return {"source": _VISUAL_SOURCE, "became_wrong": {name: dict(shares) for name, shares in _ABLATION.items()}}


def published_knockout() -> dict[str, Any]:
    """Return what is reported of answers that stay right when attention is knocked out.

    Returns:
        "source", and "relative_accuracy": name of the knockout → share of the answers that were right.
    """
    return {"source": _VISUAL_SOURCE, "relative_accuracy": dict(_KNOCKOUT)}


def published_lens() -> dict[str, Any]:
    """Return what is reported of object tokens that decode to the class of the object.

    Returns:
        "source", "share" at the best layer, "layer" (on average, counted from 0 for what enters the language model) and
        "layers".
    """
    return {"source": _VISUAL_SOURCE, "share": 0.237, "layer": 25.7, "layers": 33}
