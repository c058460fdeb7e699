"""The one wrapper over any transformers vision-language model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...records.paths import user_name
from .capture import Capture
from .destinations import DESTINATION
from .generation import Generation, Prefilled
from .identity import model_hashes
from .interventions import Applied, RunningPass, Steering, intervening
from .knockout import AttentionKnockout, knocking_out
from .loading import DeviceMap, Quantization, load_pretrained, quantization_of, reason_of
from .logit_lens import LensQuery, LensReader
from .patch_finder import PatchFinder
from .patch_grid import PatchGrid
from .prompts import IGNORED, PromptEncoder, by_position, prompts_only, with_positions
from .selectors import Selector
from .sites import Site, resolve_sites
from .structure import Unembedding
from .token_map import Role, TokenMap, answer_words, prompt_roles
from .variants import Variants

# Whatever a model's own generation configuration says: hooks count on one row a sample, and on a cache.
_GREEDY = {"do_sample": False, "num_beams": 1, "use_cache": True}


class VisionLanguageModel(Variants):
    """A model with its processor, and its destinations.

    Args:
        model: The transformers model.
        processor: Its processor.
        source: What it was loaded from, for messages and metadata.
        hashes: What it is, where it was loaded from files.
    """

    def __init__(self, model: Any, processor: Any, source: str, hashes: Mapping[str, str] | None = None) -> None:
        super().__init__(model, processor, source, hashes)
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        self.encode = PromptEncoder(processor, self.structure.image_token_id(processor))
        finder = PatchFinder(self.structure, self._picture_alone, self.encode.image_token_id)
        self._find_patches = lru_cache(maxsize=4096)(finder)
        self._pass: RunningPass | None = None
        self._scales_of: dict[str, tuple[tuple[str, float], ...]] = {}
        self._vocabularies: dict[tuple[int, int], list[str]] = {}

    @classmethod
    def load(
        cls,
        model_id: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        random_weights: bool = False,
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        trust_remote_code: bool = False,
        allow_missing_weights: bool = False,
        device: torch.device | str | None = None,
    ) -> VisionLanguageModel:
        """Load a model from a folder or the hub.

        Args:
            model_id: Folder or hub id.
            revision: Commit or tag on the hub.
            adapter: Folder or hub id of a PEFT adapter of this model, which speaks from then on.
            dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
            attention: `sdpa`, `eager` or `flash_attention_2`.
            random_weights: Take only configuration and processor, and initialise the weights from the current
                seed with a variance of 1/fan-in, to train from scratch.
            quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()), by bitsandbytes.
            device_map: `auto` lays the layers on all GPUs, and in main memory what is left.
            trust_remote_code: Run the Python that the model's repository ships, with all your rights. Only for code
                that you have read, at the commit that `revision` names.
            allow_missing_weights: Accept that its files lack tensors, which are random then.
            device: Where to put it; by default it stays where transformers puts it.

        Raises:
            ValueError: Nothing can be loaded from `model_id` in this way, or `adapter` belongs to another model.
        """
        model_id = user_name(model_id)
        model, processor = load_pretrained(
            model_id,
            revision=revision,
            dtype=dtype,
            attention=attention,
            random_weights=random_weights,
            quantization=quantization,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_missing_weights=allow_missing_weights,
        )
        # What is not all in files is known by its tensors.
        whole = not (random_weights or allow_missing_weights)
        wrapper = cls(model, processor, model_id, model_hashes(model_id, revision) if whole else {})
        if device is not None:
            wrapper.to(device)
        wrapper.settle()
        if adapter is not None:
            wrapper.load_adapter(adapter)
            wrapper.speak_as(DESTINATION)
        return wrapper

    # --- structure ----------------------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.structure.decoder

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return self.structure.norm

    @property
    def unembed(self) -> Unembedding:
        """The unembedding: states after the final norm → logits."""
        return Unembedding(self.structure.head, self._scales)

    @property
    def _scales(self) -> tuple[tuple[str, float], ...]:
        """What the variant that speaks does with logits, of what its configuration says."""
        if not self.structure.scales:
            return ()
        if self.variant not in self._scales_of:
            with torch.inference_mode():
                logits, state = self._asked()
                ways = [self.structure.scales, ()]
                self._scales_of[self.variant] = min(
                    ways, key=lambda way: _difference(Unembedding(self.structure.head, way)(state), logits)
                )
        return self._scales_of[self.variant]

    def settle(self) -> None:
        """Let a quantised model unpack what it unpacks in its first pass, and find out whether it runs.

        Raises:
            ValueError: It cannot run here, or has no unembedding that can be read.
        """
        if (method := quantization_of(self.model)) is None:
            return
        weight = self.structure.head.weight
        if not weight.is_floating_point() or weight.ndim != 2:
            raise ValueError(
                f"{self.source}: its unembedding is quantised ({method}), so that no concept and no layer could be "
                "read in words; take a model that leaves it in full precision, as most do"
            )
        try:
            # bitsandbytes has nothing to unpack.
            if method != "bitsandbytes":
                self.ask()
        except Exception as error:  # each library has its own
            raise ValueError(
                f"{self.source}: its weights are quantised ({method}) in a way that does not run on "
                f"{self.model.device} ({reason_of(error)}); run it on a GPU, or take the model in full precision"
            ) from error
        self.learn_structure()

    def ask(self) -> Tensor:
        """Logits of a small prompt with a picture, as the variant that speaks."""
        return self._asked()[0]

    def speak(self) -> str:
        """A few words about a picture of nothing, as the variant that speaks."""
        (text,) = self.generate(self._picture_alone(Image.new("RGB", (64, 64), "gray")), 3).texts
        return text

    @torch.no_grad()
    def _asked(self) -> tuple[Tensor, Tensor]:
        """Logits of a small prompt with a picture, and the final norm of the states after the last block."""
        inputs = self._picture_alone(Image.new("RGB", (64, 64), "gray"))
        if self.structure.is_encoder_decoder:
            inputs["decoder_input_ids"] = self._shown(inputs)["input_ids"]
        capture = Capture(self.sites([f"lm.block.{len(self.structure.blocks) - 1}"]))
        with capture.running():
            logits: Tensor = self.model(**inputs).logits
        return logits, self.final_norm(next(iter(capture.raw().values())))

    @property
    def vocabulary(self) -> list[str]:
        """Every row of the unembedding as decoded text; rows without a token are empty."""
        rows, tokenizer = self.unembed.shape[0], self.tokenizer
        if (found := self._vocabularies.get((rows, id(tokenizer)))) is None:
            found = [tokenizer.decode([token]) if token < len(tokenizer) else "" for token in range(rows)]
            self._vocabularies[rows, id(tokenizer)] = found
        return found

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """Run the model on an encoded batch; with `labels` the output has the mean loss per answer token."""
        self._check_one_sequence("training and losses")
        return self.model(**self._placed(inputs))

    def patch_grid(self, width: int, height: int) -> PatchGrid:
        """Where the visual tokens of a picture of this size lie in it.

        Args:
            width: Width of the original picture in pixels, at least 2.
            height: Its height, at least 2.

        Raises:
            ValueError: The picture is smaller, or the model arranges visual tokens in a way that is not known.
        """
        if reason := self.structure.without_visual_tokens:
            raise ValueError(f"{self.source}: no patches can be placed: {reason}")
        if min(width, height) < 2:
            raise ValueError(f"a picture of {width} x {height} pixels is too small to place patches in; it needs 2 x 2")
        return self._find_patches(width, height)

    def _picture_alone(self, picture: Image.Image) -> dict[str, Tensor]:
        return self._placed(self.encode([picture], ["."]))

    def _placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device; pictures in its precision."""
        device, dtype = self.model.device, self.model.dtype
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}

    def _check_one_sequence(self, what: str) -> None:
        if self.structure.is_encoder_decoder:
            raise ValueError(
                f"{self.source}: no {what}: {self.structure.without_visual_tokens}; it can answer in `conceptshift "
                "predict`, with scorers, and its decoder's states are read and steered there"
            )

    def _shown(self, prompts: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands before the answer in the sequence that the language model sees."""
        if not self.structure.is_encoder_decoder:
            return prompts
        start = self.model.generation_config.decoder_start_token_id
        ids = prompts["input_ids"].new_full((len(prompts["input_ids"]), 1), start)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    # --- running ------------------------------------------------------------------------------------------

    def sites(self, patterns: Iterable[str]) -> list[Site]:
        """Resolve site names and wildcards.

        Raises:
            ValueError: One matches nothing.
        """
        own = self._original.modules
        return list(resolve_sites(self.structure, patterns, self.source, own, self.live_module).values())

    def _live(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Sites as they are now: a destination that came later may have wrapped or exchanged a module."""
        return self.sites(site.name for site in sites) if self._exchanges else sites

    @contextmanager
    def intervene(self, *interventions: Steering | AttentionKnockout) -> Iterator[list[Applied]]:
        """Apply interventions to every pass within the context; they end with it, whatever happens.

        Several at one site are applied in the order given; of knockouts in one block each forbids its own.

        Yields:
            What each steering is doing; knockouts have nothing to tell.
        """
        applied = []
        with ExitStack() as stack:
            for one in interventions:
                if isinstance(one, AttentionKnockout):
                    blocks = self.sites([f"lm.block.{number}" for number in one.blocks])
                    implementation = self.model.config.get_text_config()._attn_implementation
                    stack.enter_context(knocking_out(blocks, one, lambda: self._pass, implementation))
                    continue
                found = self.sites([one.site])
                if len(found) != 1:
                    raise ValueError(f"site {one.site!r} matches {len(found)} sites; choose one of them")
                applied.append(stack.enter_context(intervening(found[0], one, lambda: self._pass)))
            yield applied

    def try_steering(self, inputs: dict[str, Tensor], interventions: Sequence[Steering], max_new_tokens: int) -> None:
        """Apply interventions to a first batch, to learn at once what does not fit the model or its prompts.

        Args:
            inputs: Encoded batch with any padding.
            interventions: What will be applied.
            max_new_tokens: Tokens to generate at most.

        Raises:
            ValueError: A vector does not fit its site, a selector matches nothing in these prompts and what follows, or
                states are no longer finite.
        """
        prompts = self._shown(prompts_only(inputs, self.tokenizer.pad_token_id))
        width = prompts["input_ids"].shape[1]
        token_map = self._map(prompts, torch.full((len(prompts["input_ids"]),), width, device=self.model.device))
        # The last token that can be generated has no state.
        columns = width + max_new_tokens - 1
        for steering in interventions:
            if not isinstance(steering.positions, str):
                continue
            selected = Selector.parse(steering.positions).mask(token_map, 0, columns)
            if self.sites([steering.site])[0].positions == "image":
                selected &= token_map.window(0, columns) == Role.IMAGE
            if not selected.any():
                why = f" ({reason})" if (reason := self.structure.without_visual_tokens) else ""
                raise ValueError(
                    f"positions {steering.positions!r} match nothing at {steering.site!r}{why}: the prompt has {width} "
                    f"positions, and at most {max_new_tokens - 1} follow it"
                )
        with self.intervene(*interventions):
            last = self.sites(["lm.*"])[-1]
            states = self.generate(inputs, 1, [last]).states[last.name]
        if not states.isfinite().all():
            raise ValueError("steering makes hidden states infinite; choose a smaller alpha")

    @torch.inference_mode()
    def prefill(self, inputs: dict[str, Tensor]) -> Prefilled:
        """Run over the prompts of an encoded batch but for their last position, once for several generations.

        What is steered at the last position of the prompt and after it leaves the states before it as they are.

        Args:
            inputs: Encoded batch with any padding; answers in it are left out.
        """
        self._check_one_sequence("prompts in a cache")
        prompts = self._placed(prompts_only(inputs, self.tokenizer.pad_token_id))
        shape = prompts["input_ids"].shape
        sequences = {name: value for name, value in prompts.items() if by_position(name, value, shape)}
        head = {**prompts, **{name: value[:, :-1] for name, value in sequences.items()}}
        done = self.model.generate(**head, **_GREEDY, max_new_tokens=1, return_dict_in_generate=True)
        return Prefilled(sequences, done.past_key_values, self._rope_deltas)

    @torch.inference_mode()
    def can_prefill(self, inputs: dict[str, Tensor]) -> bool:
        """Whether the model says the same from prompts that are in the cache.

        It does not where positions of the prompt see what comes after them.

        Args:
            inputs: Encoded batch with any padding; answers in it are left out.
        """
        if "generate" in vars(type(self.model)) or self.structure.is_encoder_decoder:
            return False  # it wants its picture in every call
        once = {**_GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        prompts = self._placed(prompts_only(inputs, self.tokenizer.pad_token_id))
        whole = self.model.generate(**prompts, **once).logits[0]
        prefilled = self.prefill(inputs)
        cached = self.model.generate(**prefilled.prompts, past_key_values=prefilled.cache, **once).logits[0]
        return _difference(cached, whole) <= _tolerance(whole)

    @property
    def _rope_deltas(self) -> Tensor | None:
        """What models with several parts of positions (M-RoPE) keep of their last prompts."""
        return getattr(self.model.base_model, "rope_deltas", None)

    @torch.inference_mode()
    def generate(
        self,
        inputs: dict[str, Tensor] | Prefilled,
        max_new_tokens: int,
        sites: Sequence[Site] = (),
        lens: LensQuery | None = None,
    ) -> Generation:
        """Answer the prompts of an encoded batch greedily, and read states on the way.

        Args:
            inputs: Encoded batch with any padding; answers in it (positions with a label) are left out. Or what
                `prefill` made of one, where no states are read and nothing is steered before the last position.
            max_new_tokens: Tokens to generate at most.
            sites: Where to read states.
            lens: What to decode at which layers.

        Raises:
            ValueError: The model has no such layer, or a state does not fit the sequence.
        """
        reader = None if lens is None else self._lens_reader(lens)
        cache: dict[str, Any] = {}
        if isinstance(inputs, Prefilled):
            assert not sites, "states of a prompt that is in the cache are gone"
            assert lens is None, "so that no layer of it can be decoded"
            prompts, cache = inputs.prompts, {"past_key_values": copy.deepcopy(inputs.cache)}
            if inputs.rope_deltas is not None:
                self.model.base_model.rope_deltas = inputs.rope_deltas
        else:
            prompts = self._placed(prompts_only(inputs, self.tokenizer.pad_token_id))
        shown = self._shown(prompts)
        width = shown["input_ids"].shape[1]
        starts = torch.full((len(shown["input_ids"]),), width, device=shown["input_ids"].device)
        capture = Capture(self._live(sites))
        running = self._running(self._map(shown, starts), first=width - 1 if cache else 0)
        with running, capture.running(), nullcontext() if reader is None else reader.running():
            sequences = self.model.generate(
                **prompts,
                **cache,
                **_GREEDY,
                max_new_tokens=max_new_tokens,
                # Whoever is done goes on until all are: its pieces are still needed.
                synced_gpus=self.is_sharded,
            )
        answers = [_until_end(row, self._end_ids()) for row in sequences[:, width:].tolist()]
        mask = torch.zeros_like(sequences)
        mask[:, :width] = shown["attention_mask"]
        for row, answer in enumerate(answers):
            mask[row, width : width + len(answer)] = 1
        token_map = self._map({"input_ids": sequences, "attention_mask": mask}, starts, answers)
        generation = self._finish(token_map, capture)
        if reader is not None:
            generation.lens = reader.reading(token_map)
        return generation

    def _lens_reader(self, lens: LensQuery) -> LensReader:
        return LensReader(lens, self.sites(lens.layers), self.final_norm, self.unembed, lambda: self._pass)

    @torch.inference_mode()
    def read(self, inputs: dict[str, Tensor], sites: Sequence[Site] = ()) -> Generation:
        """Run over prompts with given answers and read states.

        Args:
            inputs: Encoded batch with labels, with any padding.
            sites: Where to read states.
        """
        self._check_one_sequence("states of given answers")
        inputs = self._placed(inputs)
        is_answer = inputs["labels"] != IGNORED
        starts = is_answer.to(torch.uint8).argmax(dim=1)
        answers = [
            _until_end(ids[found].tolist(), self._end_ids())
            for ids, found in zip(inputs["input_ids"], is_answer, strict=True)
        ]
        token_map = self._map(inputs, starts, answers)
        capture = Capture(self._live(sites))
        with self._running(token_map), capture.running():
            given = {name: value for name, value in inputs.items() if name != "labels"}
            self.model(**with_positions(self.model, given))
        return self._finish(token_map, capture)

    @torch.inference_mode()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [B, T, tokens] of an encoded batch with any padding, steered where the model is."""
        return self.logits_with_graph(inputs)

    def logits_with_graph(self, inputs: dict[str, Tensor]) -> Tensor:
        """The same where gradients are wanted: what is recorded is up to the caller."""
        self._check_one_sequence("logits of given answers")
        inputs = self._placed(inputs)
        ids, kept = inputs["input_ids"], inputs["attention_mask"]
        # Behind the last token, whatever the padding.
        starts, answers = ids.shape[1] - kept.flip(1).to(torch.uint8).argmax(dim=1), None
        if "labels" in inputs:
            starts = (inputs["labels"] != IGNORED).to(torch.uint8).argmax(dim=1)
            answers = [[0]] * len(ids)  # there are some, and which does not matter
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with self._running(self._map(inputs, starts, answers)):
            logits: Tensor = self.model(**with_positions(self.model, given)).logits
        return logits

    @torch.inference_mode()
    def answer_losses(self, inputs: dict[str, Tensor]) -> list[tuple[float, int]]:
        """Loss of the given answers, steered where the model is.

        Args:
            inputs: Encoded batch with labels, with any padding.

        Returns:
            For each sample the summed negative log-likelihood of its answer tokens, in nats, and their number.
        """
        labels, logits = inputs["labels"], self.logits(inputs)
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        counts = (labels[:, 1:] != IGNORED).sum(dim=1)
        return list(zip(losses.sum(dim=1).tolist(), counts.tolist(), strict=True))

    def self_check(self) -> None:
        """Check that unembedding(norm(state after the last block)) gives the model's own logits.

        Raises:
            ValueError: It does not; concepts and logit lens would not mean what the model says.
        """
        logits, state = self._asked()
        with torch.inference_mode():
            difference = _difference(self.unembed(state), logits)
        if not difference <= _tolerance(logits):
            raise ValueError(
                f"{self.source}: unembedding(norm(lm.block.last)) differs from the model's logits by "
                f"{difference:.1e} of their size; this architecture needs an entry in backbone/structure.py"
            )

    @contextmanager
    def _running(self, token_map: TokenMap, first: int = 0) -> Iterator[None]:
        self._pass = RunningPass(token_map, first)
        try:
            yield
        finally:
            self._pass = None

    def _map(self, inputs: dict[str, Tensor], starts: Tensor, answers: list[list[int]] | None = None) -> TokenMap:
        ids = inputs["input_ids"]
        in_prompt = torch.arange(ids.shape[1], device=ids.device) < starts[:, None]
        special = self._special_ids()
        visual = self.encode.image_token_id if self.structure.has_visual_tokens else None
        roles = prompt_roles(ids, inputs["attention_mask"], in_prompt, visual, special)
        roles[(roles == Role.PROMPT) & ~in_prompt] = Role.ANSWER
        answers = answers if answers is not None else [[] for _ in ids]
        words = [answer_words(self.tokenizer, answer) for answer in answers]
        return TokenMap(ids, roles, starts, answers, words)

    def _finish(self, token_map: TokenMap, capture: Capture) -> Generation:
        texts = self.tokenizer.batch_decode(token_map.answers, skip_special_tokens=True)
        return Generation([text.strip() for text in texts], token_map, capture.states(token_map))

    def _special_ids(self) -> list[int]:
        return [*self.tokenizer.all_special_ids, *self._end_ids()]

    def _end_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


def _tolerance(logits: Tensor) -> float:
    """How far equal logits may be apart, relative to their size."""
    return 1e-4 if logits.dtype == torch.float32 else 5e-2


def _difference(ours: Tensor, logits: Tensor) -> float:
    """How far logits are from a model's own, relative to their size; tokens that it forbids are left out."""
    if ours.shape != logits.shape:
        return float("inf")
    allowed = ~(logits < torch.finfo(logits.dtype).min / 2)
    return float((ours - logits)[allowed].abs().max() / logits[allowed].abs().max())


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row
