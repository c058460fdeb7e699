"""Pages of the logit lens: what every layer decodes at every position of a picture and its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..datamodules.images import read_image
from ..datamodules.sample import Batch, Sample
from ..lightning_modules import Answers, Inspection, VisionLanguageModel
from ..lightning_modules.backbone import Role
from ..lightning_modules.backbone.logit_lens import LensQuery
from ..lightning_modules.backbone.patch_grid import PatchGrid
from .parts.figures import tensorboard
from .parts.inspector import Inspector
from .parts.lens_figure import confidence_figure
from .parts.lens_page import LensPage, LensVariant, write_index, write_page

_INDEX = "index.html"
# Names of files that are as good as the ids that they stand for, on any file system.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,79}")


class LogitLens(Inspector):
    """Writes a page for each picture of an `Inspection`, with all its variants, and an index of the pages.

    At every position the states of a layer are decoded as the last one's are: softmax(unembedding(norm(h))) (Towards
    Interpreting Visual Information Processing in Vision-Language Models, arXiv 2410.07149, §4). Pages need no network
    and no server. An interrupted run, started again, goes on where it stopped.

    Args:
        out: Folder for `index.html` and the pages, by default the run's; `run.json` and `rows-*.jsonl` in it say what
            has been done.
        top_k: Tokens of highest probability to show for each layer and position.
        layers: Sites to decode, `lm.embed` and `lm.block.k`, or wildcards; by default all.
        overwrite: Begin anew, whatever is there.
    """

    masks = False

    place = ""

    def __init__(
        self, out: str | None = None, top_k: int = 5, layers: list[str] | None = None, overwrite: bool = False
    ) -> None:
        if top_k < 1:
            raise ValueError(f"LogitLens.top_k must be at least 1, got {top_k}")
        super().__init__(out, overwrite)
        self.top_k = top_k
        self.layers = layers or ["lm.embed", "lm.block.*"]
        self._text_of: Callable[[int], str] = str
        self._told = False

    def options(self) -> dict[str, Any]:
        """What the pages depend on, besides model and data."""
        return {"layers": self.layers, "top_k": self.top_k}

    def is_kept(self, sample_id: str) -> bool:
        """Whether the page of a sample is still there."""
        return self._page(sample_id).is_file()

    def forget(self, ids: Iterable[str]) -> None:
        """Remove the pages of an earlier run."""
        for sample_id in ids:
            self._page(sample_id).unlink(missing_ok=True)

    def _page(self, sample_id: str) -> Path:
        """The page of a sample, whose id may be a path or anything else."""
        name = sample_id
        if not _PLAIN.fullmatch(name) or name == Path(_INDEX).stem:
            readable = re.sub(r"[^A-Za-z0-9]+", "_", sample_id)[-60:].strip("_") or "picture"
            name = f"{readable}-{sha256(sample_id.encode(errors='surrogateescape')).hexdigest()[:10]}"
        return self.out / f"{name}.html"

    def prepare(self, trainer: L.Trainer, module: Inspection) -> None:
        """Ask for the layers."""
        backbone = module.backbone
        module.lens = LensQuery(tuple(site.name for site in backbone.sites(self.layers)), self.top_k)
        # Every token is decoded once, on however many pages it is.
        self._text_of = cache(lambda token: _decode(backbone, token))
        self._told = False

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Answers],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pages of one batch."""
        assert isinstance(pl_module, Inspection)
        self.skipped |= {item.sample_id: item.reason for item in batch.skipped}
        for number, sample in enumerate(batch.samples):
            variants = [_variant(answers, number) for answers in outputs]
            entry = write_page(self._page(sample.sample_id), self._show(pl_module, sample, variants), self._text_of)
            confidence = {variant.name: _confidence(variant) for variant in variants}
            row = {"sample_id": sample.sample_id, "entry": entry, "confidence": confidence}
            self.journal.write(trainer.global_rank, [row])

    def _show(self, module: Inspection, sample: Sample, variants: list[LensVariant]) -> LensPage:
        assert module.lens is not None
        picture = read_image(sample.image)
        grid, no_grid = self._grid(module.backbone, picture.size, int((variants[0].image_index >= 0).sum()))
        return LensPage(
            title=sample.sample_id,
            picture=picture,
            prompt=sample.prompt,
            references=sample.references or tuple(dict.fromkeys(sample.answers)),
            model=module.model_id,
            layers=module.lens.layers,
            grid=grid,
            no_grid=no_grid,
            variants=variants,
        )

    def _grid(self, backbone: VisionLanguageModel, size: tuple[int, int], tokens: int) -> tuple[PatchGrid | None, str]:
        """Where the visual tokens lie in a picture, or why that is not known."""
        try:
            grid = backbone.patch_grid(*size)
            if len(grid.row) == tokens:
                return grid, ""
            reason = f"{len(grid.row)} patches are placed, but there are {tokens} visual tokens"
        except ValueError as error:
            reason = str(error)
        if not self._told:
            rank_zero_warn(f"pages without patches: {reason}")
            self._told = True
        return None, reason

    def finish(self, trainer: L.Trainer, module: Inspection, skipped: dict[str, str]) -> None:
        """Write the index of all pages."""
        found = self.journal.rows()
        ids = [sample.sample_id for sample in trainer.datamodule.samples("predict")]  # type: ignore[attr-defined]
        rows = [found[sample_id] for sample_id in ids if sample_id in found]
        if not rows:
            raise ValueError(f"no readable picture among the samples: {'; '.join(list(skipped.values())[:1])}")
        write_index(self.out / _INDEX, [row["entry"] for row in rows])
        writer = tensorboard(trainer)
        if writer is not None:
            assert module.lens is not None
            means = {
                name: np.mean([row["confidence"][name] for row in rows], axis=0).tolist() for name in module.variants
            }
            writer.add_figure("lens/confidence", confidence_figure(module.lens.layers, means))
        left_out = f", {len(skipped)} unreadable" if skipped else ""
        rank_zero_info(f"{self.out / _INDEX}: pages of {len(rows)} pictures{left_out}")


def _decode(backbone: VisionLanguageModel, token: int) -> str:
    """A token's text; rows of the unembedding without a token have none."""
    tokenizer = backbone.widest_tokenizer
    text: str = tokenizer.decode([token]) if token < len(tokenizer) else ""
    return text


def _variant(answers: Answers, number: int) -> LensVariant:
    """What one variant makes of one sample of a batch."""
    reading = answers.lens
    assert reading is not None
    here = reading.samples == number
    return LensVariant(
        name=answers.variant,
        answer=answers.texts[number],
        token_ids=reading.token_ids[here].numpy(),
        roles=[Role(role).name.lower() for role in reading.roles[here].tolist()],
        image_index=reading.image_index[here].numpy(),
        top_ids=reading.top_ids[:, here].numpy(),
        top_probabilities=reading.top_probabilities[:, here].numpy(),
    )


def _confidence(variant: LensVariant) -> list[float]:
    """Mean probability of the first token of visual tokens, of each layer."""
    visual = variant.image_index >= 0
    means: list[float] = variant.top_probabilities[:, visual, 0].mean(axis=1).tolist()
    return means
