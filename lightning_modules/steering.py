"""Steering as a configuration says it: which file, where, how strongly, and whom."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..concepts import SteeringVectors, content_hash, load_dictionary, load_steering_vectors
from ..records.hashes import value_hash
from ..records.paths import user_path
from .backbone import Steering
from .backbone.interventions import Condition, Mode

_DICTIONARY = "dictionary.safetensors"


def dictionary_file(path: str) -> Path:
    """The file of a dictionary, of which the folder may be given; it need not be there yet."""
    given = user_path(path)
    return given if given.suffix == ".safetensors" else given / _DICTIONARY


def steering_hash(steering: Steering) -> str:
    """Hash of what is applied: the vector, and the dictionary that says which samples it is for."""
    vector = content_hash({"vector": steering.vector})
    condition = steering.condition
    return vector if condition is None else value_hash([vector, condition.dictionary.content_hash])


@dataclass
class SteeringStep:
    """One steering vector and how it is applied: f ← f + α (f′ − f).

    Attributes:
        file: Steering vectors that a SteeringVectorMaker wrote, or a llama.cpp control vector (`.gguf`).
        alpha: Strength α; 0 leaves the model as it is. A list is a schedule over the answer's tokens, of which the last
            value stays.
        positions: Which positions: `all`, `prompt`, `last_prompt`, `generated`, `answer` (the last two together),
            `image`, `text`, an index or a range.
        mode: What f′ is: `add`: f + s; `project_away`: f without its component along s; `replace`: s; `clamp`: f with
            the length of s as its component along s.
        site: Where; needed where the file has vectors of several sites.
        dictionary: Folder or file of a dictionary of this site, for `concept`; vectors that were made for each concept
            know theirs.
        concept: Steer only samples whose last prompt state has this as its strongest concept.
        threshold: Steer samples in which the activation of `concept` exceeds this in absolute value instead.
    """

    file: str
    alpha: float | list[float] = 1.0
    positions: str = "answer"
    mode: Mode = "add"
    site: str | None = None
    dictionary: str | None = None
    concept: int | None = None
    threshold: float | None = None

    def describe(self) -> dict[str, Any]:
        """What it does to a model: its options, and what is in the files that they name."""
        return {**asdict(self), "content_hash": steering_hash(self.load())}

    def load(self) -> Steering:
        """Read the files.

        Raises:
            ValueError: One is missing or damaged, or the step does not fit it.
        """
        try:
            vectors = load_steering_vectors(self.file)
            site = self._site(vectors)
            condition = self._condition(vectors, site)
            return Steering(site, vectors.vectors[site], self.alpha, self.positions, self.mode, condition)
        except ValueError as error:
            message = str(error)
            raise ValueError(message if self.file in message else f"steering with {self.file}: {message}") from error

    def _site(self, vectors: SteeringVectors) -> str:
        sites = list(vectors.vectors)
        if self.site is None and len(sites) == 1:
            return sites[0]
        if self.site not in sites:
            missing = "its `site` must be named" if self.site is None else f"it has none for the site {self.site!r}"
            raise ValueError(f"{missing}: it has vectors for {', '.join(sites)}")
        return self.site

    def _condition(self, vectors: SteeringVectors, site: str) -> Condition | None:
        by_concept = vectors.vectors[site].ndim == 2
        path = self.dictionary or (vectors.metadata.get("dictionary") if by_concept else None)
        if path is None:
            if by_concept or self.concept is not None or self.threshold is not None:
                raise ValueError("`dictionary` must name the dictionary that says which concept a sample has")
            return None
        file = dictionary_file(path)
        dictionary = load_dictionary(file)
        concepts, width = dictionary.dictionary.shape
        if width != vectors.vectors[site].shape[-1]:
            raise ValueError(
                f"the vector has width {vectors.vectors[site].shape[-1]}, but the concepts of {file} have {width}"
            )
        made_at = dictionary.metadata.get("site", site)
        if made_at != site:
            raise ValueError(f"its site is {site}, but the concepts of {file} are of {made_at}")
        if by_concept and vectors.metadata.get("dictionary_hash") not in (None, dictionary.content_hash):
            raise ValueError(f"it was made for other concepts than those of {file}; make it anew")
        if by_concept and len(vectors.vectors[site]) != concepts:
            raise ValueError(f"it has {len(vectors.vectors[site])} vectors for the {concepts} concepts of {file}")
        if not by_concept and self.concept is None:
            raise ValueError("`dictionary` needs a `concept`: steer the samples that activate which?")
        return Condition(dictionary, self.concept, self.threshold)
