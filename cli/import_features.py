"""`conceptshift import-features`: a feature store from hidden states that XL-VLMs saved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..datamodules.foreign_features import ForeignFeatures, sample_ids
from ..datamodules.stored_features import FeatureShardWriter, FeatureStore, Row, begin_store, merge_store
from ..lightning_modules import VisionLanguageModel
from ..lightning_modules.backbone import Selector
from ..lightning_modules.backbone.destinations import DESTINATION, ORIGINAL
from ..lightning_modules.backbone.readout import Readout
from ..records.files import replacing
from ..records.paths import user_path
from ..records.provenance import made_now, mismatch
from .command import run_command

_SHARD_ROWS = 4096
# Rows that are stacked at a time.
_PIECE = 256
# Modules under names that other releases of transformers, or an adapter around the model, give them.
_LANGUAGE = re.compile(r"(?:(?:base_model|model|language_model|text_model|decoder)\.)+(?:layers\.(\d+)|norm)")
_VISION = re.compile(r"(?:\w+\.)*(?:vision|visual)\w*\.(?:\w+\.)*(?:layers|blocks)\.(\d+)")


@dataclass(frozen=True)
class _Variant:
    """What a file adds to the store.

    Attributes:
        name: `original` or `destination`.
        file: The file.
        ids: Sample id of each row.
        modules: Site → module.
    """

    name: str
    file: ForeignFeatures
    ids: list[str]
    modules: dict[str, str]

    @property
    def widths(self) -> dict[str, int]:
        """Site → D."""
        return {site: self.file.widths[module] for site, module in self.modules.items()}

    @property
    def with_state(self) -> set[str]:
        """Ids of the samples with a state."""
        return {self.ids[row] for row in self.file.chosen}


def import_features(
    original: str,
    out: str,
    model: str | None = None,
    destination: str | None = None,
    word: str | None = None,
    images: str | None = None,
) -> None:
    """Make a feature store of hidden states that XL-VLMs saved (`.pth`); no code in a file is executed.

    The first file may be given without its flag: `import-features FILE.pth --model … --out …`. Rows of two files are of
    the same sample where their pictures have the same file name, or the same path where file names repeat. States keep
    their precision. Which token they were at is not in a file: every position is −1, and the token is the word given.

    Args:
        original: File with the states of the original model.
        out: Feature store to write.
        model: Folder or hub id of the original model, with whose unembedding states become words. It is needed.
        destination: File with the states of the fine-tuned model.
        word: The token of interest that states were saved for.
        images: Folder of the pictures, if they are not where the file says: relative paths continue it, and of absolute
            ones it holds the file names.
    """
    if model is None:
        raise ValueError("--model is needed, the folder or hub id of the original model: its unembedding gives words")
    selector = "token_of_interest" if word is None else Selector.parse(f"token_of_interest:{word}").name
    files = [ForeignFeatures.read(user_path(path)) for path in (original, destination) if path is not None]
    ids = sample_ids(files)
    _check_common(files, ids)
    backbone = VisionLanguageModel.load(model)
    variants = [
        _Variant(name, file, of_file, _modules(backbone, file))
        for name, file, of_file in zip((ORIGINAL, DESTINATION), files, ids, strict=False)
    ]
    _check_sites(backbone, variants)
    metadata = _metadata(backbone, variants, selector)
    target = user_path(out)
    _check_target(target, metadata)
    with replacing(target) as working:
        begin_store(working, metadata, resumed=False, overwrite=True)
        Readout.from_model(backbone).save(working)
        writer = FeatureShardWriter(working, 0, _SHARD_ROWS)
        for variant in variants:
            _write(writer, variant, selector, images)
        merge_store(working)
    print(_summary(variants, target))


def _check_common(files: Sequence[ForeignFeatures], ids: Sequence[Sequence[str]]) -> None:
    with_state = [[of_file[row] for row in file.chosen] for file, of_file in zip(files, ids, strict=True)]
    if not set.intersection(*map(set, with_state)):
        each = (f"{file.path} ({len(own)}, e.g. {own[0]})" for file, own in zip(files, with_state, strict=True))
        raise ValueError(
            f"no picture has a state in both files, {' and '.join(each)}; extract both from the same pictures and word"
        )


def _modules(backbone: VisionLanguageModel, file: ForeignFeatures) -> dict[str, str]:
    """Site → module of a file. A module that is no site keeps its name.

    Raises:
        ValueError: Two modules are one site.
    """
    outputs = {id(site.module): site.name for site in backbone.sites(["*"]) if site.at == "output"}
    own = {name: outputs[id(module)] for name, module in backbone.model.named_modules() if id(module) in outputs}
    modules: dict[str, str] = {}
    for name in file.widths:
        site = own.get(name) or _site(name)
        if site in modules:
            raise ValueError(f"{file.path}: modules {modules[site]!r} and {name!r} are both {site!r}; save one of them")
        modules[site] = name
    return modules


def _site(module: str) -> str:
    """The site of a module, by its name alone."""
    if match := _LANGUAGE.fullmatch(module):
        return "lm.norm" if match[1] is None else f"lm.block.{match[1]}"
    if match := _VISION.fullmatch(module):
        return f"vision.block.{match[1]}"
    return module


def _check_sites(backbone: VisionLanguageModel, variants: Sequence[_Variant]) -> None:
    """Compare the files with each other, and their sites in the language model with the model's.

    Raises:
        ValueError: The sites or widths differ.
    """
    first, expected = variants[0].file.path, variants[0].widths
    for variant in variants:
        found = variant.widths
        odd = sorted(site for site in found | expected if found.get(site) != expected.get(site))
        if odd:
            raise ValueError(
                f"{first} has {_states_at(odd[0], expected)}, but {variant.file.path} {_states_at(odd[0], found)}; "
                "extract both alike, from a model and the same model fine-tuned"
            )
    known = {site.name for site in backbone.sites(["*"])}
    weight = backbone.unembed.weight
    assert isinstance(weight, Tensor)
    for site, width in expected.items():
        if site.startswith("lm.") and (site not in known or width != weight.shape[1]):
            blocks = sum(name.startswith("lm.block.") for name in known)
            raise ValueError(
                f"{first} has {_states_at(site, expected)}, but --model {backbone.source} has blocks 0–{blocks - 1} of "
                f"width {weight.shape[1]}; give the model that the states are of"
            )


def _states_at(site: str, widths: Mapping[str, int]) -> str:
    return f"states of width {widths[site]} at {site!r}" if site in widths else f"none at {site!r}"


def _metadata(backbone: VisionLanguageModel, variants: Sequence[_Variant], selector: str) -> Row:
    """What FeatureWriter says of a store, as far as it is known, and which files this one was made of."""
    return {
        "model_id": backbone.source,
        "revision": None,
        **backbone.hashes,
        "weights_hash": backbone.weights_hash(),
        # Where the destination's weights are is not in its file; the file stands for them, so that dictionaries of two
        # destinations are not mixed up.
        "checkpoints": {},
        "checkpoint_hashes": {variant.name: variant.file.sha256 for variant in variants if variant.name != ORIGINAL},
        "sites": list(variants[0].modules),
        "selectors": [selector],
        "variants": [variant.name for variant in variants],
        "data": {},
        "imported": {
            variant.name: {"file": variant.file.path.name, "hash": variant.file.sha256, "modules": variant.modules}
            for variant in variants
        },
        **made_now(),
    }


def _check_target(target: Path, metadata: Row) -> None:
    """Refuse to replace anything but the same import.

    Raises:
        ValueError: There is something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    finished = (target / "states.parquet").is_file()
    odd = mismatch(FeatureStore(target).metadata, metadata) if finished else "it is no finished store"
    if odd is not None:
        raise ValueError(
            f"--out {target}: is there and holds something else than this import ({odd}); choose another folder"
        )


