"""`conceptshift explain`: which concepts one picture activates, and where in it they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..callbacks.parts.grounding import GroundingOptions, words_of
from ..callbacks.parts.heat_maps import concept_overlays
from ..callbacks.parts.sources import read_concepts
from ..concepts import ConceptDictionary, load_dictionary
from ..datamodules.images import BadImageError, read_image
from ..lightning_modules import VisionLanguageModel
from ..lightning_modules.backbone import Generation, Selector, Site
from ..lightning_modules.backbone.readout import Readout
from ..records.files import write_json, write_whole
from ..records.hashes import file_hash
from ..records.paths import user_path
from ..records.provenance import made_now
from .command import run_command
from .dictionary_source import DictionarySource
from .explain_figure import Explanation, explain_figure


def explain(
    image: str,
    dictionary: str,
    concepts: int = 5,
    out: str | None = None,
    json: str | None = None,
    prompt: str | None = None,
    selector: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    destination: str | None = None,
) -> None:
    """Show which concepts of a dictionary one picture activates, and where in the picture they are.

    The model is asked about the picture as it was about those that the dictionary was learned from. Its hidden state at
    the dictionary's word (or wherever else states were read) is split into concepts, and the most active ones are
    listed with their words. A figure shows the picture, the answer, the activations, and a heat-map of each of these
    concepts. Model, destination and prompt are the dictionary's own; flags are needed only where something has moved or
    something else is to be asked.

    Args:
        image: The picture.
        dictionary: A `dictionary.safetensors` written by `conceptshift predict`, or its folder.
        concepts: Number of concepts to show.
        out: Figure to write (PNG, PDF or SVG); `PICTURE-concepts.png` in the working folder by default.
        json: File to write the numbers to.
        prompt: What to ask about the picture; needed where the dictionary was learned from questions.
        selector: Which state to explain, e.g. `answer_mean`. Activations of several states are averaged.
        model: Folder or hub id of the dictionary's model, where it has moved.
        revision: Commit or tag on the hub.
        destination: Folder or hub id of the dictionary's destination, where it has moved.
    """
    if concepts < 1:
        raise ValueError(f"--concepts must be at least 1, got {concepts}")
    picture = _read_picture(user_path(image))
    path = user_path(dictionary)
    path = path / "dictionary.safetensors" if path.is_dir() else path
    learned = load_dictionary(path)
    source = DictionarySource.of(learned, path)
    asked = source.prompt(prompt)
    chosen = Selector.parse(selector or source.selector)
    backbone = source.load_model(model, revision, destination)
    if torch.cuda.is_available():
        backbone.to("cuda")
    with backbone.running_as(source.variant):
        explanation = _explain(backbone, learned, source, chosen, picture, asked, concepts)
    print(_as_text(explanation))
    if json is not None:
        origin = {
            "image": image,
            "image_hash": file_hash(user_path(image)),
            "dictionary": str(path),
            "dictionary_hash": learned.content_hash,
            "model_id": backbone.source,
            "weights_hash": backbone.weights_hash(),
            "variant": source.variant,
        }
        found = {name: getattr(explanation, name) for name in ("prompt", "answer", "activations", "top", "words")}
        write_json(user_path(json), {**origin, **made_now(), "site": source.site, "selector": chosen.name, **found})
    target = user_path(out or f"{Path(image).stem}-concepts.png")
    kind = target.suffix.removeprefix(".") or "png"
    write_whole(target, lambda working: explain_figure(explanation).savefig(working, format=kind, dpi=130))
    print(f"figure   {target}")


def _read_picture(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except BadImageError as error:
        # Its way out is that of a data set.
        raise ValueError(f"{str(error).rpartition('; ')[0]}; give a picture with --image") from error


def _explain(
    backbone: VisionLanguageModel,
    dictionary: ConceptDictionary,
    source: DictionarySource,
    selector: Selector,
    picture: Image.Image,
    prompt: str,
    concepts: int,
) -> Explanation:
    (site,) = backbone.sites([source.site])
    if site.positions != "sequence" and selector.name != "image":
        raise ValueError(f"{source.path}: site {site.name!r} has states of visual tokens only; leave --selector out")
    inputs = {name: value.to(backbone.model.device) for name, value in backbone.encode([picture], [prompt]).items()}
    generation = backbone.generate(inputs, source.max_new_tokens, [site])
    (answer,) = generation.texts
    states = _states(backbone, generation, site, selector)
    U = dictionary.dictionary
    if not len(states):
        raise ValueError(
            f"selector {selector.name!r} finds nothing in the answer {answer!r}; explain another state with "
            "--selector answer_mean, or another picture"
        )
    if states.shape[1] != U.shape[1]:
        raise ValueError(
            f"{source.path}: concepts of width {U.shape[1]}, but the states of {backbone.source!r} at {site.name!r} "
            f"have width {states.shape[1]}; give the dictionary's model with --model"
        )
    activations = dictionary.transform(states).mean(dim=0)
    strongest = activations.abs().sort(descending=True, stable=True).indices[:concepts].tolist()
    top = [concept for concept in strongest if activations[concept] != 0]
    values = U[top] @ _states(backbone, generation, site, Selector.parse("image")).T
    signed = dictionary.signed
    try:
        overlays = concept_overlays(backbone, picture, values, signed)
    except ValueError as error:
        print(f"no heat-maps: {error}")
        overlays = []
    state = f"{selector.name}, {site.name}"
    words = _words(source.path, backbone, dictionary, site.name)
    return Explanation(picture, prompt, answer, state, activations.tolist(), top, words, overlays, signed)


def _states(backbone: VisionLanguageModel, generation: Generation, site: Site, selector: Selector) -> Tensor:
    return generation.select(selector, backbone.vocabulary).states[site.name].float().cpu()


def _words(path: Path, backbone: VisionLanguageModel, dictionary: ConceptDictionary, site: str) -> list[list[str]]:
    """The words that were found when the dictionary was fitted, where they lie beside it."""
    beside = path.with_name("concepts.json")
    if beside.is_file():
        words: list[list[str]] = read_concepts(beside, dictionary)["words"]
        return words
    return words_of(Readout.from_model(backbone), dictionary.dictionary, site, GroundingOptions())


def _as_text(explanation: Explanation) -> str:
    active = sum(value != 0 for value in explanation.activations)
    lines = [
        f"prompt   {' '.join(explanation.prompt.split())}",
        f"answer   {explanation.answer}",
        f"state    {explanation.state}",
        f"active   {active} of {len(explanation.activations)} concepts; the strongest:",
    ]
    for concept in explanation.top:
        words = ", ".join(explanation.words[concept]) or "(no word)"
        lines.append(f"{concept:>7}  {explanation.activations[concept]:9.4g}  {words}")
    return "\n".join(lines)


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(explain, args)
