"""Makes every fine steering vector of a dictionary, as candidates for a sweep."""

from __future__ import annotations

import re

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ..concepts import SteeringVectors, fine_vector, load_dictionary
from ..records.files import replacing
from ..records.provenance import made_now
from .parts.run_writer import RunWriter
from .parts.state_set_checks import check_dictionary, dictionary_file

_FILE = r"\d+-\d+\.safetensors"


class FineVectorMaker(RunWriter):
    """After `predict`, writes s_ij = u_j − u_i for all concepts i ≠ j of a dictionary (arXiv 2501.03012, section 3.3).

    Which of them lead to one clear answer is what a sweep over them tells (`selection` in `sweep.json`).

    Args:
        site: Site of the dictionary.
        dictionary: The dictionary: name of a DictionaryFitter of this run, or a folder or file.
        out: Folder to write: `<i>-<j>.safetensors`; an older one is replaced. By default `vectors/<name>` in the run's
            folder.
    """

    place = "vectors/{name}"

    def __init__(self, site: str, dictionary: str, out: str | None = None) -> None:
        super().__init__(out)
        self.site = site
        self.dictionary = dictionary

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a dictionary that will not be there, or is of another site, and a folder of anything else."""
        self.locate(trainer)
        if self.out.exists() and not all(re.fullmatch(_FILE, path.name) for path in self.out.iterdir()):
            raise ValueError(f"{self.out}: holds other files than fine vectors; choose a new folder")
        check_dictionary(trainer, self, self.dictionary, self.site)

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the vectors."""
        file = dictionary_file(trainer, self, self.dictionary)
        dictionary = load_dictionary(file)
        U = dictionary.dictionary
        metadata = {
            "method": "fine",
            "sites": [self.site],
            "dictionary_file": str(file),
            "dictionary_hash": dictionary.content_hash,
            # Whose states these are, where SteeringVectorMaker tells it too.
            "target": {"store": dictionary.metadata.get("features", {})},
            **made_now(),
        }
        with replacing(self.out) as working:
            for i in range(len(U)):
                for j in range(len(U)):
                    if i != j:
                        vectors = SteeringVectors(
                            {self.site: fine_vector(U, i, j)}, {}, {**metadata, "concepts": [i, j]}
                        )
                        vectors.save(working / f"{i}-{j}.safetensors")
        rank_zero_info(f"{self.out}: {len(U) * (len(U) - 1)} vectors between the {len(U)} concepts of {file}")
