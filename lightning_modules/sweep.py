"""Answers every prompt under many steerings, with one load of the model and one decoding of the data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

from lightning.pytorch.utilities import rank_zero_warn

from ..concepts import load_steering_vectors, random_vector_like
from ..datamodules.sample import Batch
from .backbone import Selector, Steering
from .backbone.generation import Prefilled
from .backbone.interventions import Mode
from .backbone.loading import DeviceMap, Quantization
from .base import BackboneModule
from .steering import SteeringStep, steering_hash

Kind = Literal["unsteered", "steered", "random", "shuffled"]
UNSTEERED = "unsteered"


@dataclass(frozen=True)
class SweepRun:
    """One way to steer.

    Attributes:
        name: Unique within a sweep.
        kind: `unsteered`; `steered`; or a control of the same length: a `random` direction, or a vector made from
            `shuffled` labels.
        vector: Name of the steering vector, empty for the unsteered run; so are the others.
        site: Where.
        alpha: Strength α.
        positions: Which positions.
        mode: How.
        control: Number of the control.
    """

    name: str
    kind: Kind
    vector: str = ""
    site: str = ""
    alpha: float = 0.0
    positions: str = ""
    mode: Mode = "add"
    control: int = 0


class SteeringSweep(BackboneModule):
    """Steers one model in many ways over the same batches: vectors × sites × positions × modes × α, and controls.

    Every batch is decoded and encoded once. What all runs have in common is computed once too: where nothing is steered
    before the last position of the prompts (`answer`, `generated`, `last_prompt`), that is the picture and the prompt.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        vectors: Name → file of steering vectors; a name of a file with `*` in it stands for several, `<name>/<stem>`.
            Names have no `/`.
        alphas: Strengths. The unsteered model (α = 0) is always there.
        positions: Selectors of positions.
        sites: Where to steer: names or wildcards; by default every site that a file has a vector for.
        modes: `add`, `project_away`, `replace`, `clamp`.
        random: Random directions of the vector's length, as controls of each steered run.
        shuffled: Vectors made from shuffled labels, as controls of each steered run; at most as many as the file has.
        revision: Commit or tag on the hub.
        adapter: PEFT adapter to attach.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most.
        seed: Seed of the random directions.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()).
        device_map: `auto` lays the layers of the model on all GPUs of this machine, in one process.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights: it can read, change
            and send whatever you can. Only for code that you have read, at the commit that `revision` names.
        allow_missing_weights: Take a model whose files lack tensors, which are random then.
    """

    def __init__(
        self,
        model_id: str,
        vectors: dict[str, str],
        alphas: list[float] = [0.5, 1.0, 2.0],  # noqa: B006 - read only, and shown in the help text
        positions: list[str] = ["answer"],  # noqa: B006
        sites: list[str] | None = None,
        modes: list[Mode] = ["add"],  # noqa: B006
        random: int = 1,
        shuffled: int = 1,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
        seed: int = 0,
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        trust_remote_code: bool = False,
        allow_missing_weights: bool = False,
    ) -> None:
        super().__init__(
            model_id,
            revision,
            adapter,
            dtype,
            attention,
            max_new_tokens,
            quantization,
            device_map,
            trust_remote_code,
            allow_missing_weights,
        )
        given = {"vectors": vectors, "alphas": alphas, "positions": positions, "modes": modes}
        for option, values in given.items():
            if not values:
                raise ValueError(f"--model.init_args.{option} needs at least one entry")
        if not all(map(math.isfinite, alphas)) or not any(alphas):
            raise ValueError(f"--model.init_args.alphas must be finite, and one at least not 0, got {alphas}")
        if odd := [name for name in vectors if "/" in name]:
            raise ValueError(f"--model.init_args.vectors: {odd[0]!r} has a `/`, which only files of a pattern have")
        if random < 0 or shuffled < 0:
            raise ValueError("--model.init_args.random and .shuffled are numbers of controls, at least 0")
        self.vectors = vectors
        self.alphas = alphas
        self.positions = positions
        self.site_names = sites
        self.modes = modes
        self.random = random
        self.shuffled = shuffled
        self.seed = seed
        # A SweepScorer says so in its `setup`, which comes before the module's.
        self.is_kept = False
        # Whether a prompt in the cache serves: only where some run can use it, and the model gives the same from there.
        leaves = [Selector.parse(selector).leaves_prompt for selector in positions]
        self._prefills: bool | None = None if any(leaves) else False

    @cached_property
    def files(self) -> dict[str, str]:
        """Name → file of every vector.

        Raises:
            ValueError: A pattern matches no file, or two of one name.
        """
        files: dict[str, str] = {}
        for name, given in self.vectors.items():
            if "*" not in given:
                files[name] = given
                continue
            found = sorted(glob(given))
            if not found:
                raise ValueError(f"--model.init_args.vectors: no file matches {given!r}")
            several = {f"{name}/{Path(file).stem}": file for file in found}
            if len(several) < len(found):
                raise ValueError(
                    f"--model.init_args.vectors: {given!r} matches files of the same name; list them one by one"
                )
            files |= several
        return files

    @cached_property
    def steerings(self) -> dict[SweepRun, Steering | None]:
        """Every run, and what it applies.

        Raises:
            ValueError: A file is missing or damaged, or has no vector for a site.
        """
        runs: dict[SweepRun, Steering | None] = {SweepRun(UNSTEERED, "unsteered"): None}
        for name, file in self.files.items():
            loaded = load_steering_vectors(file)
            for site in self._sites(file, list(loaded.vectors)):
                controls = loaded.shuffled.get(site, ())[: self.shuffled]
                if len(controls) < self.shuffled:
                    rank_zero_warn(
                        f"{file}: {len(controls)} vectors from shuffled labels for {site}, not {self.shuffled}"
                    )
                loaded_step = SteeringStep(file, site=site).load()
                for alpha, positions, mode in self._grid():
                    steering = replace(loaded_step, alpha=alpha, positions=positions, mode=mode)
                    label = f"{name} {mode} {repr(alpha).removesuffix('.0')} at {site} {positions}"
                    run = SweepRun(label, "steered", name, site, alpha, positions, mode)
                    runs[run] = steering
                    for number in range(self.random):
                        # A direction for each vector and site, the same at all strengths.
                        seed = crc32(f"{name} {site} {number} {self.seed}".encode())
                        vector = random_vector_like(steering.vector, seed)
                        runs[_control(run, "random", number)] = replace(steering, vector=vector)
                    for number, vector in enumerate(controls):
                        runs[_control(run, "shuffled", number)] = replace(steering, vector=vector)
        return runs

    def _sites(self, file: str, known: list[str]) -> list[str]:
        """The sites of a file to steer at."""
        chosen: dict[str, None] = {}
        for pattern in self.site_names or known:
            found = [site for site in known if fnmatchcase(site, pattern)]
            if not found:
                raise ValueError(
                    f"--model.init_args.sites: {file} has no vector for {pattern!r}, only for {', '.join(known)}"
                )
            chosen |= dict.fromkeys(found)
        return list(chosen)

    def _grid(self) -> list[tuple[float, str, Mode]]:
        alphas = dict.fromkeys(alpha for alpha in self.alphas if alpha)
        return [
            (alpha, positions, mode)
            for mode in dict.fromkeys(self.modes)
            for positions in dict.fromkeys(self.positions)
            for alpha in alphas
        ]

    def describe(self) -> dict[str, Any]:
        """What the runs are, and hashes of what they apply: a sweep that is gone on with must have the same."""
        hashes = {run.name: steering_hash(steering) for run, steering in self.steerings.items() if steering}
        return {**super().describe(), "runs": [asdict(run) for run in self.steerings], "vectors": hashes}

    def setup(self, stage: str) -> None:
        """Refuse a run of which nothing would be left.

        Raises:
            ValueError: There is no SweepScorer, and the texts are not returned either.
        """
        if not self.is_kept and not self.trainer.predict_loop.return_predictions:
            raise ValueError("SteeringSweep: what it answers would be lost; add --trainer.callbacks+=SweepScorer")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[str]]:
        """Answer one batch under every steering: run → B texts."""
        return self.in_step(batch, self._answer, {})

    def _answer(self, batch: Batch) -> dict[str, list[str]]:
        prefilled = self._prefill(batch)
        texts = {}
        for run, steering in self.steerings.items():
            inputs = prefilled if prefilled is not None and run.name in self._leaving_prompts else batch.inputs
            with self.backbone.intervene(*([] if steering is None else [steering])):
                texts[run.name] = self.backbone.generate(inputs, self.max_new_tokens).texts
        return texts

    @cached_property
    def _leaving_prompts(self) -> set[str]:
        """Names of the runs that steer nothing before the last position of the prompts, where visual tokens stand."""
        return {
            run.name
            for run, steering in self.steerings.items()
            if steering is None
            or (
                Selector.parse(run.positions).leaves_prompt
                and self.backbone.sites([run.site])[0].positions == "sequence"
            )
        }

    def _prefill(self, batch: Batch) -> Prefilled | None:
        """The batch's prompts in the cache, where that serves; seen on the first batch: answers must be the same."""
        # Of a sharded model all processes must go the same way, whatever each sees.
        if self._prefills is False or self.device_mesh is not None:
            return None
        if self._prefills is None:
            self._prefills = self.backbone.can_prefill(batch.inputs)
            if not self._prefills:
                rank_zero_warn("this model answers otherwise from a prompt in the cache; every run reads it anew")
                return None
        return self.backbone.prefill(batch.inputs)


def _control(run: SweepRun, kind: Kind, number: int) -> SweepRun:
    return replace(run, name=f"{run.name}, {kind} {number}", kind=kind, control=number)
