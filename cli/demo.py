"""`conceptshift demo`: the whole job on the embedded data set, through the shipped configurations."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..datamodules import CaptionDataModule, VQADataModule
from ..datamodules.shapes import write_shapes
from ..records.files import write_json
from ..records.paths import user_path
from ..records.provenance import KEY, commanded, made_now
from . import lightning_cli
from .command import run_command
from .mean_token import mean_token
from .report import write_report

T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parent.parent
_VERSIONS = (
    "conceptshift",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "torchmetrics",
    "pycocoevalcap",
    "scikit-learn",
)
_TARGET_ANSWER = "no"
_SCORERS = ("conceptshift.callbacks.CaptionScorer", "conceptshift.callbacks.VQAScorer")
# Questions of each run of the sweep, and pictures that are looked into.
_SWEPT, _INSPECTED = 400, 16


def demo(out: str = "checkpoints/demo", images: int = 4000) -> None:
    """Fine-tune, extract, learn concepts, measure shift, steer, look inside, score, report; on a CPU in minutes.

    Args:
        out: Folder of the run; data, configurations, adapter, features, TensorBoard logs, results, report.
        images: Pictures to generate.
    """
    job = _Demo(user_path(out))
    job.stage("data", lambda: write_shapes(job.out / "data", images))
    job.stage("score original", job.score_original)
    job.stage("fine-tune", lambda: job.run("fit", "finetune", "monitor"))
    job.stage("extract, concepts, shift", lambda: job.run("predict", "shift"))
    job.stage("steering vectors", lambda: job.make_vectors(images))
    job.stage("sweeps", lambda: job.sweep(images))
    job.stage("look inside pictures", lambda: job.look_inside(images))
    job.stage("score destination", job.score_destination)
    job.stage("score steered", job.score_steered)
    results = job.out / "results.json"
    job.write_samples()
    write_json(results, job.results())
    report = job.stage("report", lambda: write_report(job.out))
    write_json(results, job.results())
    print(f"\nresults      {results}\nreport       {report}\nTensorBoard  tensorboard --logdir {job.out}")


class _Demo:
    """One run: its folder, its copies of the configurations, and how long each stage took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """Do one part and note its time."""
        print(f"\n=== {name}", flush=True)
        start = time.perf_counter()
        done = work()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return done

    def run(
        self,
        subcommand: str,
        *configs: str,
        options: Sequence[str] = (),
        answers: str | None = None,
        leave_out: str | None = None,
    ) -> None:
        """Run shipped configurations with their paths moved into this run's folder.

        The moved copies stay in `configs/`, so that each step can be run again by hand.

        Args:
            subcommand: `fit`, `predict`, `sweep` or `validate`.
            configs: Names of the configurations.
            options: More options of the command line.
            answers: Name of the file that captions or answers are written to.
            leave_out: How the items of lists begin that are left out.
        """
        paths = [self._moved(config, answers, leave_out) for config in configs]
        given = [subcommand, *(part for path in paths for part in ("--config", str(path))), *options]
        print("conceptshift", *given)
        with commanded(given):
            lightning_cli.run(given)

    def _moved(self, config: str, answers: str | None, leave_out: str | None) -> Path:
        content = self._in_run(yaml.safe_load((PACKAGE / "configs" / f"{config}.yaml").read_text()))
        if leave_out is not None:
            content = _without(content, leave_out)
        if answers is not None:
            (scorer,) = (one for one in content["callbacks"].values() if one["class_path"] in _SCORERS)
            scorer.setdefault("init_args", {})["out"] = str(self.out / f"{answers}.json")
            if not answers.endswith("original"):
                original = f"{answers.partition('-')[0]}-original.json"
                scorer["init_args"]["baseline"] = str(self.out / original)
        path = self.out / "configs" / f"{answers or config}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def _in_run(self, value: Any) -> Any:
        """A configuration with its paths in this run's folder."""
        if isinstance(value, dict):
            return {name: self._in_run(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._in_run(part) for part in value]
        first, *rest = Path(value).parts if isinstance(value, str) and "/" in value else ("",)
        if first == "data":
            return str(self.out / "data")
        if first != "checkpoints":
            return value
        # Training and extraction are the run itself; the other workflows get a folder each.
        return str(self.out.joinpath(*rest[rest[0] in ("finetune", "monitor", "shift") :]))

    # --- steering -------------------------------------------------------------------------------------------

    def make_vectors(self, images: int) -> None:
        """Vectors between answers, and to captions of a style."""
        self.run("predict", "answer_vectors", options=_limit(3000, images))
        self.run("predict", "caption_vectors", options=_limit(2000, images // 2))

    def sweep(self, images: int) -> None:
        """Steer in many ways, on samples that the scores below do not have."""
        self.run("sweep", "sweep_vqa", options=_limit(_SWEPT, images // 10))
        self.run("sweep", "sweep_caption")
        self.run("sweep", "sweep_back")

    # --- inside pictures ------------------------------------------------------------------------------------

    def look_inside(self, images: int) -> None:
        """What visual tokens decode to, and which of them answers come from."""
        data = self.out / "data"
        mean_token(
            "embedded:shapes-llava",
            str(data / "train2014"),
            str(self.out / "visual_tokens" / "mean.safetensors"),
            annotations=str(data / "annotations" / "instances_train2014.json"),
            limit=500,
            batch_size=64,
        )
        self.run("predict", "logit_lens")
        self.run("predict", "lens_scores", options=_limit(200, images // 10))
        # Gradients would take longer than all the rest.
        self.run("predict", "visual_tokens", options=_limit(_INSPECTED, images), leave_out="gradients:")

    # --- scoring --------------------------------------------------------------------------------------------

    def score_original(self) -> None:
        """Captions and answers of the original."""
        self.run("validate", "caption", answers="captions-original")
        self.run("validate", "vqa", answers="answers-original")

    def score_destination(self) -> None:
        """Captions of the destination, beside the original's."""
        adapter = str(self.out / "adapter")
        self.run("validate", "caption", options=("--model.init_args.adapter", adapter), answers="captions-destination")

    def score_steered(self) -> None:
        """Captions and answers of the steered original, beside those of the unsteered one."""
        self.run("validate", "steer_caption", answers="captions-steered")
        self.run("validate", "steer_vqa", answers="answers-steered")

    # --- results --------------------------------------------------------------------------------------------

    def write_samples(self) -> None:
        """Write what was asked about which picture, for the report."""
        parts = {
            "caption": CaptionDataModule(str(self.out / "data")),
            "question": VQADataModule(str(self.out / "data")),
        }
        samples = {
            f"{name}/{sample.sample_id}": {"image": str(sample.image), "prompt": sample.prompt}
            for name, data in parts.items()
            for sample in data.read(data.splits["validate"], training=False)
        }
        write_json(self.out / "samples.json", samples)

    def results(self) -> dict[str, Any]:
        """The figures of the run, as each stage measured them."""
        return {
            "captioning": {name: self._captions(name) for name in ("original", "destination", "steered")},
            "vqa": {name: self._answers(name) for name in ("original", "steered")},
            "concepts": {name: self._concepts(name) for name in ("semi_nmf", "kmeans")},
            "shift": self._shift("kmeans"),
            "visual_tokens": self._visual_tokens(),
            "model": "shapes-llava, fine-tuned by LoRA on captions that name a color",
            "data": "Shapes, generated",
            KEY: {"seed": 0, **made_now()},
            "seconds": self.seconds,
            "versions": {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
        }

    def _captions(self, name: str) -> dict[str, Any]:
        scored = _read(self.out / f"captions-{name}.json")
        names = {"CIDEr": "CIDEr", "BLEU-4": "BLEU-4", "ROUGE-L": "ROUGE-L", "word_share": "color_share"}
        return _measured(scored, names)

    def _answers(self, name: str) -> dict[str, Any]:
        scored = _read(self.out / f"answers-{name}.json")
        names = {measure: measure for measure in ("overall", "yes/no", "number", "other")}
        return {**_measured(scored, names), "target_answers": scored["answers"].get(_TARGET_ANSWER, 0)}

    def _concepts(self, name: str) -> dict[str, Any]:
        fitted = _read(self.out / "concepts" / f"original-{name}" / "concepts.json")
        return {measure: fitted[measure] for measure in ("k", "explained_variance", "overlap", "words")}

    def _visual_tokens(self) -> dict[str, Any]:
        """How many patches say their object, and what is lost without them."""
        lens = _read(self.out / "lens_scores" / "lens" / "lens.json")
        found = lens["variants"]["original"]
        ablation = _read(self.out / "visual_tokens" / "ablation" / "ablation.json")["variants"]["original"]
        (described,) = (row for row in ablation["rows"] if (row["setting"], row["set"]) == ("generative", "object"))
        return {
            "say_their_object": found["best"]["share"],
            "say_it_elsewhere": found["background"][lens["layers"].index(found["best"]["layer"])]["share"],
            "wrong_without_object": described["became_wrong"],
            "wrong_without_random": described["control"]["became_wrong"],
        }

    def _shift(self, name: str) -> dict[str, float]:
        shift = _read(self.out / "shift" / name / "shift.json")
        means = {
            measure: shift["means"][measure] for measure in ("recovery_original", "recovery_shifted", "consistency")
        }
        gain, tested = shift["means"]["delta_cosine"], shift["tests"]["magnitude"]
        return {**means, "matched_cosine_gain": gain, "shifted_concepts": tested["significant"]}


def _without(value: Any, start: str) -> Any:
    """A configuration without the items of lists that begin so."""
    if isinstance(value, dict):
        return {name: _without(part, start) for name, part in value.items()}
    if isinstance(value, list):
        return [_without(part, start) for part in value if not (isinstance(part, str) and part.startswith(start))]
    return value


def _limit(most: int, available: int) -> tuple[str, ...]:
    return ("--data.init_args.limit", str(min(most, available)))


def _measured(scored: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Some scores under their names in the results, with intervals, and changes from the original where there are."""

    def of(measured: dict[str, Any]) -> dict[str, Any]:
        return {name: measured[measure] for measure, name in names.items()}

    measured = {**of(scored["scores"]), "intervals": of(scored["intervals"])}
    return measured if "changes" not in scored else {**measured, "changes": of(scored["changes"]["scores"])}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(demo, args)
