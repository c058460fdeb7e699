"""Whether the states that a steering vector shall be made of will be there, asked before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from ...concepts import load_dictionary
from ...datamodules.base import PictureDataModule
from ...datamodules.sample import Sample
from ...datamodules.stored_features import FeatureStore
from ...datamodules.word_classes import word_class
from ...lightning_modules import FeatureExtraction
from ...lightning_modules.steering import dictionary_file as file_of
from ...metrics import normalize_answer
from ..dictionary_fitter import DictionaryFitter
from .sources import dictionary_place, store_folder, writers_before
from .state_sets import StateSet, most_frequent


def check_states(trainer: L.Trainer, callback: Callback, module: L.LightningModule, side: StateSet, site: str) -> None:
    """Refuse a set that will have no states, as far as it can be known in a callback's `setup`.

    Raises:
        ValueError: Its store has none; or this run, which writes the store, will not write any.
    """
    if side.words is not None:
        word_class(side.words)
    if side.concept is not None:
        check_dictionary(trainer, callback, side.concept.dictionary, concept=side.concept.index)
    if not _is_written(trainer, callback, side):
        # The dictionary of `concept` may not be fitted yet.
        replace(side, concept=None).read(FeatureStore(store_folder(trainer, callback, side.features)), site)
        return
    if isinstance(module, FeatureExtraction):
        selectors = [selector.name for selector in module.selectors]
        _check_known(side.selector, selectors, "selector", "--model.init_args.selectors")
        _check_known(side.variant, module.variants, "variant", "--model.init_args.variants")
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PictureDataModule):
        _check_samples(side, data.samples("predict"))


def check_sites(
    trainer: L.Trainer, callback: Callback, module: L.LightningModule, side: StateSet, sites: Sequence[str]
) -> None:
    """Refuse sites that this run will not read for a set, once the model is loaded.

    Raises:
        ValueError: One is not among the sites of the module.
    """
    if isinstance(module, FeatureExtraction) and _is_written(trainer, callback, side):
        known = [site.name for site in module.sites]
        more = [] if side.concept is None else [dictionary_site(trainer, callback, side.concept.dictionary)]
        for site in [*sites, *more]:
            _check_known(site, known, "site", "--model.init_args.sites")


def check_dictionary(
    trainer: L.Trainer, callback: Callback, path: str, site: str | None = None, concept: int | None = None
) -> None:
    """Refuse a dictionary that is not there and that no DictionaryFitter will write before, or that does not fit.

    Args:
        trainer: The trainer.
        callback: Who asks.
        path: Folder or file.
        site: Site that it must be of.
        concept: Number of a concept that it must have.

    Raises:
        ValueError: It is missing or damaged, of another site, or has fewer concepts.
    """
    found, n_concepts = _site_and_size(trainer, callback, path)
    if site is not None and found != site:
        raise ValueError(f"{path}: its dictionary is of the site {found!r}, the vector of {site!r}; fit one there")
    if concept is not None and not 0 <= concept < n_concepts:
        raise ValueError(f"{path}: has no concept {concept}; its dictionary has 0 … {n_concepts - 1}")


def dictionary_site(trainer: L.Trainer, callback: Callback, path: str) -> str:
    """Site of a dictionary that is there or will be written."""
    return _site_and_size(trainer, callback, path)[0]


def dictionary_file(trainer: L.Trainer, callback: Callback, given: str) -> Path:
    """File of a dictionary, given by the name of a DictionaryFitter listed before, or by folder or file."""
    return file_of(str(dictionary_place(trainer, callback, given)))


def located(trainer: L.Trainer, callback: Callback, side: StateSet) -> StateSet:
    """A set whose dictionary, if it names one of this run, is given by its file."""
    if side.concept is None:
        return side
    file = dictionary_file(trainer, callback, side.concept.dictionary)
    return replace(side, concept=replace(side.concept, dictionary=str(file)))


def _site_and_size(trainer: L.Trainer, callback: Callback, path: str) -> tuple[str, int]:
    file = dictionary_file(trainer, callback, path)
    for fitter in writers_before(trainer, callback):
        if isinstance(fitter, DictionaryFitter) and file_of(str(fitter.out)) == file:
            return fitter.site, fitter.dictionary.n_concepts
    dictionary = load_dictionary(file)
    if "site" not in dictionary.metadata:
        raise ValueError(f"{file}: does not say of which site it is; give a dictionary that DictionaryFitter wrote")
    return dictionary.metadata["site"], dictionary.n_concepts


def _is_written(trainer: L.Trainer, callback: Callback, side: StateSet) -> bool:
    """Whether the store of a set is the one that this run writes."""
    folder = store_folder(trainer, callback, side.features)
    return any(other.makes == "features" and other.out == folder for other in writers_before(trainer, callback))


def _check_known(value: str, known: Sequence[str], name: str, option: str) -> None:
    if value not in known:
        raise ValueError(f"SteeringVectorMaker: {name} {value!r} is not read; {option} has {', '.join(known)}")


def _check_samples(side: StateSet, samples: Sequence[Sample]) -> None:
    """Refuse an answer or a label that no sample has."""
    if side.answer is not None:
        targets = Counter(sample.target for sample in samples)
        others = {answer for sample in samples for answer in sample.answers}
        if normalize_answer(side.answer) not in {normalize_answer(text) for text in others.union(targets)}:
            raise ValueError(
                f"SteeringVectorMaker: `answer` = {side.answer!r} is an answer to none of {len(samples)} samples; most "
                f"frequent are {most_frequent(normalize_answer(sample.target) for sample in samples)}"
            )
    labels = [sample.label for sample in samples]
    if side.label is not None and side.label not in labels:
        raise ValueError(
            f"SteeringVectorMaker: `label` = {side.label!r} is the label of none of {len(samples)} samples; most "
            f"frequent are {most_frequent(labels)}"
        )
