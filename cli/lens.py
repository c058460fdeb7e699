"""`conceptshift lens`: pages of the logit lens over pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ..callbacks import LogitLens
from ..datamodules import CAPTION_PROMPT, PicturesDataModule
from ..lightning_modules import Inspection, SteeringStep
from ..lightning_modules.backbone.loading import DeviceMap, Quantization
from .command import run_command
from .prediction import own_flags, predict


def lens(
    model: str,
    images: str,
    out: str,
    prompt: str = CAPTION_PROMPT,
    destination: str | list[str] | None = None,
    steering: SteeringStep | None = None,
    top_k: int = 5,
    layers: str | list[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 25,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    skip_bad_images: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a page for each picture that shows what every layer decodes at every patch and word, and an index of them.

    At every position the states of a layer are decoded as the last one's are: softmax(unembedding(norm(h))). Pages need
    no network and no server: open `index.html` in a browser. With destinations or a steering, the answers and patches
    of all these models are shown side by side, and where they differ. An interrupted run, started again, goes on where
    it stopped.

    Args:
        model: Folder or hub id of the original.
        images: Folder with the pictures, at any depth; or one picture.
        out: Folder for the pages.
        prompt: What is asked about each picture.
        destination: Adapters or whole models to compare: `--destination A`, and `--destination+ B` for each more.
        steering: Steers the original, which is then there once more: `--steering.file FILE --steering.site
            lm.block.5 --steering.alpha 2`.
        top_k: Tokens of highest probability to show for each layer and position.
        layers: Layers to decode, such as `lm.block.*` or `[lm.embed,lm.block.3]`; all by default.
        limit: At most this many pictures, the first ones.
        batch_size: Pictures in one pass of the model.
        max_new_tokens: Tokens that an answer has at most.
        revision: Commit or tag on the hub.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()).
        device_map: `auto` lays the layers of the model on all GPUs of this machine.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights. Only for code that
            you have read, at the commit that `revision` names.
        skip_bad_images: Leave out unreadable pictures; by default one stops the run.
        overwrite: Begin anew, whatever is in the folder.
    """
    with own_flags():
        module = Inspection(
            model,
            revision,
            destination,
            None if steering is None else [steering],
            dtype,
            max_new_tokens=max_new_tokens,
            quantization=quantization,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        data = PicturesDataModule(images, prompt, limit=limit, batch_size=batch_size, skip_bad_images=skip_bad_images)
        predict(module, data, [LogitLens(out, top_k, [layers] if isinstance(layers, str) else layers, overwrite)])


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(lens, args)
