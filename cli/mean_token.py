"""`conceptshift mean-token`: the mean visual token of a folder of pictures, as a reference for ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from ..callbacks import FeatureWriter
from ..callbacks.mean_token_maker import MeanTokenMaker
from ..datamodules import PicturesDataModule
from ..lightning_modules import FeatureExtraction
from ..lightning_modules.backbone.loading import DeviceMap, Quantization
from ..records.paths import user_path
from .command import run_command
from .prediction import own_flags, predict
from .preflight import GIB, disk_need, free_disk, measured, skeleton


def mean_token(
    model: str,
    images: str,
    out: str,
    annotations: str | None = None,
    site: str = "projector",
    states: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    devices: int = 1,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    skip_bad_images: bool = False,
) -> None:
    """Average the visual tokens of a model over a folder of pictures.

    The mean takes the place of tokens that AblationMeter removes, and is where its gradients begin. With the pictures'
    instances the file also has a direction for each class of objects, which AblationMeter projects away. Tokens are
    added up as they come, in double precision; nothing but the file is written unless `--states` asks for it.

    Args:
        model: Folder or hub id.
        images: Folder with the pictures, at any depth; or one picture.
        out: File to write (safetensors).
        annotations: COCO's `instances_<split>.json` of these pictures.
        site: Where to read visual tokens: `projector`, as they enter the language model, or deeper, `lm.block.k`.
        states: Folder for a feature store of all these tokens; its size is told before the model runs.
        limit: At most this many pictures, the first ones.
        batch_size: Pictures in one pass of the model, per process.
        num_workers: Processes that read pictures.
        devices: GPUs to use, with a process each; on a machine without, processes.
        revision: Commit or tag on the hub.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()).
        device_map: `auto` lays the layers of the model on all GPUs of this machine.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights. Only for code that
            you have read, at the commit that `revision` names.
        skip_bad_images: Leave out unreadable pictures; by default one stops the run.
    """
    with own_flags():
        module = FeatureExtraction(
            model,
            [site],
            ["image"],
            revision,
            dtype=dtype,
            max_new_tokens=1,
            quantization=quantization,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        data = PicturesDataModule(
            images, limit=limit, batch_size=batch_size, num_workers=num_workers, skip_bad_images=skip_bad_images
        )
        callbacks: list[Callback] = [MeanTokenMaker(out, annotations)]
        if states is not None:
            check_states(user_path(states), module, data)
            callbacks.append(FeatureWriter(states))
        predict(module, data, callbacks, devices)


@rank_zero_only
def check_states(folder: Path, module: FeatureExtraction, data: PicturesDataModule) -> None:
    """Tell how large a store of all visual tokens will be, before the model is loaded.

    Args:
        folder: The store.
        module: What reads them.
        data: The pictures.

    Raises:
        ValueError: The disk has less, or there is a store already, whose pictures would be missing in the mean.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--states {folder}: not empty; choose another folder, or remove it")
    backbone = skeleton(module)
    data.setup("predict")
    samples = data.samples("predict")
    lengths = measured(samples, data, backbone)
    width, dtype = backbone.unembed.shape[1], backbone.model.dtype
    size, free = disk_need(module, backbone, samples, lengths), free_disk(folder)
    print(
        f"{folder}: {len(samples)} pictures x {lengths.image:.0f} visual tokens x {width} numbers x {dtype.itemsize} "
        f"bytes and an index: {size / GIB:.3f} GiB; {free / GIB:.3f} GiB are free"
    )
    if size > free:
        raise ValueError(
            f"--states {folder}: needs more than is free; lower --limit, choose another folder, or leave it out: the "
            "mean needs no store"
        )


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(mean_token, args)
