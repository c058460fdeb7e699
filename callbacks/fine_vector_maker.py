"""Makes every fine steering vector of a dictionary, as candidates for a sweep."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ..concepts import SteeringVectors, fine_vector, load_dictionary
from ..datamodules.files import replacing
from ..lightning_modules.steering import dictionary_file
from .parts.state_set_checks import check_dictionary

_FILE = r"\d+-\d+\.safetensors"


class FineVectorMaker(Callback):
    """After `predict`, writes s_ij = u_j − u_i for all concepts i ≠ j of a dictionary (arXiv 2501.03012, section 3.3).

    Which of them lead to one clear answer is what a sweep over them tells (`selection` in `sweep.json`).

    Args:
        site: Site of the dictionary.
        dictionary: Folder or file of the dictionary; a DictionaryFitter listed before may write it.
        out: Folder to write: `<i>-<j>.safetensors`; an older one is replaced.
    """

    def __init__(self, site: str, dictionary: str, out: str) -> None:
        self.site = site
        self.dictionary = dictionary
        self.out = Path(out)

    @property
    def state_key(self) -> str:
        """Those of several dictionaries may be made in one run."""
        return f"{type(self).__name__}[{self.out}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a dictionary that will not be there, or is of another site, and a folder of anything else."""
        if self.out.exists() and not all(re.fullmatch(_FILE, path.name) for path in self.out.iterdir()):
            raise ValueError(f"{self.out}: holds other files than fine vectors; choose a new folder")
        check_dictionary(trainer, self, self.dictionary, self.site)

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the vectors."""
        file = dictionary_file(self.dictionary)
        U = load_dictionary(file).dictionary
        metadata = {"method": "fine", "sites": [self.site], "dictionary_file": str(file)}
        with replacing(self.out) as working:
            for i in range(len(U)):
                for j in range(len(U)):
                    if i != j:
                        vectors = SteeringVectors(
                            {self.site: fine_vector(U, i, j)}, {}, {**metadata, "concepts": [i, j]}
                        )
                        vectors.save(working / f"{i}-{j}.safetensors")
        rank_zero_info(f"{self.out}: {len(U) * (len(U) - 1)} vectors between the {len(U)} concepts of {file}")