def _write(writer: FeatureShardWriter, variant: _Variant, selector: str, images: str | None) -> None:
    """Add all samples of a variant, and the states of those that count."""
    file, chosen = variant.file, frozenset(variant.file.chosen)
    token = selector.partition(":")[2]
    for start in tqdm(range(0, len(file.images), _PIECE), f"importing {file.path}", leave=False, disable=None):
        rows = range(start, min(start + _PIECE, len(file.images)))
        with_state = [row for row in rows if row in chosen]
        samples = [
            {
                "sample_id": variant.ids[row],
                "variant": variant.name,
                "image": _picture(file.images[row], images),
                "prompt": "",
                "text": file.texts[row],
                "references": [],
                "answers": [],
            }
            for row in rows
        ]
        key = {"variant": variant.name, "selector": selector, "position": -1, "token": token}
        states = [{"sample_id": variant.ids[row], **key} for row in with_state]
        tensors = {site: file.stack(module, with_state) for site, module in variant.modules.items() if with_state}
        writer.add(samples, states, tensors)
    # Another file may have another precision, which one shard would not keep.
    writer.flush()


def _picture(path: str, folder: str | None) -> str:
    if folder is None:
        return path
    return str(Path(folder) / (Path(path).name if Path(path).is_absolute() else path))


def _summary(variants: Sequence[_Variant], target: Path) -> str:
    lines = []
    for variant in variants:
        file = variant.file
        lines.append(f"{variant.name:<13}{file.path}: {len(file.chosen)} of {len(file.images)} samples have a state")
        lines += [f"{'':<13}{name} → {site}, width {file.widths[name]}" for site, name in variant.modules.items()]
    if len(variants) > 1:
        lines.append(f"{'both':<13}{len(set.intersection(*(variant.with_state for variant in variants)))} samples")
    return "\n".join([*lines, f"{'features':<13}{target}"])


def run(args: Sequence[str]) -> None:
    """Run the command; a first word that is no flag is the original's file."""
    name, *options = args
    named = ["--original"] if options and not options[0].startswith("-") else []
    run_command(import_features, [name, *named, *options])
